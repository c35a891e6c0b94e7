"""A disk that loses its power: what may be left of a recorded sequence of changes.

The medium holds the bytes of a file since its last fsync and the names in a folder since that folder's. Of everything
later each change may or may not have arrived, and the bytes of a file may end anywhere or be zeros.
"""

import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from transmamba import disk


class File:
    """Bytes as programs see them, and as they are on the medium."""

    def __init__(self) -> None:
        self.now, self.safe = bytearray(), b""

    def after(self, draw: random.Random) -> bytes:
        """What a cut leaves."""
        if self.safe == self.now:
            return self.safe
        cut = bytes(self.now[: draw.randrange(len(self.now) + 1)])
        return draw.choice((self.safe, cut, bytes(len(self.now)), cut + bytes(len(self.now) - len(cut))))


class Folder:
    """Names as programs see them, those on the medium, and the changes since: old name or "", new name or "", what."""

    def __init__(self) -> None:
        self.now: dict[str, Any] = {}
        self.safe: dict[str, Any] = {}
        self.since: list[tuple[str, str, Any]] = []

    def change(self, old: str, new: str, what: Any = None) -> None:
        """Give `what`, or that of the name `old`, the name `new`; an empty name is no place."""
        self.since.append((old, new, what))
        _apply(self.now, old, new, what)

    def after(self, draw: random.Random) -> dict[str, Any]:
        """What a cut leaves."""
        names = dict(self.safe)
        for change in self.since:
            if draw.random() < 0.5:
                _apply(names, *change)
        return names


def _apply(names: dict[str, Any], old: str, new: str, what: Any) -> None:
    found = names.pop(old, None) if old else what
    if new and found is not None:
        names[new] = found


class Recorder:
    """Notes what the package does to the disk below `root`, while it is done."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch):
        self.root = root
        self.log: list[tuple[Any, ...]] = []
        for name in ("make_folder", "rename", "remove", "sync_folder"):
            patch.setattr(disk, name, self._noting(name, getattr(disk, name)))
        patch.setattr(disk, "write_file", self._writing(disk.write_file))
        for name in ("write_chunk", "sync"):
            patch.setattr(disk, name, self._on_descriptor(name, getattr(disk, name)))

    def say(self, what: str, value: Any) -> None:
        """Put a remark between the changes."""
        self.log.append((what, value))

    def _noting(self, name: str, whole: Any) -> Any:
        def noted(*paths: Path) -> None:
            whole(*paths)
            self.log.append((name, *paths))

        return noted

    def _writing(self, whole: Any) -> Any:
        def noted(path: Path, parts: Iterable[Any]) -> None:
            self.log.append(("create", path))
            whole(path, parts)

        return noted

    def _on_descriptor(self, name: str, whole: Any) -> Any:
        def noted(descriptor: int, *data: memoryview) -> None:
            whole(descriptor, *data)
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            if not path.is_dir():
                self.log.append((name, path, *map(bytes, data)))

        return noted

    def cut(self, n_changes: int, draw: random.Random, into: Path) -> dict[str, Any]:
        """Write into `into` what the first changes leave after a cut; returns the last value of every remark."""
        root, remarks = Folder(), {}

        def at(path: Path) -> tuple[Folder, str]:
            folder = root
            for name in path.relative_to(self.root).parts[:-1]:
                folder = folder.now[name]
            return folder, path.name

        for name, *arguments in self.log[:n_changes]:
            if name not in CHANGES:
                remarks[name] = arguments[0]
                continue
            path, *rest = arguments
            if name == "sync_folder":
                if path == self.root or self.root in path.parents:
                    folder, _ = at(path / "any")
                    folder.safe, folder.since = dict(folder.now), []
                continue
            folder, own = at(path)
            CHANGES[name](folder, own, *rest)
        _write(root, draw, into)
        return remarks


def _create(folder: Folder, name: str) -> None:
    if name in folder.now:
        folder.now[name].now.clear()
    else:
        folder.change("", name, File())


def _make(folder: Folder, name: str) -> None:
    if name in folder.now:
        _remove(folder, name)
    folder.change("", name, Folder())


def _remove(folder: Folder, name: str) -> None:
    gone = folder.now[name]
    for inner in list(gone.now) if isinstance(gone, Folder) else ():
        gone.change(inner, "")
    folder.change(name, "")


def _sync(folder: Folder, name: str) -> None:
    folder.now[name].safe = bytes(folder.now[name].now)


CHANGES: dict[str, Any] = {
    "make_folder": _make,
    "create": _create,
    "write_chunk": lambda folder, name, data: folder.now[name].now.extend(data),
    "sync": _sync,
    "sync_folder": None,
    "rename": lambda folder, name, new: folder.change(name, new.name),
    "remove": _remove,
}


def _write(folder: Folder, draw: random.Random, into: Path) -> None:
    into.mkdir(parents=True)
    for name, what in folder.after(draw).items():
        if isinstance(what, Folder):
            _write(what, draw, into / name)
        else:
            (into / name).write_bytes(what.after(draw))
