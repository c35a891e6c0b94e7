"""Documents of plain text, Markdown and JSON lines, always in the same order."""

from __future__ import annotations

import difflib
import glob
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transmamba.data_pipeline.errors import DataError

SUFFIXES = (".txt", ".md", ".jsonl")


@dataclass(frozen=True, slots=True)
class Document:
    """One text with a name that leads back to its source."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class TextFiles:
    """Files to read, each once, and how many files of other kinds the folders and globs held."""

    paths: tuple[Path, ...]
    n_skipped: int


def find_files(sources: list[str]) -> TextFiles:
    """List the text files of files, folders (recursively) and globs.

    Sources keep their order; inside one, paths are sorted by their parts. A file reached twice is read once.

    Raises:
        DataError: a source does not exist or matches nothing, a named file has an unknown suffix,
            or no text file is left.
    """
    found: dict[Path, Path] = {}
    n_skipped = 0
    for source in sources:
        path = Path(source)
        if path.is_file():
            if path.suffix not in SUFFIXES:
                raise DataError(source, f"unknown kind of file {path.suffix!r}", f"use {', '.join(SUFFIXES)}")
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
        known = [candidate for candidate in candidates if candidate.suffix in SUFFIXES]
        n_skipped += len(candidates) - len(known)
        for candidate in known:
            found.setdefault(candidate.resolve(), candidate)
    if not found:
        raise DataError(
            ", ".join(sources) or "sources",
            f"no documents found ({n_skipped} files of other kinds)",
            f"give files that end in {', '.join(SUFFIXES)}",
        )
    return TextFiles(tuple(found.values()), n_skipped)


def read_documents(files: TextFiles, *, field: str = "text") -> Iterator[Document]:
    """Yield the documents of `files` in order: one per txt or md file, one per JSON line.

    Text files of nothing but white space yield no document.

    Args:
        field: name of the JSON member that holds the text.

    Raises:
        DataError: bytes that are not UTF-8 (with the byte offset), a line that is not a JSON object,
            a missing or empty field (with the fields found), or an unreadable file.
    """
    for path in files.paths:
        try:
            if path.suffix == ".jsonl":
                yield from _read_json_lines(path, field)
            else:
                text = _decode(path.read_bytes(), path, offset=0).removeprefix("\ufeff")
                if text.strip():
                    yield Document(str(path), text)
        except OSError as error:
            raise DataError(str(path), f"cannot be read ({error.strerror})", "check its permissions") from error


def _walk(folder: Path) -> list[Path]:
    paths = [Path(root, name) for root, _, names in os.walk(folder) for name in names]
    return sorted(path for path in paths if path.is_file())


def _read_json_lines(path: Path, field: str) -> Iterator[Document]:
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            name = f"{path}:{number}"
            if line.strip():
                yield Document(name, _field_text(_decode(line, path, offset), name, field))
            offset += len(line)


def _field_text(line: str, name: str, field: str) -> str:
    try:
        record = json.loads(line.removeprefix("\ufeff"))
    except json.JSONDecodeError as error:
        problem = f"not JSON ({error.msg} at character {error.pos})"
        raise DataError(name, problem, "give one JSON object per line") from error
    if not isinstance(record, dict):
        raise DataError(name, f"a JSON {type(record).__name__}, not an object", "give one object per line")
    text = record.get(field)
    if not isinstance(text, str):
        problem = f"no text in field {field!r} (fields found: {', '.join(sorted(record)) or 'none'})"
        raise DataError(name, problem, "name the text field with --field")
    if not text.strip():
        raise DataError(name, f"field {field!r} is empty", "remove the line")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        problem = f"field {field!r} has half a surrogate pair at character {error.start}"
        raise DataError(name, problem, "write the text as UTF-8") from error
    return text


def _decode(data: bytes, path: Path, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 at byte offset {offset + error.start}"
        raise DataError(str(path), problem, "convert it, for example with iconv -t UTF-8") from error


def nearest_existing(path: Path) -> str:
    """Advice for a path that does not exist: the most similar name in the deepest folder that does."""
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    names = sorted(entry.name for entry in parent.iterdir())
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.0)
    if not close:
        return f"the folder {parent} is empty"
    return f"the nearest existing name is {parent / close[0]}"
