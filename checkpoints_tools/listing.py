"""Which checkpoints a run has, and whether every byte of them is the one that was written."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transmamba.checkpoint import Checkpoint, directory_of, look, newest_valid, published, verify
from transmamba.data_pipeline.progress import show_step
from transmamba.errors import EXIT_NO_VALID_CHECKPOINT, ConfigError, Problem, RunError
from transmamba.sealed import CheckpointError


@dataclass(frozen=True)
class Entry:
    """One published checkpoint; `fault` says why it must not be used."""

    path: Path
    step: int
    tokens: int
    n_bytes: int
    fault: str | None = None


def entries(run_dir: Path, *, deep: bool, show: bool = False) -> Iterator[Entry]:
    """Every checkpoint of a run, newest first; `deep` reads and verifies all of it, otherwise sizes are compared.

    Args:
        show: the progress of what is read.

    Raises:
        ConfigError: the folder has no checkpoints.
    """
    paths = published(run_dir / "checkpoints")
    if not paths:
        raise ConfigError([Problem("RUN_DIR", "it has no checkpoints", run_dir, "give a run folder")])
    for path in paths:
        try:
            yield _entry(path, deep, show)
        except CheckpointError as error:
            yield Entry(path, int(path.name.removeprefix("step-")), 0, 0, str(error))


def _entry(path: Path, deep: bool, show: bool) -> Entry:
    checkpoint = look(path)
    files = checkpoint.manifest["files"]
    n_bytes = sum(file["bytes"] for file in files.values())
    if deep:
        with show_step(f"reading {path.name}", n_bytes, visible=show) as advance:
            verify(checkpoint, advance=advance)
    for name, file in files.items():
        size = (path / name).lstat().st_size if (path / name).exists() else None
        if size != file["bytes"]:
            raise CheckpointError(f"{path / name}: {size} bytes, the manifest says {file['bytes']}")
    return Entry(path, checkpoint.step, checkpoint.manifest.get("tokens_seen", 0), n_bytes)


def chosen(place: Path, step: int | None = None) -> Checkpoint:
    """The checkpoint that a user means: a checkpoint folder, or of a run folder the newest valid one or that of `step`.

    Its manifest is verified; tensors are when they are read.

    Raises:
        ConfigError: there is none.
        RunError: it must not be used (exit 21).
    """
    path = place if step is None else directory_of(place / "checkpoints", step)
    try:
        if (path / "manifest.json").exists():
            return look(path.absolute())
        if step is not None:
            steps = ", ".join(str(entry.step) for entry in entries(place, deep=False))
            raise ConfigError([Problem("--step", f"{place} has no checkpoint of it", step, f"give one of {steps}")])
        if not published(place / "checkpoints"):
            fix = "give a run folder or one of its checkpoints"
            raise ConfigError([Problem("RUN_DIR", "it has no checkpoints", place, fix)])
        found, rejected = newest_valid((place / "checkpoints").absolute(), show=True)
    except CheckpointError as error:
        raise unusable(error) from error
    if found is None:
        raise unusable(next(iter(rejected.values())))
    return found


def unusable(reason: object) -> RunError:
    """Why a checkpoint must not be used, as the commands tell it."""
    return RunError(
        EXIT_NO_VALID_CHECKPOINT, f"checkpoint: {reason}. Fix: take another step, or restore it from a copy"
    )
