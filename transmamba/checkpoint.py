"""Checkpoints: named global tensors in slices, safetensors files, one JSON manifest. No pickle anywhere.

A checkpoint is written into a temporary directory, its files are fsynced, the manifest comes last, and one rename
publishes it. A directory without a valid manifest does not exist. The manifest carries its own SHA-256 in its first
line, the SHA-256 of every file, and a digest of every slice, so that a rank verifies what it reads and reads no more.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from torch import Tensor

from transmamba import disk
from transmamba.data_pipeline.progress import show_step
from transmamba.sealed import CheckpointError, opened, seal, unseal
from transmamba.slices import Piece, Shard, assemble, check_cover
from transmamba.staging import DTYPES, Image, Slice, Written, plan, write_image

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"
QUARANTINE = "quarantine"
SHOWN_BYTES = 4 << 30  # a few seconds of reading and hashing
_STEP_PREFIX = "step-"

Key = tuple[str, str]  # name and kind of a tensor


class Ranks(Protocol):
    """The processes that write or read one checkpoint together."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        ...

    def collect(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        ...

    def sum_all(self, values: Tensor) -> Tensor:
        """Sum over every rank."""
        ...


class Alone:
    """One process."""

    rank, world_size = 0, 1

    def share(self, value: Any) -> Any:
        return value

    def collect(self, value: Any) -> list[Any]:
        return [value]

    def sum_all(self, values: Tensor) -> Tensor:
        return values


class StorageError(Exception):
    """A checkpoint that could not be written; older ones are untouched."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk. Tensors are read when they are asked for, and verified from the memory they are read to."""

    path: Path
    manifest: dict[str, Any]
    slices: dict[Key, dict[Shard | None, list[Slice]]]

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.manifest["step"]

    @property
    def tensors(self) -> Mapping[Key, Tensor]:
        """Whole flattened tensors by (name, kind), each read at its look-up."""
        return _Tensors(self)

    def shaped(self, name: str, kind: str) -> Tensor:
        """One tensor in its global shape."""
        shape, shards = self.manifest["tensors"][name], self.slices[name, kind]
        parts = {shard: [self._read(entry) for entry in entries] for shard, entries in shards.items()}
        return assemble(shape, parts).view(shape)

    def part(self, name: str, kind: str, shard: Shard | None, start: int, length: int) -> Tensor:
        """Elements from `start` of the flattened tensor or of a shard of it; reads little more where it was cut alike.

        Raises:
            CheckpointError: it cannot be read, or does not match its digest.
        """
        entries = self.slices[name, kind].get(shard)
        if entries is None:
            whole = self.shaped(name, kind)
            return (whole if shard is None else shard.of(whole)).flatten()[start : start + length]
        found = [entry for entry in entries if entry.start < start + length and start < entry.start + entry.length]
        values = [self._read(entry) for entry in found]
        first = start - found[0].start if found else 0
        return (values[0] if len(values) == 1 else torch.cat(values))[first : first + length]

    def _read(self, entry: Slice) -> Tensor:
        data = bytearray(entry.n_bytes)
        with opened(self.path / entry.file) as (descriptor, _):
            view, n_read = memoryview(data), 0
            while n_read < len(view):
                got = os.preadv(descriptor, [view[n_read:]], entry.offset + n_read)
                if not got:
                    raise CheckpointError(f"{self.path / entry.file}: ends within {entry.name}")
                n_read += got
        if xxhash.xxh3_64_hexdigest(data) != entry.xxh3:
            raise CheckpointError(f"{self.path / entry.file}: {entry.kind} of {entry.name} has another digest")
        return torch.frombuffer(data, dtype=DTYPES[entry.dtype])


class _Tensors(Mapping[Key, Tensor]):
    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint

    def __getitem__(self, key: Key) -> Tensor:
        return self._checkpoint.shaped(*key).flatten()

    def __iter__(self) -> Iterator[Key]:
        return iter(self._checkpoint.slices)

    def __len__(self) -> int:
        return len(self._checkpoint.slices)


def directory_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies inside the run's checkpoint folder."""
    return folder / f"{_STEP_PREFIX}{step:08d}"


def temporary_of(folder: Path, step: int) -> Path:
    """Where it is written before it is published."""
    return folder / f"{TEMPORARY}{_STEP_PREFIX}{step:08d}"


def save(folder: Path, step: int, pieces: Iterable[Piece], record: dict[str, Any], ranks: Ranks | None = None) -> Path:
    """Write and publish the checkpoint of `step` at once; a valid one that is already there is left alone.

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
    temporary, target = temporary_of(folder, step), directory_of(folder, step)

    def all_or_none(write: Callable[[], Any]) -> list[Any]:
        # An error on any rank is an error on all, so that none waits for another.
        try:
            outcome = (write(), None)
        except OSError as error:
            outcome = (None, f"{error.filename or target}: {error.strerror or error}")
        outcomes = ranks.collect(outcome)
        for _, problem in outcomes:
            if problem is not None:
                raise StorageError(problem)
        return [result for result, _ in outcomes]

    all_or_none(lambda: disk.make_folder(temporary) if ranks.rank == 0 else None)
    images = ((file, file.views()) for file in plan(pieces, ranks.rank))
    parts = all_or_none(lambda: write_part(temporary, images))
    part = merge(parts)
    all_or_none(lambda: publish(temporary, target, step, record, part) if ranks.rank == 0 else None)
    return target


def write_part(
    temporary: Path, images: Iterable[Image], write: Callable[[Path, Image], Written] = write_image
) -> dict[str, Any]:
    """Write a rank's files durably, two at a time; returns its `tensors`, `slices` and `files` of the manifest.

    Raises:
        OSError: the file system refused.
    """
    part: dict[str, Any] = {"tensors": {}, "slices": [], "files": {}}
    waiting = iter(images)
    with ThreadPoolExecutor(2) as writers:  # one core hashes no faster than a disk writes
        while batch := list(islice(waiting, 2)):
            written = writers.map(lambda image: write(temporary, image), batch)
            for (file, _), (entry, slices) in zip(batch, written, strict=True):
                part["files"][file.name] = entry
                part["slices"] += [found._asdict() for found in slices]
                part["tensors"] |= {piece.name: list(piece.shape) for piece in file.pieces}
    return part


def merge(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One `tensors`, `slices` and `files` of several."""
    return {
        "tensors": {name: shape for part in parts for name, shape in part["tensors"].items()},
        "slices": [entry for part in parts for entry in part["slices"]],
        "files": {name: entry for part in parts for name, entry in part["files"].items()},
    }


def publish(temporary: Path, target: Path, step: int, record: dict[str, Any], part: dict[str, Any]) -> None:
    """Manifest last, then one rename. May be repeated after an error, wherever that came from.

    Args:
        part: `tensors`, `slices` and `files` of all ranks, which are in `temporary`.

    Raises:
        OSError: the file system refused.
    """
    if temporary.exists():
        manifest = {"format_version": FORMAT_VERSION, "step": step, **record, **part}
        disk.write_file(temporary / MANIFEST, [seal(manifest)])
        disk.sync_folder(temporary)
        if _is_valid(target):
            disk.remove(temporary)
            return
        if target.exists():
            set_aside(target)
        disk.rename(temporary, target)
    disk.sync_folder(target.parent)
    hint = target.parent / f"{TEMPORARY}LATEST"
    with suppress(OSError):  # for people and scripts; nothing here reads it
        disk.write_file(hint, [f"{target.name}\n".encode()])
        disk.rename(hint, target.parent / "LATEST")


def set_aside(path: Path) -> Path:
    """Move a damaged checkpoint out of the way, for whoever wants to look at it; returns its new place."""
    quarantine = path.parent / QUARANTINE
    quarantine.mkdir(exist_ok=True)
    attempt = sum(1 for _ in quarantine.glob(f"{path.name}-*"))
    disk.rename(path, quarantine / f"{path.name}-{attempt}")
    return quarantine / f"{path.name}-{attempt}"


def published(folder: Path) -> list[Path]:
    """Checkpoint directories that have a manifest, newest step first. Names and times on disk decide nothing else."""
    found = [path for path in folder.glob(f"{_STEP_PREFIX}*") if (path / MANIFEST).exists()]
    return sorted((path for path in found if path.name[len(_STEP_PREFIX) :].isdecimal()), reverse=True)


def newest_valid(
    folder: Path, ranks: Ranks | None = None, *, show: bool = False
) -> tuple[Checkpoint | None, dict[Path, str]]:
    """The newest checkpoint that verifies, and why every newer one does not; several ranks share the hashing.

    Args:
        show: the progress, of checkpoints that take more than a moment.
    """
    ranks = ranks or Alone()
    rejected: dict[Path, str] = {}
    for path in ranks.share(published(folder)):
        checkpoint, fault = None, None
        try:
            checkpoint = look(path)
            n_bytes = sum(entry["bytes"] for entry in checkpoint.manifest["files"].values()) // ranks.world_size
            with show_step(f"verifying {path.name}", n_bytes, visible=show and n_bytes > SHOWN_BYTES) as advance:
                verify(checkpoint, ranks.rank, ranks.world_size, advance)
        except CheckpointError as error:
            fault = str(error)
        faults = [fault for fault in ranks.collect(fault) if fault is not None]
        if not faults:
            return checkpoint, rejected
        rejected[path] = faults[0]
    return None, rejected


def read(path: Path) -> Checkpoint:
    """A checkpoint of which every byte has been verified.

    Raises:
        CheckpointError: anything that does not verify.
    """
    checkpoint = look(path)
    verify(checkpoint)
    return checkpoint


def verify(
    checkpoint: Checkpoint, rank: int = 0, world_size: int = 1, advance: Callable[[int], None] = lambda n_bytes: None
) -> None:
    """Compare files with their hashes: all of them, or a rank's share; `advance` is told of bytes as they are done.

    Raises:
        CheckpointError: a file is missing, is of another size or has another hash, or there are more of them.
    """
    files = checkpoint.manifest["files"]
    strangers = sorted({path.name for path in checkpoint.path.glob("*.safetensors")} - files.keys())
    if strangers:
        raise CheckpointError(f"{checkpoint.path / strangers[0]}: the manifest knows no such file")
    for name, entry in sorted(files.items())[rank::world_size]:
        path, hasher = checkpoint.path / name, hashlib.sha256()
        with opened(path) as (descriptor, size):
            if size != entry["bytes"]:
                raise CheckpointError(f"{path}: {size} bytes, the manifest says {entry['bytes']}")
            while data := os.read(descriptor, disk.CHUNK_BYTES):
                hasher.update(data)
                advance(len(data))
        if hasher.hexdigest() != entry["sha256"]:
            raise CheckpointError(f"{path}: sha256 is {hasher.hexdigest()}, the manifest says {entry['sha256']}")


def look(path: Path) -> Checkpoint:
    """A checkpoint by its manifest alone: that is whole, and its slices cover every tensor exactly once.

    Raises:
        CheckpointError: missing, not as it was written, of another format version, or naming files elsewhere.
    """
    file = path / MANIFEST
    manifest = unseal(file, FORMAT_VERSION)
    slices: dict[Key, dict[Shard | None, list[Slice]]] = {}
    try:
        if directory_of(path.parent, manifest["step"]).name != path.name:
            raise ValueError(f"it belongs to step {manifest['step']}")
        ends = dict.fromkeys(manifest["files"], 0)
        for name in ends:
            if Path(name).name != name or "\0" in name:
                raise ValueError(f"a file outside its directory: {name}")
        for values in manifest["slices"]:
            entry = Slice(**values)
            entry = entry._replace(shard=None if entry.shard is None else Shard(*entry.shard))
            if entry.offset < ends[entry.file] or entry.length < 1:
                raise ValueError(f"{entry.name} lies over other slices")
            ends[entry.file] = entry.offset + entry.n_bytes
            slices.setdefault((entry.name, entry.kind), {}).setdefault(entry.shard, []).append(entry)
        if any(end > manifest["files"][name]["bytes"] for name, end in ends.items()):
            raise ValueError("slices go beyond the ends of files")
        for (name, _), shards in slices.items():
            for entries in shards.values():
                entries.sort(key=lambda entry: entry.start)
            ranges = {shard: [(e.start, e.length) for e in entries] for shard, entries in shards.items()}
            check_cover(manifest["tensors"][name], ranges)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise CheckpointError(f"{file}: malformed ({type(error).__name__}: {error})") from error
    return Checkpoint(path, manifest, slices)


def _is_valid(target: Path) -> bool:
    try:
        read(target)
    except CheckpointError:
        return False
    return True
