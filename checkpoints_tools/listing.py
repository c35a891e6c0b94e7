"""Which checkpoints a run has, and whether every byte of them is the one that was written."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transmamba.checkpoint import CheckpointError, published, read, read_manifest
from transmamba.errors import ConfigError, Problem


@dataclass(frozen=True)
class Entry:
    """One published checkpoint; `fault` says why it must not be used."""

    path: Path
    step: int
    tokens: int
    n_bytes: int
    fault: str | None = None


def entries(run_dir: Path, *, deep: bool) -> Iterator[Entry]:
    """Every checkpoint of a run, newest first; `deep` reads and verifies all of it, otherwise sizes are compared.

    Raises:
        ConfigError: the folder has no checkpoints.
    """
    paths = published(run_dir / "checkpoints")
    if not paths:
        raise ConfigError([Problem("RUN_DIR", "it has no checkpoints", run_dir, "give a run folder")])
    for path in paths:
        try:
            yield _entry(path, deep)
        except CheckpointError as error:
            yield Entry(path, int(path.name.removeprefix("step-")), 0, 0, str(error))


def _entry(path: Path, deep: bool) -> Entry:
    manifest = read(path).manifest if deep else read_manifest(path)
    n_bytes = 0
    for name, file in manifest["files"].items():
        size = (path / name).stat().st_size if (path / name).exists() else None
        if size != file["bytes"]:
            raise CheckpointError(f"{path / name}: {size} bytes, the manifest says {file['bytes']}")
        n_bytes += file["bytes"]
    return Entry(path, manifest["step"], manifest["tokens_seen"], n_bytes)
