"""Where text comes from: files, folders, globs and URLs, listed in one order and opened as streams of bytes."""

from __future__ import annotations

import glob
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.remote import connect, shown_url
from transmamba.data_pipeline.text import nearest_existing

JSON_LINES, PARQUET = ".jsonl", ".parquet"
TEXT_KINDS = (".txt", ".md", JSON_LINES)
PACKINGS = {".gz": "gzip", ".zst": "zstd"}
READABLE = ", ".join((*TEXT_KINDS, PARQUET)) + " (the text kinds also as .gz or .zst)"
# What file systems call the property of a file that changes with its content.
_STAMPS = ("ETag", "etag", "md5Hash", "Content-MD5", "mtime", "LastModified", "Last-Modified", "updated", "created")
_REMOTE_BLOCK_BYTES = 8 << 20


class UnreadableSource(DataError):  # noqa: N818, named after what it is about
    """A source that could not be read to its end, maybe only now."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of text.

    `kind` is the suffix that says how it is read, `packing` "gzip", "zstd" or "". `n_bytes` is its size as stored,
    `stamp` changes when the file does. `can_seek` is False where bytes come only from the beginning on.
    """

    place: str
    kind: str
    packing: str
    n_bytes: int
    stamp: str
    can_seek: bool = True


@dataclass(frozen=True, slots=True)
class TextFiles:
    """Files to read, each once, and how many files of other kinds the folders and globs held."""

    files: tuple[SourceFile, ...]
    n_skipped: int


def find_files(sources: list[str]) -> TextFiles:
    """List the text files of files, folders (recursively), globs and URLs of any of these.

    Sources keep their order; inside one, paths are sorted by their parts. A file reached twice is read once.

    Raises:
        DataError: a source does not exist or matches nothing, a named file has an unknown suffix or may not be read,
            a package for its URL is missing, or no text file is left.
    """
    found: dict[str, SourceFile] = {}
    n_skipped = 0
    for source in sources:
        candidates = _list_remote(source) if is_url(source) else _list_local(source)
        for identity, file in candidates:
            if file is None:
                n_skipped += 1
            else:
                found.setdefault(identity, file)
    if not found:
        shown = ", ".join(map(shown_url, sources)) or "sources"
        problem = f"no documents found ({n_skipped} files of other kinds)"
        raise DataError(shown, problem, f"give files that end in {READABLE}")
    return TextFiles(tuple(found.values()), n_skipped)


def is_url(source: str) -> bool:
    """Whether fsspec is to open it."""
    return "://" in source


def _is_web(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def kind_of(name: str) -> tuple[str, str] | None:
    """Kind and packing of a file by its name, or None for files that hold no text."""
    stem, suffix = os.path.splitext(name.lower())
    packing = PACKINGS.get(suffix, "")
    kind = os.path.splitext(stem)[1] if packing else suffix
    return (kind, packing) if kind in TEXT_KINDS or (kind == PARQUET and not packing) else None


@contextmanager
def open_source(file: SourceFile) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Open a file: its unpacked content, and the stored bytes beneath, whose `tell` says how far it is read.

    Raises:
        DataError: the packing is damaged, or the file ends too early.
        UnreadableSource: the file cannot be opened or read.
    """
    with _named(file), _open_raw(file.place, file.kind) as raw:
        if not file.packing:
            yield raw, raw
            return
        import pyarrow

        # It tells a truncated stream from a complete one, in both packings, and goes on over joined ones.
        unpacked = pyarrow.CompressedInputStream(raw, file.packing)
        yield cast(BinaryIO, io.BufferedReader(cast(Any, unpacked), 1 << 20)), raw


def _list_local(source: str) -> Iterator[tuple[str, SourceFile | None]]:
    path = Path(source)
    if path.is_file():
        _check_kind(source)
        candidates = [path]
    elif path.is_dir():
        candidates = _walk(path)
    elif glob.has_magic(source):
        matches = sorted(Path(match) for match in glob.glob(source, recursive=True))
        candidates = [match for match in matches if match.is_file()]
        if not candidates:
            raise DataError(source, "the pattern matches no file", "quote it and check the folder part")
    else:
        raise DataError(source, "no such file or folder", nearest_existing(path))
    for candidate in candidates:
        kind = kind_of(candidate.name)
        if kind is None:
            yield str(candidate), None
            continue
        if not os.access(candidate, os.R_OK):
            fix = f"chmod it or ask its owner (user id {candidate.stat().st_uid})"
            raise DataError(str(candidate), "may not be read by you", fix)
        stat = candidate.stat()
        stamp = str(stat.st_mtime_ns)
        yield str(candidate.resolve()), SourceFile(str(candidate), *kind, stat.st_size, stamp)


def _walk(folder: Path) -> list[Path]:
    paths = [Path(root, name) for root, _, names in os.walk(folder) for name in names]
    return sorted(path for path in paths if path.is_file())


def _list_remote(source: str) -> Iterator[tuple[str, SourceFile | None]]:
    shown = shown_url(source)
    files, path = connect(source)
    infos: dict[str, Any]
    try:
        if glob.has_magic(urlsplit(source).path):
            infos = cast(dict[str, Any], files.glob(path, detail=True))
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
    can_seek = size is not None and not _is_web(url)
    return SourceFile(url, *kind, size or 0, stamp, can_seek)


def _check_kind(name: str) -> None:
    if kind_of(name) is None:
        suffix = os.path.splitext(name)[1]
        raise DataError(shown_url(name), f"unknown kind of file {suffix!r}", f"use {READABLE}")


@contextmanager
def _open_raw(place: str, kind: str) -> Iterator[BinaryIO]:
    if is_url(place):
        files, path = connect(place)
        # A web page as one stream, but for parquet, which is not read from its beginning on.
        is_stream = _is_web(place) and kind != PARQUET
        with files.open(path, "rb", block_size=0 if is_stream else _REMOTE_BLOCK_BYTES) as file:
            yield cast(BinaryIO, io.BufferedReader(cast(Any, file), 1 << 20) if is_stream else file)
    else:
        with open(place, "rb") as file:
            yield file


@contextmanager
def _named(file: SourceFile) -> Iterator[None]:
    """Turn whatever reading raises into a line that names the file."""
    name = shown_url(file.place)
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        # Of an own file only the system's errors; a remote one may raise anything.
        if not isinstance(error, (OSError, EOFError)) and not is_url(file.place):
            raise
        # Unlike the system, libraries that unpack give no number.
        if isinstance(error, OSError) and error.errno is None and file.packing:
            problem = f"its {file.packing} data are damaged or cut off ({error})"
            raise DataError(name, problem, "copy it again, or give it the suffix that it should have") from error
        words = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        fix = "check the file, the network and the permissions; the same command goes on"
        raise UnreadableSource(name, f"cannot be read ({words})", fix) from error
