"""A folder that appears whole or not at all: written aside, flushed, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.manifest import FORMAT, MANIFEST_NAME

_OWN_SUFFIXES = (".tar", ".json", ".blocks")


def check_target(out: Path, *, keep: bool = False) -> None:
    """Refuse a target that would destroy something that is not prepared data.

    Args:
        keep: refuse prepared data too.

    Raises:
        DataError: `out` is a file, or a folder with anything else than prepared data in it.
    """
    fix = "choose another --out or empty it"
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise DataError(str(out), "exists and is not a folder", fix)
    names = sorted(path.name for path in out.iterdir()) if out.exists() else []
    if not names:
        return
    foreign = [name for name in names if not name.endswith(_OWN_SUFFIXES)]
    if foreign or not _has_own_manifest(out):
        raise DataError(str(out), f"is not empty and holds other files ({(foreign or names)[0]})", fix)
    if keep:
        raise DataError(str(out), "holds prepared data", "choose another --out, or give --replace to lose them")


@contextlib.contextmanager
def publish_folder(out: Path, *, replace: bool) -> Iterator[Path]:
    """Yield an empty folder next to `out` to write into; when the block succeeds it becomes `out`.

    Args:
        out: the final place.
        replace: True replaces prepared data that is there; False leaves it and throws the new away, which is
            right when several processes build the same content.

    Raises:
        DataError: the parent folder cannot be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        problem = f"cannot be made ({error.strerror})"
        raise DataError(str(out), problem, "choose a folder that you can write") from error
    try:
        new = aside / "new"
        new.mkdir()
        yield new
        move_into_place(new, out, aside / "old", replace=replace)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def move_into_place(new: Path, out: Path, old: Path, *, replace: bool) -> None:
    """Flush a complete folder to disk and rename it to `out`; what was there is moved to `old`.

    Args:
        new: the folder, on the same file system.
        out: the final place.
        old: a name that is free.
        replace: as for `publish_folder`; where it is False and `out` exists, `new` stays.
    """
    for path in (*new.iterdir(), new):
        flush(path)
    _move(new, out, old, replace=replace)
    flush(out.parent)


def settle_replacement(out: Path, old: Path) -> None:
    """End what a killed `move_into_place` has begun: the old folder is put back, unless the new one is in its place."""
    if old.exists() and not out.exists():
        old.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder so that nobody sees half of it; another process may remove it at the same time."""
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    with contextlib.suppress(FileNotFoundError):
        folder.rename(aside / "old")
    shutil.rmtree(aside, ignore_errors=True)


def _move(new: Path, out: Path, old: Path, *, replace: bool) -> None:
    if replace and out.exists():
        out.rename(old)
    try:
        new.rename(out)
    except OSError:
        # Another process was first, with the same content.
        if replace or not out.is_dir():
            raise


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _has_own_manifest(folder: Path) -> bool:
    try:
        record = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("format") == FORMAT
