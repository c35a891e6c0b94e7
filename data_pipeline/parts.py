"""Input cut into parts, which do not depend on who works on them, and the documents of a part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, BinaryIO

from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.remote import shown_url
from transmamba.data_pipeline.sources import JSON_LINES, PARQUET, SourceFile, open_source
from transmamba.data_pipeline.text import Document, decode_text, text_of_line

# A smaller part is not worth starting on.
LEAST_PART_BYTES = 4 << 20
# Enough parts to keep many workers busy to the end.
_WANTED_PARTS = 64
# Text has some four bytes per token.
_BYTES_PER_TOKEN = 4
_ROWS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Piece:
    """A file, or of JSON lines those that begin at byte `start` or later and before `end`."""

    file: SourceFile
    start: int
    end: int

    @property
    def n_bytes(self) -> int:
        """Stored bytes of the piece."""
        return self.end - self.start


Part = tuple[Piece, ...]


def part_size(n_bytes: int, shard_tokens: int) -> int:
    """Bytes of a part of `n_bytes` of input: about a shard's worth, less of a small input."""
    return max(LEAST_PART_BYTES, min(n_bytes // _WANTED_PARTS, _BYTES_PER_TOKEN * shard_tokens))


def cut_parts(files: Sequence[SourceFile], size: int) -> list[Part]:
    """Cut the input into parts of about `size` bytes: runs of whole files, or ranges of the lines of a big one.

    Packed files and parquet stay whole.
    """
    parts: list[Part] = []
    run: list[Piece] = []
    n_bytes = 0
    for file in files:
        pieces = _cut_file(file, size)
        for piece in pieces:
            if run and (len(pieces) > 1 or n_bytes + piece.n_bytes > size):
                parts.append(tuple(run))
                run, n_bytes = [], 0
            run.append(piece)
            n_bytes += piece.n_bytes
    return [*parts, tuple(run)] if run else parts


def _cut_file(file: SourceFile, size: int) -> list[Piece]:
    if file.kind != JSON_LINES or file.packing or not file.can_seek:
        return [Piece(file, 0, file.n_bytes)]
    n_pieces = max(-(-file.n_bytes // size), 1)
    edges = [file.n_bytes * i // n_pieces for i in range(n_pieces + 1)]
    return [Piece(file, start, end) for start, end in pairwise(edges)]


class Reading:
    """The documents of a part, in order, and how far their reading has come.

    A txt or md file is a document, and so is a JSON line and a row of parquet. Those of nothing but white space are
    left out and counted.

    Args:
        part: what to read.
        field: member of a JSON line, or column of parquet, that holds the text.
    """

    def __init__(self, part: Part, field: str) -> None:
        self._part, self._field = part, field
        self._n_done = self._n_of_piece = 0
        self.n_empty = 0

    @property
    def n_bytes(self) -> int:
        """Stored bytes that have been read, of `sum(piece.n_bytes for piece in part)`."""
        return self._n_done + self._n_of_piece

    def documents(self) -> Iterator[Document]:
        """Read the part once.

        Raises:
            DataError: bytes that are not UTF-8, a line that is not a JSON object, a field or column that is missing
                or holds no text, or a damaged file.
            UnreadableSource: a file cannot be read.
        """
        for piece in self._part:
            kinds = {JSON_LINES: self._json_lines, PARQUET: self._rows}
            for document in kinds.get(piece.file.kind, self._whole)(piece):
                if document.text.strip():
                    yield document
                else:
                    self.n_empty += 1
            self._n_done, self._n_of_piece = self._n_done + piece.n_bytes, 0

    def _whole(self, piece: Piece) -> Iterator[Document]:
        name = shown_url(piece.file.place)
        with open_source(piece.file) as (content, _):
            text = decode_text(content.read(), name, offset=0)
        yield Document(name, text)

    def _json_lines(self, piece: Piece) -> Iterator[Document]:
        name = shown_url(piece.file.place)
        with open_source(piece.file) as (content, raw):
            offset = _seek_line(content, piece.start)
            is_part = piece.n_bytes < piece.file.n_bytes
            while not is_part or offset < piece.end:
                line = content.readline()
                if not line:
                    break
                if line.strip():
                    yield self._of_line(piece, line, offset, name)
                offset += len(line)
                self._n_of_piece = max(min(raw.tell() - piece.start, piece.n_bytes), 0)

    def _of_line(self, piece: Piece, line: bytes, offset: int, name: str) -> Document:
        text = decode_text(line, name, offset=offset)
        try:
            return Document(f"{name} at byte {offset}", text_of_line(text, name, self._field))
        except DataError as error:
            raise DataError(f"{name}:{_line_number(piece.file, offset)}", error.problem, error.fix) from error

    def _rows(self, piece: Piece) -> Iterator[Document]:
        import pyarrow
        from pyarrow import parquet

        name = shown_url(piece.file.place)
        n_rows = 0
        with open_source(piece.file) as (content, _):
            try:
                # Buffered: a column is not read at once. The workers share the cores among themselves.
                table = parquet.ParquetFile(content, buffer_size=1 << 20, page_checksum_verification=True)
                _check_column(table.schema_arrow, self._field, name)
                batches = table.iter_batches(_ROWS_AT_ONCE, columns=[self._field], use_threads=False)
                for values in (batch.column(self._field) for batch in batches):
                    for value in values:
                        n_rows += 1
                        yield Document(f"{name} row {n_rows}", _text_of_row(value, f"{name} row {n_rows}"))
                    self._n_of_piece = piece.n_bytes * n_rows // table.metadata.num_rows
            except (pyarrow.ArrowException, OSError) as error:
                if getattr(error, "errno", None) is not None:
                    raise
                raise DataError(name, f"not parquet, or damaged ({error})", "copy or write it again") from error


def _seek_line(content: BinaryIO, start: int) -> int:
    """Go to the first line that begins at `start` or later; returns its offset."""
    if start == 0:
        return 0
    content.seek(start - 1)
    return start - 1 + len(content.readline())


def _line_number(file: SourceFile, offset: int) -> int:
    with open_source(file) as (content, _):
        number, left = 1, offset
        while left and (data := content.read(min(left, 1 << 20))):
            number += data.count(b"\n")
            left -= len(data)
    return number


def _check_column(schema: Any, field: str, name: str) -> None:
    from pyarrow import types

    if field not in schema.names:
        problem = f"no column {field!r} (columns found: {', '.join(sorted(schema.names)) or 'none'})"
        raise DataError(name, problem, "name the text column with --field")
    if (n_columns := schema.names.count(field)) > 1:
        raise DataError(name, f"column {field!r} is there {n_columns} times", "write it with one of them")
    kind = schema.field(field).type
    kind = kind.value_type if types.is_dictionary(kind) else kind
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise DataError(name, f"column {field!r} holds {kind}, not text", "name the text column with --field")


def _text_of_row(value: Any, name: str) -> str:
    try:
        return value.as_py() or ""
    except UnicodeDecodeError as error:
        raise DataError(name, "its text is not UTF-8", "write the column again") from error
