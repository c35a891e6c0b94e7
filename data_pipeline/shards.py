"""Writing tokens as WebDataset tar shards of blocks, with the same bytes for the same documents."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from transmamba.data_pipeline.blocks import (
    ROW,
    STARTS_DTYPE,
    block_digest,
    blocks_name,
    rows_digest,
    write_rows,
)
from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.manifest import LENGTH_EDGES, LengthBin, Shard, Split

BLOCK_TOKENS = 131_072
SHARD_TOKENS = 64_000_000
# Large writes lie in large pieces of memory and disk: reading windows of them is a fifth quicker.
_BUFFER_BYTES = 8 << 20
TOKENS_MEMBER = "tokens.npy"
STARTS_MEMBER = "starts.npy"


@dataclass(frozen=True, slots=True)
class Written:
    """What a writer has put on disk: its shards, their rows of the table of blocks, the documents' lengths."""

    shards: tuple[Shard, ...]
    rows: np.ndarray
    lengths: tuple[LengthBin, ...]


class ShardWriter:
    """Writes documents of tokens as `PREFIX-000.tar`, `PREFIX-001.tar`, ... in a folder.

    Members of a shard are blocks: `key.starts.npy`, the offsets in the block at which documents start, and
    `key.tokens.npy`. Documents run on from block to block and from shard to shard.

    Args:
        folder: existing folder for the shards.
        prefix: first part of every file name and key.
        dtype: of the stored token ids.
        eod_id: id that ends every document and is nowhere else.
        shard_tokens: most tokens in a shard, rounded down to whole blocks.
        block_tokens: tokens in a block; the last one of a shard may be shorter.
    """

    def __init__(
        self,
        folder: Path,
        prefix: str,
        *,
        dtype: np.dtype,
        eod_id: int,
        shard_tokens: int = SHARD_TOKENS,
        block_tokens: int = BLOCK_TOKENS,
    ) -> None:
        self._folder, self._prefix = folder, prefix
        self._dtype, self._eod_id = dtype, eod_id
        self._block_tokens = block_tokens
        self._blocks_per_shard = max(shard_tokens // block_tokens, 1)
        self._pending: list[np.ndarray] = []
        self._pending_starts: list[int] = []
        self._n_pending = 0
        self._file: _Counted | None = None
        # Of the open shard.
        self._rows: list[tuple[int, int, int, int, bytes]] = []
        self._id_range = (0, 0)
        self._shards: list[Shard] = []
        self._tables: list[np.ndarray] = []
        self._lengths: list[int] = []

    def add(self, tokens: np.ndarray) -> None:
        """Append one document.

        Raises:
            DataError: it does not end with the end-of-document id, or has it elsewhere too.
        """
        if not len(tokens) or tokens[-1] != self._eod_id or np.count_nonzero(tokens == self._eod_id) != 1:
            problem = f"the end-of-document id {self._eod_id} must end it and be nowhere else"
            raise DataError(f"document {len(self._lengths)} of {self._prefix}", problem, "split it there")
        self._lengths.append(len(tokens))
        self._pending_starts.append(self._n_pending)
        self._pending.append(tokens)
        self._n_pending += len(tokens)
        if self._n_pending >= self._block_tokens:
            self._write_blocks()

    def finish(self) -> Written:
        """Write what is left, flush everything to disk and describe it."""
        self._write_blocks(last=True)
        self._close_shard()
        rows = np.concatenate(self._tables) if self._tables else np.empty(0, dtype=ROW)
        return Written(tuple(self._shards), rows, length_bins(np.array(self._lengths, dtype=np.int64)))

    def _write_blocks(self, *, last: bool = False) -> None:
        tokens = np.concatenate(self._pending).astype(self._dtype) if self._pending else np.empty(0, self._dtype)
        starts = np.array(self._pending_starts, dtype=np.int64)
        n_written = len(tokens) if last else len(tokens) - len(tokens) % self._block_tokens
        for first in range(0, n_written, self._block_tokens):
            end = min(first + self._block_tokens, n_written)
            low, high = np.searchsorted(starts, [first, end])
            self._write_block(tokens[first:end], (starts[low:high] - first).astype(STARTS_DTYPE))
        self._pending = [tokens[n_written:]]
        self._pending_starts = (starts[starts >= n_written] - n_written).tolist()
        self._n_pending = len(tokens) - n_written

    def _write_block(self, tokens: np.ndarray, starts: np.ndarray) -> None:
        if self._file is None:
            self._file = _Counted((self._folder / self._shard_name()).open("wb", buffering=_BUFFER_BYTES))
        key = f"{self._prefix}-{len(self._shards):03d}-{len(self._rows):06d}"
        starts_offset = self._file.add_array(f"{key}.{STARTS_MEMBER}", starts)
        tokens_offset = self._file.add_array(f"{key}.{TOKENS_MEMBER}", tokens)
        low, high = int(tokens.min()), int(tokens.max())
        self._id_range = (min(low, self._id_range[0]), max(high, self._id_range[1])) if self._rows else (low, high)
        self._rows.append((tokens_offset, starts_offset, len(tokens), len(starts), block_digest(tokens, starts)))
        if len(self._rows) == self._blocks_per_shard:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._file is None:
            return
        self._file.close()
        rows = np.array(self._rows, dtype=ROW)
        self._shards.append(
            Shard(
                name=self._shard_name(),
                n_bytes=self._file.n_bytes,
                sha256=self._file.sha256.hexdigest(),
                n_tokens=int(rows["n_tokens"].sum()),
                n_documents=int(rows["n_starts"].sum()),
                n_blocks=len(rows),
                blocks_sha256=rows_digest(rows),
                min_token_id=self._id_range[0],
                max_token_id=self._id_range[1],
            )
        )
        self._tables.append(rows)
        self._file, self._rows = None, []

    def _shard_name(self) -> str:
        return f"{self._prefix}-{len(self._shards):03d}.tar"


class _Counted:
    """An uncompressed tar of arrays that knows its size and its hash while it is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.n_bytes = 0
        self.sha256 = hashlib.sha256()

    def add_array(self, name: str, array: np.ndarray) -> int:
        """Append a member `name` in npy format; returns the byte offset of its raw numbers."""
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
        member = tarfile.TarInfo(name)
        member.size = len(header.getvalue()) + array.nbytes
        member.mode = 0o444
        self._write(member.tobuf(tarfile.USTAR_FORMAT))
        self._write(header.getvalue())
        offset = self.n_bytes
        self._write(array.data)
        self._write(bytes(-self.n_bytes % tarfile.BLOCKSIZE))
        return offset

    def close(self) -> None:
        """End the archive and flush it to disk."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self.n_bytes % tarfile.RECORDSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self.sha256.update(data)
        self.n_bytes += len(data) if isinstance(data, bytes) else data.nbytes


def length_bins(lengths: np.ndarray) -> tuple[LengthBin, ...]:
    """Histogram of document lengths in tokens, empty bins left out."""
    bins = np.searchsorted(LENGTH_EDGES, lengths, side="right") - 1
    counts = np.bincount(bins, minlength=1)
    sums = np.bincount(bins, weights=lengths, minlength=1)
    return tuple(LengthBin(int(LENGTH_EDGES[i]), int(counts[i]), int(sums[i])) for i in np.flatnonzero(counts).tolist())


def join_parts(
    folder: Path,
    split: str,
    parts: Sequence[Written],
    *,
    n_text_bytes: int,
    gzip9_bits_per_byte: float | None = None,
) -> Split:
    """Make one split of what several writers wrote: name its shards SPLIT-000000.tar, ... and write its table.

    Args:
        folder: where all the shards are.
        split: "train" or "validation".
        parts: in the order of the text.
        n_text_bytes: of UTF-8 that the tokens stand for.
        gzip9_bits_per_byte: yardstick of a validation split.
    """
    shards = []
    for shard in (shard for part in parts for shard in part.shards):
        name = f"{split}-{len(shards):06d}.tar"
        (folder / shard.name).rename(folder / name)
        shards.append(dataclasses.replace(shard, name=name))
    rows = [part.rows for part in parts]
    write_rows(folder / blocks_name(split), np.concatenate(rows) if rows else np.empty(0, dtype=ROW))
    lengths: dict[int, tuple[int, int]] = {}
    for entry in (entry for part in parts for entry in part.lengths):
        n_documents, n_tokens = lengths.get(entry.shortest, (0, 0))
        lengths[entry.shortest] = (n_documents + entry.n_documents, n_tokens + entry.n_tokens)
    return Split(
        shards=tuple(shards),
        n_tokens=sum(shard.n_tokens for shard in shards),
        n_documents=sum(shard.n_documents for shard in shards),
        n_text_bytes=n_text_bytes,
        lengths=tuple(LengthBin(shortest, *counts) for shortest, counts in sorted(lengths.items())),
        gzip9_bits_per_byte=gzip9_bits_per_byte,
    )
