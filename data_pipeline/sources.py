"""Files of text: their kinds, and their content as streams of bytes."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.remote import connect, shown_url

JSON_LINES, PARQUET = ".jsonl", ".parquet"
TEXT_KINDS = (".txt", ".md", JSON_LINES)
PACKINGS = {".gz": "gzip", ".zst": "zstd"}
READABLE = ", ".join((*TEXT_KINDS, PARQUET)) + " (the text kinds also as .gz or .zst)"
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


def is_url(source: str) -> bool:
    """Whether fsspec is to open it."""
    return "://" in source


def is_web(url: str) -> bool:
    """Whether a web server sends it, which need neither say how much nor send parts."""
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
        # A web server need not say how much it sends.
        if not file.n_bytes and isinstance(raw, io.BufferedReader) and not raw.peek(1):
            raise damaged(file, "0 bytes")
        import pyarrow

        # It tells a truncated stream from a complete one, in both packings, and goes on over joined ones.
        unpacked = pyarrow.CompressedInputStream(raw, file.packing)
        yield cast(BinaryIO, io.BufferedReader(cast(Any, unpacked), 1 << 20)), raw


def damaged(file: SourceFile, words: object) -> DataError:
    """What to say of a packed file that cannot be unpacked to its end."""
    problem = f"its {file.packing} data are damaged or cut off ({words})"
    return DataError(shown_url(file.place), problem, "copy it again, or give it the suffix that it should have")


@contextmanager
def _open_raw(place: str, kind: str) -> Iterator[BinaryIO]:
    if is_url(place):
        files, path = connect(place)
        # A web page as one stream, but for parquet, which is not read from its beginning on.
        is_stream = is_web(place) and kind != PARQUET
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
            raise damaged(file, error) from error
        words = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        fix = "check the file, the network and the permissions; the same command goes on"
        raise UnreadableSource(name, f"cannot be read ({words})", fix) from error
