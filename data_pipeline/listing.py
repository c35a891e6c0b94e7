"""Which files of text files, folders, globs and URLs hold, in one order, and none passed over without a word."""

from __future__ import annotations

import errno
import glob
import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.remote import connect, shown_url
from transmamba.data_pipeline.sources import PACKINGS, READABLE, SourceFile, damaged, is_url, is_web, kind_of
from transmamba.data_pipeline.text import nearest_existing

# What file systems call the property of a file that changes with its content.
_STAMPS = ("ETag", "etag", "md5Hash", "Content-MD5", "mtime", "LastModified", "Last-Modified", "updated", "created")
# What the system answers for a link to nothing, below a file, and to itself.
_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_SHOWN_SUFFIXES = 8


@dataclass(frozen=True, slots=True)
class TextFiles:
    """Files to read, each once, and how many files of other kinds the folders and globs held, by their suffixes."""

    files: tuple[SourceFile, ...]
    skipped: Counter[str]

    @property
    def n_skipped(self) -> int:
        """Files of other kinds."""
        return self.skipped.total()

    def skipped_words(self) -> str:
        """Such as "2 .html, 1 .csv.gz", the most frequent first."""
        return _in_words(self.skipped)


def find_files(sources: list[str]) -> TextFiles:
    """List the text files of files, folders (recursively), globs and URLs of any of these.

    Sources keep their order; inside one, paths are sorted by their parts. A file reached twice is read once. Links to
    folders are followed, and folders that a glob matches are searched.

    Raises:
        DataError: a source does not exist or matches nothing, a named file has an unknown suffix, a folder or file may
            not be read, a link points to nothing, a file is a pipe, a packed file has no bytes, a package for a URL
            is missing, or a source holds no text file.
    """
    if "" in sources:
        fix = "name files, folders, globs or URLs; is a variable unset?"
        raise DataError("sources", "'' names nothing", fix)
    found: dict[str, SourceFile] = {}
    skipped: Counter[str] = Counter()
    for source in sources:
        others: Counter[str] = Counter()
        is_empty = True
        for identity, file in _list_remote(source) if is_url(source) else _list_local(source):
            if file is None:
                others[_suffix_of(identity)] += 1
            else:
                _refuse_nothing(file)
                found.setdefault(identity, file)
                is_empty = False
        if is_empty:
            words = f" (files of other kinds: {_in_words(others)})" if others else ""
            fix = f"give files that end in {READABLE}, or leave it out"
            raise DataError(shown_url(source), f"no documents found{words}", fix)
        skipped += others
    return TextFiles(tuple(found.values()), skipped)


def _list_local(source: str) -> Iterator[tuple[str, SourceFile | None]]:
    try:
        for path in _paths_of(source):
            # Unlike the system it gets through any number of links, of which a pattern with ** may leave many.
            place = os.path.realpath(path)
            mode = _stat(path, place).st_mode
            kind = kind_of(path.name)
            if not stat.S_ISREG(mode):
                if kind and not stat.S_ISDIR(mode):
                    raise _irregular(path)
            elif kind is None:
                yield str(path), None
            else:
                yield place, _local_file(path, kind)
    except OSError as error:
        name = os.fsdecode(error.filename or source)
        problem = f"cannot be read ({error.strerror})"
        raise DataError(name, problem, "check its permissions, mount it, or leave it out") from error


def _local_file(path: Path, kind: tuple[str, str]) -> SourceFile:
    stat_of = path.stat()
    if not os.access(path, os.R_OK):
        fix = f"chmod it or ask its owner (user id {stat_of.st_uid})"
        raise DataError(str(path), "may not be read by you", fix)
    return SourceFile(str(path), *kind, stat_of.st_size, str(stat_of.st_mtime_ns))


def _paths_of(source: str) -> list[Path]:
    """Paths of a file, folder or glob, sorted by their parts."""
    path = Path(source)
    if path.is_dir():
        return _walk(path)
    if path.is_file():
        _check_kind(source)
        return [path]
    if path.exists():
        raise _irregular(path)
    if path.is_symlink():
        # To nothing, which is found where it is looked at.
        return [path]
    if not glob.has_magic(source):
        raise DataError(source, "no such file or folder", nearest_existing(path))
    _refuse_unlisted(source)
    matches = [Path(match) for match in glob.glob(source, recursive=True)]
    # What lies below a folder is a match of its own then.
    is_searched = os.path.basename(source) == "**"
    found = {below for match in matches for below in (_walk(match) if match.is_dir() and not is_searched else [match])}
    if all(match.is_dir() for match in found):
        raise DataError(source, "the pattern matches no file", "quote it and check the folder part")
    return sorted(found)


def _walk(folder: Path) -> list[Path]:
    """Paths of what is below a folder and is no folder, sorted by their parts.

    Links to folders are followed once, after everything else, so that they hide no folder behind another name.
    """
    paths: list[Path] = []
    seen: set[str] = set()
    waiting = [folder]
    while waiting:
        links: list[Path] = []
        for root, folders, names in os.walk(waiting.pop(0), onerror=_raise):
            place = os.path.realpath(root)
            if place in seen:
                folders.clear()
                continue
            seen.add(place)
            folders.sort()
            links += [path for path in (Path(root, name) for name in folders) if path.is_symlink()]
            paths += [Path(root, name) for name in names]
        waiting += sorted(links)
    return sorted(paths)


def _refuse_unlisted(pattern: str) -> None:
    """Raise where `glob` passes over a folder that it may not list."""
    above = os.path.dirname(pattern)
    if glob.has_magic(above):
        _refuse_unlisted(above)
    for folder in glob.glob(above, recursive=True):
        if os.path.isdir(folder):
            os.scandir(folder).close()


def _raise(error: OSError) -> None:
    raise error


def _stat(path: Path, place: str) -> os.stat_result:
    """Of what is at `place`, where the links of `path` lead."""
    try:
        return os.stat(place)
    except OSError as error:
        if error.errno not in _NOTHING_THERE or not path.is_symlink():
            raise
        problem = f"is a link to {os.readlink(path)}, where nothing is"
        raise DataError(str(path), problem, "mount or fetch that, or remove the link") from error


def _irregular(path: Path) -> DataError:
    problem = "is no regular file, and text is read twice"
    return DataError(str(path), problem, "write its text into a file first")


def _in_words(suffixes: Counter[str]) -> str:
    counts = sorted((-n, suffix or "without suffix") for suffix, n in suffixes.items())
    words = [f"{-n:,} {suffix}" for n, suffix in counts]
    return ", ".join([*words[:_SHOWN_SUFFIXES], *(["..."] if len(words) > _SHOWN_SUFFIXES else [])])


def _suffix_of(name: str) -> str:
    stem, suffix = os.path.splitext(os.path.basename(name).lower())
    return os.path.splitext(stem)[1] + suffix if suffix in PACKINGS else suffix


def _refuse_nothing(file: SourceFile) -> None:
    """The commonest remains of a failed download; of a web server's files the length may not be known."""
    if file.packing and not file.n_bytes and file.can_seek:
        raise damaged(file, "0 bytes")


def _list_remote(source: str) -> Iterator[tuple[str, SourceFile | None]]:
    shown = shown_url(source)
    files, path = connect(source)
    infos: dict[str, Any]
    try:
        if glob.has_magic(urlsplit(source).path):
            infos = cast(dict[str, Any], files.glob(path, detail=True))
            if not path.endswith("**"):
                for folder in [name for name, info in infos.items() if info["type"] == "directory"]:
                    infos |= cast(dict[str, Any], files.find(folder, detail=True))
            if not any(info["type"] == "file" for info in infos.values()):
                raise DataError(shown, "the pattern matches no file", "quote it and check the folder part")
        elif kind_of(urlsplit(source).path) or files.isfile(path):
            _check_kind(urlsplit(source).path)
            infos = {path: files.info(path)}
        elif files.isdir(path):
            infos = cast(dict[str, Any], files.find(path, detail=True))
        else:
            raise FileNotFoundError(source)
    except DataError:
        raise
    except FileNotFoundError as error:
        # What a web server answered, which fsspec takes for the same.
        status = getattr(error.__cause__, "status", 404)
        if status not in (404, 410):
            problem = f"cannot be read (the server answers with status {status})"
            raise DataError(shown, problem, "check the URL and the credentials") from error
        raise DataError(shown, "no such file or folder", "check the URL") from error
    except Exception as error:  # every file system raises kinds of its own
        problem = f"cannot be listed ({type(error).__name__}: {error})"
        raise DataError(shown, problem, "check the URL, the network and the credentials") from error
    for name, info in sorted(infos.items()):
        url = source if name == path else files.unstrip_protocol(name)
        kind = kind_of(urlsplit(url).path)
        if info["type"] == "file":
            yield url, None if kind is None else _remote_file(url, kind, info)


def _remote_file(url: str, kind: tuple[str, str], info: dict[str, Any]) -> SourceFile:
    size = info.get("size")
    stamp = next((str(info[key]) for key in _STAMPS if info.get(key)), "")
    # Whether a web server sends parts of files shows only when it is asked for one.
    can_seek = size is not None and not is_web(url)
    return SourceFile(url, *kind, size or 0, stamp, can_seek)


def _check_kind(name: str) -> None:
    if kind_of(name) is None:
        suffix = os.path.splitext(name)[1]
        raise DataError(shown_url(name), f"unknown kind of file {suffix!r}", f"use {READABLE}")
