"""The folder beside the target in which data are prepared, so that an interrupted preparation can go on."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.records import load_record, save_record

_LOCK, _PLAN = "lock", "plan.json"


def work_folder_of(out: Path) -> Path:
    """Where the data for `out` are prepared."""
    # A target such as "." has its name only in its absolute form.
    out = Path(os.path.abspath(out))
    return out.with_name(f".{out.name}.work")


@contextmanager
def hold_work_folder(out: Path) -> Iterator[Path]:
    """Make the work folder of a target, or take over what an interrupted run left, and let nobody else use it.

    It stays when the block ends, whatever ended it; see `remove_work_folder`.

    Raises:
        DataError: another process prepares the same target, or the folder cannot be made.
    """
    folder = work_folder_of(out)
    with _locked(folder, out):
        yield folder


def remove_work_folder(folder: Path) -> None:
    """Remove it, while it is held."""
    with contextlib.suppress(OSError):
        _clear(folder)
        # Last, so that nobody who takes the folder over loses files of his own.
        (folder / _LOCK).unlink()
        folder.rmdir()


def leave_work_folder(folder: Path) -> None:
    """Remove it, while it is held, unless there is work in it to go on with."""
    if not (folder / _PLAN).exists():
        remove_work_folder(folder)


def begin(folder: Path, plan: dict[str, object], *, keep: Collection[str] = ()) -> list[str]:
    """Keep what an earlier run with the same plan has done, or clear the folder.

    Args:
        folder: held.
        plan: everything that the result depends on, by name; JSON.
        keep: paths of files in it that stay in any case.

    Returns:
        The names in which the earlier run's plan differs; empty when there was none or it is the same.
    """
    digests = {name: hashlib.sha256(json.dumps(value).encode("utf-8")).hexdigest() for name, value in plan.items()}
    try:
        earlier = load_record(folder / _PLAN)
    except (OSError, ValueError):
        earlier = {}
    if earlier == digests:
        return []
    _clear(folder, keep)
    save_record(folder / _PLAN, dict(digests))
    return [name for name in digests if earlier and earlier.get(name) != digests[name]]


def _clear(folder: Path, keep: Collection[str] = ()) -> None:
    # First of all what says that the rest is complete: a kill may leave any part of it.
    (folder / _PLAN).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _LOCK and str(path) not in keep:
            path.unlink()


@contextmanager
def _locked(folder: Path, out: Path) -> Iterator[None]:
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = (folder / _LOCK).open("ab")
        except OSError as error:
            problem = f"cannot be made ({error.strerror})"
            raise DataError(str(out), problem, "choose a folder that you can write") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                fix = "wait for it, or choose another --out"
                raise DataError(str(out), "another process is preparing it", fix) from error
            if _is_still_there(file, folder / _LOCK):
                yield
                return


def _is_still_there(file: BinaryIO, path: Path) -> bool:
    """Whether the locked file is still the one at the path: its last holder may have removed it in between."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
