"""Checkpoints: named global tensors in slices, safetensors files, one JSON manifest. No pickle anywhere.

A checkpoint is written into a temporary directory, its files are fsynced, the manifest comes last, and one rename
publishes it. A directory without a valid manifest does not exist. Every load verifies every byte it uses.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors.torch import load as decode_safetensors
from safetensors.torch import save as encode_safetensors
from torch import Tensor

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
FILE_BYTES = 1 << 30  # a file is closed when it holds this much
_STEP_PREFIX = "step-"
_TEMPORARY = ".tmp-"


class Shard(NamedTuple):
    """The part of a global tensor that a tensor-parallel rank holds: slice `part` of `n_parts` along `dim`."""

    dim: int
    part: int
    n_parts: int


class Piece(NamedTuple):
    """A contiguous range of one flattened tensor of one kind, global or a shard of it, on its way to disk.

    Kinds: "master" (float32 weight), "exp_avg", "exp_avg_sq" (Adam's moments), "buffer" (saved, not trained) and
    "weight" (a value under its usual name that training holds in parts).
    """

    name: str
    kind: str
    shape: Sequence[int]  # of the global tensor
    start: int
    values: Tensor
    shard: Shard | None = None


class Ranks(Protocol):
    """The processes that write one checkpoint together."""

    @property
    def rank(self) -> int: ...

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        ...

    def collect(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        ...


class Alone:
    """One process."""

    rank = 0

    def share(self, value: Any) -> Any:
        return value

    def collect(self, value: Any) -> list[Any]:
        return [value]


class CheckpointError(Exception):
    """A checkpoint that must not be used; the text names the file and what is wrong with it."""


class StorageError(Exception):
    """A checkpoint that could not be written; older ones are untouched."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its manifest and whole flattened tensors by (name, kind)."""

    path: Path
    manifest: dict[str, Any]
    tensors: dict[tuple[str, str], Tensor]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest["step"]

    def shaped(self, name: str, kind: str) -> Tensor:
        """One tensor in its global shape."""
        return self.tensors[name, kind].view(self.manifest["tensors"][name])


def directory_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies inside the run's checkpoint folder."""
    return folder / f"{_STEP_PREFIX}{step:08d}"


def save(folder: Path, step: int, pieces: Iterable[Piece], record: dict[str, Any], ranks: Ranks | None = None) -> Path:
    """Write and publish the checkpoint of `step`; a valid one that is already there is left alone.

    Args:
        folder: the run's checkpoint folder.
        step: optimizer steps done.
        pieces: this process's slices, read once, in order.
        record: JSON values that go into the manifest beside the format's own keys.
        ranks: the processes that each write their pieces, all of which must call this; None for one.

    Returns:
        The published directory.

    Raises:
        StorageError: the file system refused; nothing was published and nothing older was touched.
    """
    ranks = ranks or Alone()
    target = directory_of(folder, step)
    temporary = folder / f"{_TEMPORARY}{target.name}"
    if ranks.share(ranks.rank == 0 and _is_there(target)):
        return target
    _all_or_none(ranks, target, lambda: _make_anew(temporary) if ranks.rank == 0 else None)
    parts = _all_or_none(ranks, target, lambda: _write_files(temporary, pieces, ranks.rank))
    manifest = {"format_version": FORMAT_VERSION, "step": step, **record, **_merge(parts)}
    _all_or_none(ranks, target, lambda: _publish(temporary, target, manifest) if ranks.rank == 0 else None)
    return target


def _all_or_none(ranks: Ranks, target: Path, write: Callable[[], Any]) -> list[Any]:
    """Every rank's result of `write`; an error on any rank is an error on all, so that none waits for another.

    Raises:
        StorageError: the file system refused somewhere.
    """
    try:
        outcome = (write(), None)
    except OSError as error:
        outcome = (None, f"{target}: {error.strerror or error}")
    outcomes = ranks.collect(outcome)
    for _, problem in outcomes:
        if problem is not None:
            raise StorageError(problem)
    return [result for result, _ in outcomes]


def _is_there(target: Path) -> bool:
    """Whether a valid checkpoint is published already; a damaged one is put aside."""
    if not (target / MANIFEST).exists():
        return False
    try:
        read(target)
    except CheckpointError:
        _set_aside(target)
        return False
    return True


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _publish(temporary: Path, target: Path, manifest: dict[str, Any]) -> None:
    """Manifest last, then one rename."""
    _write_durably(temporary / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True).encode())
    _sync_directory(temporary)
    temporary.rename(target)
    _sync_directory(target.parent)
    hint = target.parent / f"{_TEMPORARY}LATEST"
    _write_durably(hint, f"{target.name}\n".encode())
    hint.rename(target.parent / "LATEST")


def prune(folder: Path, keep: int) -> list[Path]:
    """Delete all but the newest `keep` checkpoints and the leftovers of saves that died; returns what went."""
    old = published(folder)[keep:] + list(folder.glob(f"{_TEMPORARY}*"))
    for path in old:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return old


def published(folder: Path) -> list[Path]:
    """Checkpoint directories that have a manifest, newest step first. Names and times on disk decide nothing else."""
    found = [path for path in folder.glob(f"{_STEP_PREFIX}*") if (path / MANIFEST).is_file()]
    return sorted((path for path in found if path.name[len(_STEP_PREFIX) :].isdigit()), reverse=True)


def newest_valid(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and one line for every newer one that does not."""
    rejected = []
    for path in published(folder):
        try:
            return read(path), rejected
        except CheckpointError as error:
            rejected.append(str(error))
    return None, rejected


def read(path: Path) -> Checkpoint:
    """Load a checkpoint and verify it: file hashes, slice digests, and that slices cover every tensor exactly once.

    Raises:
        CheckpointError: anything that does not verify.
    """
    manifest = read_manifest(path)
    try:
        contents = {name: _read_file(path / name, entry) for name, entry in manifest["files"].items()}
        shards: dict[tuple[str, str], dict[Shard | None, list[Tensor]]] = {}
        for entry in sorted(manifest["slices"], key=lambda entry: entry["start"]):
            values = contents[entry["file"]][entry["key"]]
            if _digest(values) != entry["sha256"]:
                raise CheckpointError(f"{path / entry['file']}: slice {entry['key']} does not match its digest")
            shard = None if entry["shard"] is None else Shard(*entry["shard"])
            parts = shards.setdefault((entry["name"], entry["kind"]), {}).setdefault(shard, [])
            if entry["start"] != sum(part.numel() for part in parts):
                raise CheckpointError(f"{path / MANIFEST}: slices of {entry['name']} leave a hole or overlap")
            parts.append(values)
        tensors = {key: _assembled(path, key[0], manifest["tensors"][key[0]], found) for key, found in shards.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST}: malformed ({type(error).__name__}: {error})") from error
    return Checkpoint(path, manifest, tensors)


def _assembled(path: Path, name: str, shape: Sequence[int], shards: dict[Shard | None, list[Tensor]]) -> Tensor:
    try:
        return assemble(shape, shards)
    except ValueError as error:
        raise CheckpointError(f"{path / MANIFEST}: slices of {name} {error}") from error


def assemble(shape: Sequence[int], shards: dict[Shard | None, list[Tensor]]) -> Tensor:
    """One flattened global tensor from its slices in order, each part of it or of a shard of it exactly once.

    Raises:
        ValueError: something is missing or there twice.
    """
    flat = {shard: parts[0] if len(parts) == 1 else torch.cat(parts) for shard, parts in shards.items()}
    first = next(iter(shards))
    wanted = {None} if first is None else {first._replace(part=part) for part in range(first.n_parts)}
    n_shards = 1 if first is None else first.n_parts
    n_values = torch.Size(shape).numel()
    if set(shards) != wanted or any(part.numel() * n_shards != n_values for part in flat.values()):
        raise ValueError("end early or belong to other layouts")
    if first is None:
        return flat[None]
    local = [size // first.n_parts if axis == first.dim else size for axis, size in enumerate(shape)]
    return torch.cat([flat[first._replace(part=i)].view(local) for i in range(first.n_parts)], first.dim).flatten()


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint directory.

    Raises:
        CheckpointError: missing, not JSON, of another format version, or naming files outside the directory.
    """
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: unreadable ({error})") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{file}: format version {version}, this program reads {FORMAT_VERSION}")
    if directory_of(path.parent, manifest.get("step", -1)).name != path.name:
        raise CheckpointError(f"{file}: belongs to step {manifest.get('step')}")
    for name in manifest.get("files", {}):
        if Path(name).name != name:
            raise CheckpointError(f"{file}: names a file outside its directory: {name}")
    return manifest


def _merge(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One `tensors`, `slices` and `files` of all ranks'."""
    return {
        "tensors": {name: shape for part in parts for name, shape in part["tensors"].items()},
        "slices": [entry for part in parts for entry in part["slices"]],
        "files": {name: entry for part in parts for name, entry in part["files"].items()},
    }


def _write_files(folder: Path, pieces: Iterable[Piece], rank: int) -> dict[str, Any]:
    """Write a rank's slices into files of bounded size; returns its `tensors`, `slices` and `files`."""
    tensors: dict[str, list[int]] = {}
    slices: list[dict[str, Any]] = []
    files: dict[str, dict[str, Any]] = {}
    batch: dict[str, Tensor] = {}
    n_bytes = 0

    def close() -> None:
        nonlocal batch, n_bytes
        if batch:
            data = encode_safetensors(batch)
            files[file_name()] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            _write_durably(folder / list(files)[-1], data)
        batch, n_bytes = {}, 0

    def file_name() -> str:
        return f"rank{rank:05d}-{len(files):05d}.safetensors"

    for piece in pieces:
        if piece.values.numel() == 0:
            continue
        values = piece.values.detach().flatten().cpu().contiguous()
        key = f"{piece.name}/{piece.kind}/{piece.start}"
        tensors[piece.name] = list(piece.shape)
        slices.append(
            {
                "name": piece.name,
                "kind": piece.kind,
                "shard": piece.shard,
                "start": piece.start,
                "length": values.numel(),
                "dtype": str(values.dtype).removeprefix("torch."),
                "file": file_name(),
                "key": key,
                "sha256": _digest(values),
            }
        )
        batch[key] = values
        n_bytes += values.nbytes
        if n_bytes >= FILE_BYTES:
            close()
    close()
    return {"tensors": tensors, "slices": slices, "files": files}


def _read_file(path: Path, entry: dict[str, Any]) -> dict[str, Tensor]:
    """Bytes are hashed first and decoded from the same memory: what was verified is what is used."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: unreadable ({error.strerror})") from error
    found = hashlib.sha256(data).hexdigest()
    if found != entry["sha256"]:
        raise CheckpointError(f"{path}: sha256 is {found}, the manifest says {entry['sha256']}")
    return decode_safetensors(data)


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.view(torch.uint8).numpy().data).hexdigest()


def _set_aside(path: Path) -> None:
    """Keep a damaged checkpoint for whoever wants to look at it, out of the way of resume."""
    quarantine = path.parent / "quarantine"
    quarantine.mkdir(exist_ok=True)
    attempt = sum(1 for _ in quarantine.glob(f"{path.name}*"))
    path.rename(quarantine / f"{path.name}-{attempt}")


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
