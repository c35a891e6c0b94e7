"""New run folders from checkpoints: cut for another layout, or the mean of several. One tensor in memory at a time."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transmamba import disk
from transmamba.checkpoint import (
    Checkpoint,
    directory_of,
    look,
    merge,
    publish,
    published,
    temporary_of,
    write_part,
)
from transmamba.checkpoints_tools.listing import unusable
from transmamba.compose import to_yaml
from transmamba.config import Config, padded_vocab
from transmamba.data_pipeline.progress import show_step
from transmamba.data_pipeline.publish import publish_folder
from transmamba.errors import EXIT_STORAGE, ConfigError, Problem, RunError
from transmamba.model.init import named_slices
from transmamba.model.model import Model
from transmamba.parallel.shards import Shards
from transmamba.sealed import CheckpointError
from transmamba.slices import Piece, Shard
from transmamba.staging import plan
from transmamba.transpoint import layer_kinds

Key = tuple[str, str]
_OWN_KEYS = ("format_version", "step", "tensors", "slices", "files")


def reshard(source: Checkpoint, out: Path, *, tp: int, dp: int, show: bool = False) -> Path:
    """Write a checkpoint as `tp` x `dp` ranks would have: a file, or several, for each with its slices alone.

    Every layout loads every checkpoint; cut for its own, a rank reads just the bytes it needs.

    Args:
        out: a new run folder.
        tp: parts along the dimension that tensor parallelism cuts.
        dp: ranges of what is left, as ZeRO cuts it.

    Returns:
        The new checkpoint.

    Raises:
        ConfigError: `out` is taken, or `tp` does not suit the model.
        RunError: a tensor is damaged (exit 21), or the disk refuses (40).
    """
    dims = _cut_dims(source, tp) if tp > 1 else {}

    def pieces(tp_rank: int, dp_rank: int) -> Iterator[Piece]:
        for name, kind in source.slices:
            shape, dim = source.manifest["tensors"][name], dims.get(name)
            shard = None if dim is None else Shard(dim, tp_rank, tp)
            if shard is None and tp_rank > 0:
                continue
            n_values = torch.Size(shape).numel() // (1 if shard is None else tp)
            start = min(dp_rank * -(-n_values // dp), n_values)
            length = min(-(-n_values // dp), n_values - start)
            if length:
                yield Piece(name, kind, shape, start, source.part(name, kind, shard, start, length), shard)

    ranks = [pieces(tp_rank, dp_rank) for dp_rank in range(dp) for tp_rank in range(tp)]
    return _write(source, out, ranks, {}, "resharding", show)


def average(sources: list[Checkpoint], out: Path, *, show: bool = False) -> Path:
    """Write the newest of several checkpoints with the mean of all their weights, taken in float64.

    Moments, buffers and the position in the data are the newest one's.

    Raises:
        ConfigError: `out` is taken, or the checkpoints are of different models.
        RunError: a tensor is damaged (exit 21), or the disk refuses (40).
    """
    newest = max(sources, key=lambda source: source.step)
    for source in sources:
        if source.manifest["tensors"] != newest.manifest["tensors"]:
            problem = "its tensors are not those of the newest checkpoint"
            raise ConfigError([Problem("RUN_DIR", problem, source.path, "average checkpoints of one run")])

    def mean(name: str) -> Tensor:
        total = torch.zeros(torch.Size(newest.manifest["tensors"][name]).numel(), dtype=torch.float64)
        for source in sources:
            total += source.tensors[name, "master"]
        return (total / len(sources)).to(newest.tensors[name, "master"].dtype)

    def pieces() -> Iterator[Piece]:
        for name, kind in newest.slices:
            if kind == "master":
                values = mean(name)
            elif kind == "weight":  # the sum that training holds in two parts
                values = newest.tensors[f"{name}.start", "buffer"] + mean(f"{name}.offset")
            else:
                values = newest.tensors[name, kind]
            yield Piece(name, kind, newest.manifest["tensors"][name], 0, values)

    averaged = {"averaged": sorted(source.step for source in sources)}
    return _write(newest, out, [pieces()], averaged, "averaging", show)


def last(run_dir: Path, count: int) -> list[Checkpoint]:
    """The newest checkpoints of a run by their manifests.

    Raises:
        ConfigError: there are fewer.
        RunError: one of them must not be used (exit 21).
    """
    paths = published((run_dir / "checkpoints").absolute())
    if len(paths) < count:
        fix = f"give at most {len(paths)}, or keep more with checkpoint.keep"
        raise ConfigError([Problem("--last", f"{run_dir} has {len(paths)} checkpoints", count, fix)])
    try:
        return [look(path) for path in paths[:count]]
    except CheckpointError as error:
        raise unusable(error) from error


def _cut_dims(source: Checkpoint, tp: int) -> dict[str, int | None]:
    """Along which dimension `tp` ranks cut each tensor: the model itself says so, built without values."""
    config = Config.model_validate(source.manifest["config"])
    rows = padded_vocab(config.model.vocab_size or source.manifest["data"]["vocab_size"])
    try:
        with torch.device("meta"):
            model = Model(
                config.model,
                layer_kinds(config.model),
                n_tokens_known=rows,
                n_rows=rows,
                seed=None,
                shards=Shards(tp=tp),
            )
    except ValueError as error:
        raise ConfigError([Problem("--tp", str(error), tp, "give a number that divides heads and widths")]) from error
    dims = {name: dim for name, _, dim in named_slices(model)}
    return dims | {name.removesuffix(".start"): dim for name, dim in dims.items() if name.endswith(".start")}


def _write(
    source: Checkpoint, out: Path, ranks: list[Iterator[Piece]], more: dict[str, Any], title: str, show: bool
) -> Path:
    """A run folder with one checkpoint, written aside: the source's record, each rank's pieces in files of its own."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError([Problem("--out", "it exists and is not empty", out, "give a new folder")])
    step, config = source.step, Config.model_validate(source.manifest["config"])
    config.run.dir = str(out)
    record = {key: value for key, value in source.manifest.items() if key not in _OWN_KEYS} | more
    n_bytes = sum(file["bytes"] for file in source.manifest["files"].values())
    try:
        with publish_folder(out, replace=False) as new, show_step(title, n_bytes, visible=show) as advance:
            (new / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
            tokenizer = source.path.parent.parent / "tokenizer.json"
            if tokenizer.exists():
                shutil.copyfile(tokenizer, new / "tokenizer.json")
            folder = new / "checkpoints"
            temporary = temporary_of(folder, step)
            disk.make_folder(temporary)
            files = (plan(_told(pieces, advance), rank) for rank, pieces in enumerate(ranks))
            parts = [write_part(temporary, ((file, file.views()) for file in planned)) for planned in files]
            publish(temporary, directory_of(folder, step), step, record, merge(parts))
    except CheckpointError as error:
        raise unusable(error) from error
    except OSError as error:
        problem = f"{error.filename or out}: {error.strerror or error}"
        raise RunError(EXIT_STORAGE, f"--out: {problem}. Fix: make room, or give another folder") from error
    return directory_of(out / "checkpoints", step)


def _told(pieces: Iterable[Piece], advance: Callable[[int], None]) -> Iterator[Piece]:
    for piece in pieces:
        yield piece
        advance(piece.values.nbytes)
