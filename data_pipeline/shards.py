"""Writing one split as WebDataset tar shards of token blocks, with the same bytes for the same documents."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from pathlib import Path

import numpy as np
from webdataset.writer import TarWriter

from transmamba.data_pipeline.manifest import Block, Shard, Split, length_bins
from transmamba.data_pipeline.tokens import STARTS_DTYPE, block_digest

BLOCK_TOKENS = 65_536
SHARD_TOKENS = 64_000_000
TOKENS_MEMBER = "tokens.npy"
STARTS_MEMBER = "starts.npy"


class SplitWriter:
    """Writes documents of tokens as `split-000000.tar`, ... in a folder.

    Members of a shard are blocks: `key.tokens.npy` and `key.starts.npy`, the offsets in the block at which
    documents start. Documents run on from block to block and from shard to shard.

    Args:
        folder: existing folder for the shards.
        split: name of the split, the first part of every file name and key.
        dtype: of the stored token ids.
        shard_tokens: most tokens in a shard, rounded down to whole blocks.
        block_tokens: tokens in a block; the last one may be shorter.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        dtype: np.dtype,
        shard_tokens: int = SHARD_TOKENS,
        block_tokens: int = BLOCK_TOKENS,
    ) -> None:
        self._folder = folder
        self._split = split
        self._dtype = dtype
        self._block_tokens = min(block_tokens, shard_tokens)
        self._blocks_per_shard = shard_tokens // self._block_tokens
        self._pending: list[np.ndarray] = []
        self._pending_starts: list[int] = []
        self._n_pending = 0
        self._tar: TarWriter | None = None
        # Per block of the open shard: tokens, starts, digest, smallest and largest token id.
        self._shard_blocks: list[tuple[int, int, str, int, int]] = []
        self._shards: list[Shard] = []
        self._lengths: list[int] = []

    def add(self, tokens: np.ndarray) -> None:
        """Append one document, which must end with the end-of-document token."""
        self._lengths.append(len(tokens))
        self._pending_starts.append(self._n_pending)
        self._pending.append(tokens)
        self._n_pending += len(tokens)
        if self._n_pending >= self._block_tokens:
            self._write_blocks()

    def finish(self, *, n_text_bytes: int, gzip9_bits_per_byte: float | None = None) -> Split:
        """Write what is left, flush everything to disk and return the record of the split."""
        self._write_blocks(last=True)
        self._close_shard()
        lengths = np.array(self._lengths, dtype=np.int64)
        return Split(
            shards=tuple(self._shards),
            n_tokens=int(lengths.sum()),
            n_documents=len(lengths),
            n_text_bytes=n_text_bytes,
            lengths=length_bins(lengths),
            gzip9_bits_per_byte=gzip9_bits_per_byte,
        )

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
        if self._tar is None:
            self._file = (self._folder / self._shard_name()).open("wb")
            self._tar = TarWriter(self._file, user="", group="", encoder=False, mtime=0)
        key = f"{self._split}-{len(self._shards):06d}-{len(self._shard_blocks):06d}"
        self._tar.write({"__key__": key, TOKENS_MEMBER: _npy_bytes(tokens), STARTS_MEMBER: _npy_bytes(starts)})
        digest = block_digest(tokens, starts)
        self._shard_blocks.append((len(tokens), len(starts), digest, int(tokens.min()), int(tokens.max())))
        if len(self._shard_blocks) == self._blocks_per_shard:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._tar = None
        path = self._folder / self._shard_name()
        blocks = [
            Block(tokens_offset, n_tokens, starts_offset, n_starts, digest)
            for (n_tokens, n_starts, digest, _, _), (starts_offset, tokens_offset) in zip(
                self._shard_blocks, _array_offsets(path), strict=True
            )
        ]
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self._shards.append(
            Shard(
                name=path.name,
                n_bytes=path.stat().st_size,
                sha256=sha256,
                n_tokens=sum(block.n_tokens for block in blocks),
                n_documents=sum(block.n_starts for block in blocks),
                min_token_id=min(block[3] for block in self._shard_blocks),
                max_token_id=max(block[4] for block in self._shard_blocks),
                blocks=tuple(blocks),
            )
        )
        self._shard_blocks = []

    def _shard_name(self) -> str:
        return f"{self._split}-{len(self._shards):06d}.tar"


def _npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _array_offsets(path: Path) -> list[tuple[int, int]]:
    """Byte offsets of the raw starts and tokens of each block, in order (`webdataset` sorts the members)."""
    offsets = []
    with tarfile.open(path, "r:") as tar, path.open("rb") as file:
        for member in tar:
            file.seek(member.offset_data)
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            offsets.append(file.tell())
    return list(zip(offsets[0::2], offsets[1::2], strict=True))
