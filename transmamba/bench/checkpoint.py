"""`transmamba bench checkpoint`: how fast a checkpoint is durable, and how long training stands still for it.

Everything is written side by side into one folder of one disk: ours, torch.save, safetensors and torch's distributed
checkpoint, each until fsync has returned, and the same bytes by plain writes, which is the disk's own limit. Only ours
also computes hashes.
"""

import json
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from transmamba import checkpoint, disk
from transmamba.bench.kernels import results_folder
from transmamba.checkpoint import Alone
from transmamba.config import CheckpointConfig
from transmamba.machine import describe_device, versions
from transmamba.metrics import Journal
from transmamba.saving import Saver
from transmamba.slices import Piece

KINDS = ("master", "exp_avg", "exp_avg_sq")
State = dict[tuple[str, str], Tensor]


def bench_checkpoint(budget_s: float, out: Path, folder: Path | None = None, megabytes: int = 600) -> int:
    """Alternate the ways of saving; prints a table, writes `out`/<hardware>/checkpoint.json, returns 0.

    Args:
        budget_s: seconds after which no new round is begun; at least three are.
        out: folder of results.
        folder: where to write; None is the system's temporary folder.
        megabytes: size of the training state.

    Raises:
        AssertionError: what our checkpoint holds is not what was saved; nothing is timed then.
    """
    started = time.monotonic()
    state = _state(megabytes)
    n_bytes = sum(values.nbytes for values in state.values())
    with tempfile.TemporaryDirectory(dir=folder) as place:
        _check(state, Path(place))
        rounds: list[dict[str, float]] = []
        while len(rounds) < 3 or time.monotonic() - started < budget_s * (1 - 1 / (len(rounds) + 1)):
            rounds.append(_durable(state, Path(place), len(rounds)) | _paused(state, Path(place)))
        written = _written(state, Path(place))
    device = describe_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    medians = {name: statistics.median(found[name] for found in rounds) for name in rounds[0]}
    record = {"device": device, "state_bytes": n_bytes, "rounds": len(rounds), "median_s": medians, "rounds_s": rounds}
    record["ratios"] = _ratios(rounds) | {"bytes written": written / n_bytes}
    record |= {"threads": torch.get_num_threads(), "versions": versions(), "date": f"{datetime.now(UTC):%Y-%m-%d}"}
    _show(record)
    target = results_folder(out, device)
    target.mkdir(parents=True, exist_ok=True)
    (target / "checkpoint.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def _state(megabytes: int) -> State:
    """Matrices of 4 MB and norms, each with its two moments, as a model of this size has them."""
    draw = torch.Generator().manual_seed(0)
    state: State = {}
    for layer in range(max(megabytes // 12, 1)):
        for kind in KINDS:
            state[f"layers.{layer}.mixer.qkv.weight", kind] = torch.randn(1024 * 1024, generator=draw)
            state[f"layers.{layer}.norm.weight", kind] = torch.randn(1024, generator=draw)
    return state


def _pieces(state: State) -> list[Piece]:
    return [Piece(name, kind, values.shape, 0, values) for (name, kind), values in state.items()]


def _check(state: State, place: Path) -> None:
    found = checkpoint.read(checkpoint.save(place / "check", 1, _pieces(state), {}))
    assert found.tensors.keys() == state.keys()
    assert all(torch.equal(values, found.tensors[key]) for key, values in state.items())
    shutil.rmtree(place / "check")


def _durable(state: State, place: Path, attempt: int) -> dict[str, float]:
    """Seconds until each way of saving has everything on the disk; another one is the first in each attempt."""
    named = {f"{name}/{kind}": values for (name, kind), values in state.items()}
    raw = next(iter(state.values())).numpy().data.cast("B")
    n_raw = sum(values.nbytes for values in state.values()) // len(raw)

    def by_torch(path: Path) -> None:
        path.mkdir()
        with (path / "state.pt").open("wb") as file:
            torch.save(named, file)
            file.flush()
            os.fsync(file.fileno())
        disk.sync_folder(path)

    def by_safetensors(path: Path) -> None:
        path.mkdir()
        save_file(named, path / "state.safetensors")
        disk.sync_folder(path / "state.safetensors")
        disk.sync_folder(path)

    ways: dict[str, Callable[[Path], Any]] = {
        "transmamba": lambda path: checkpoint.save(path, 1, _pieces(state), {}),
        "torch.save": by_torch,
        "safetensors": by_safetensors,
        "DCP": lambda path: save_distributed(named, checkpoint_id=path, no_dist=True),
        "plain writes": lambda path: path.mkdir() or disk.write_file(path / "raw", [raw] * n_raw),
    }
    seconds = {}
    order = list(ways)
    for name in order[attempt % len(order) :] + order[: attempt % len(order)]:
        save, path = ways[name], place / "durable"
        os.sync()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seconds[name] = _seconds(lambda save=save, path=path: save(path))
        shutil.rmtree(path)
    return {name: seconds[name] for name in ways}


def _paused(state: State, place: Path) -> dict[str, float]:
    """Seconds that a save in the background holds up training, and those of one copy of the state in memory."""
    (place / "run").mkdir()
    n_bytes = sum(values.nbytes for values in state.values())
    into = torch.zeros(n_bytes, dtype=torch.uint8)
    sources = [values.view(torch.uint8) for values in state.values()]

    def copy() -> None:
        for part, values in zip(into.split([values.numel() for values in sources]), sources, strict=True):
            part.copy_(values)

    journal = Journal(place / "run", 0)
    pauses, copies = [], []
    with Saver(place / "run" / "checkpoints", CheckpointConfig(), journal, Alone(), lambda step: None) as saver:
        for step in range(1, 5):
            copies.append(_seconds(copy))
            pauses.append(_seconds(lambda step=step: saver.begin(step, _pieces(state), {})))
            saver.finish()
    journal.close()
    shutil.rmtree(place / "run")
    # The first save makes the memory that the others use again.
    return {"memory copy": min(copies[1:]), "pause": min(pauses[1:]), "first pause": pauses[0]}


def _written(state: State, place: Path) -> int:
    path = checkpoint.save(place / "size", 1, _pieces(state), {})
    return sum(file.stat().st_size for file in path.iterdir())


def _seconds(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _ratios(rounds: list[dict[str, float]]) -> dict[str, float]:
    def median(above: str, below: str) -> float:
        return statistics.median(found[above] / found[below] for found in rounds)

    return {
        "faster than torch.save": median("torch.save", "transmamba"),
        "faster than DCP": median("DCP", "transmamba"),
        "faster than safetensors": median("safetensors", "transmamba"),
        "of the disk's own speed": median("plain writes", "transmamba"),
        "pause over memory copy": median("pause", "memory copy"),
        "pause shorter than torch.save": median("torch.save", "pause"),
    }


def _show(record: dict[str, Any]) -> None:
    size, ratios = record["state_bytes"], record["ratios"]
    table = Table("way", "seconds", "GB/s", title=f"{record['device']}, {size / 1e6:.0f} MB, {record['rounds']} rounds")
    for name, seconds in record["median_s"].items():
        table.add_row(name, f"{seconds:.3f}", f"{size / seconds / 1e9:.2f}")
    console = Console()
    console.print(table)
    wanted = {"faster than torch.save": "at least 2", "faster than DCP": "at least 1"}
    wanted |= {"pause over memory copy": "at most 1.2", "bytes written": "at most 1.01"}
    for name, ratio in ratios.items():
        console.print(f"{name:<30} {ratio:7.3f}  {wanted.get(name, '')}")
