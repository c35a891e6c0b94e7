"""The folder beside the target in which data are prepared, so that an interrupted preparation can go on."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.records import load_record, save_record

_LOCK, _PLAN = "lock", "plan.json"
# Member of the plan that is no part of it.
_FILES = "files"


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


def begin(
    folder: Path, plan: dict[str, object], *, files: Sequence[object] = (), keep: Collection[str] = ()
) -> list[str]:
    """Keep what an earlier run with the same plan has done, or clear the folder.

    Args:
        folder: held.
        plan: everything that the result depends on, by name; JSON.
        files: what `files_before` is to give to a later run; JSON.
        keep: paths of files in it that stay in any case.

    Returns:
        as `differences`.
    """
    digests = _digests(plan)
    earlier = _earlier(folder)
    if {name: digest for name, digest in earlier.items() if name != _FILES} == digests:
        if _FILES not in earlier:  # begun by a version that did not write them down
            save_record(folder / _PLAN, {**digests, _FILES: list(files)})
        return []
    changed = differences(folder, plan)
    _clear(folder, keep)
    save_record(folder / _PLAN, {**digests, _FILES: list(files)})
    return changed


def differences(folder: Path, plan: dict[str, object]) -> list[str]:
    """The names in which the earlier run's plan differs; empty when there was none or it is the same."""
    earlier = _earlier(folder)
    return [name for name, digest in _digests(plan).items() if earlier and earlier.get(name) != digest]


def has_finished_work(folder: Path) -> bool:
    """Whether an earlier run left a record of anything that it finished."""
    return any(path.name != _PLAN for path in folder.glob("*.json"))


def files_before(folder: Path) -> list[Any]:
    """What the earlier run gave `begin` as its files."""
    return _earlier(folder).get(_FILES, [])


def _earlier(folder: Path) -> dict[str, Any]:
    try:
        return load_record(folder / _PLAN)
    except (OSError, ValueError):
        return {}


def _digests(plan: dict[str, object]) -> dict[str, str]:
    return {name: hashlib.sha256(json.dumps(value).encode("utf-8")).hexdigest() for name, value in plan.items()}


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
