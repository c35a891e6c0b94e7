"""Checkpoints: named global tensors in slices, safetensors files, one JSON manifest. No pickle anywhere.

A checkpoint is written into a temporary directory, its files are fsynced, the manifest comes last, and one rename
publishes it. A directory without a valid manifest does not exist. Every load verifies every byte it uses.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load as decode_safetensors
from safetensors.torch import save as encode_safetensors
from torch import Tensor

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
FILE_BYTES = 1 << 30  # a file is closed when it holds this much
_STEP_PREFIX = "step-"
_TEMPORARY = ".tmp-"


class Piece(NamedTuple):
    """A contiguous range of one flattened global tensor of one kind, on its way to disk.

    Kinds: "master" (float32 weight), "exp_avg", "exp_avg_sq" (Adam's moments), "buffer" (saved, not trained) and
    "weight" (a value under its usual name that training holds in parts).
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    values: Tensor


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


def save(folder: Path, step: int, pieces: Iterable[Piece], record: dict[str, Any]) -> Path:
    """Write and publish the checkpoint of `step`; a valid one that is already there is left alone.

    Args:
        folder: the run's checkpoint folder.
        step: optimizer steps done.
        pieces: this process's slices, read once, in order.
        record: JSON values that go into the manifest beside the format's own keys.

    Returns:
        The published directory.

    Raises:
        StorageError: the file system refused; nothing was published and nothing older was touched.
    """
    target = directory_of(folder, step)
    if (target / MANIFEST).exists():
        try:
            read(target)
            return target
        except CheckpointError:
            _set_aside(target)
    temporary = folder / f"{_TEMPORARY}{target.name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        manifest = {
            "format_version": FORMAT_VERSION,
            "step": step,
            **record,
            **_write_files(temporary, pieces),
        }
        _write_durably(temporary / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True).encode())
        _sync_directory(temporary)
        temporary.rename(target)
        _sync_directory(folder)
        hint = folder / f"{_TEMPORARY}LATEST"
        _write_durably(hint, f"{target.name}\n".encode())
        hint.rename(folder / "LATEST")
    except OSError as error:
        raise StorageError(f"{target}: {error.strerror or error}") from error
    return target


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
        tensors: dict[tuple[str, str], Tensor] = {}
        covered: dict[tuple[str, str], int] = {}
        for entry in sorted(manifest["slices"], key=lambda entry: entry["start"]):
            values = contents[entry["file"]][entry["key"]]
            if _digest(values) != entry["sha256"]:
                raise CheckpointError(f"{path / entry['file']}: slice {entry['key']} does not match its digest")
            tensor = (entry["name"], entry["kind"])
            n_values = torch.Size(manifest["tensors"][entry["name"]]).numel()
            whole = tensors.setdefault(tensor, torch.empty(n_values, dtype=values.dtype))
            if entry["start"] != covered.get(tensor, 0) or entry["start"] + values.numel() > n_values:
                raise CheckpointError(f"{path / MANIFEST}: slices of {entry['name']} leave a hole or overlap")
            whole[entry["start"] : entry["start"] + values.numel()] = values
            covered[tensor] = entry["start"] + values.numel()
        for tensor, whole in tensors.items():
            if covered[tensor] != whole.numel():
                raise CheckpointError(f"{path / MANIFEST}: slices of {tensor[0]} end early")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST}: malformed ({type(error).__name__}: {error})") from error
    return Checkpoint(path, manifest, tensors)


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


def _write_files(folder: Path, pieces: Iterable[Piece]) -> dict[str, Any]:
    """Write the slices into files of bounded size; returns the manifest's `tensors`, `slices` and `files`."""
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
        return f"state-{len(files):05d}.safetensors"

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
