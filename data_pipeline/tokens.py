"""Tokens on disk as one long array: memory-mapped blocks, each verified the first time it is touched."""

from __future__ import annotations

import hashlib

import numpy as np

from transmamba.data_pipeline.errors import DamagedData, DataError
from transmamba.data_pipeline.manifest import Manifest, Split

STARTS_DTYPE = np.dtype("<u4")


class TokenStore:
    """The tokens of one split in manifest order, as if its shards were one array.

    A block's SHA-256 is checked before its first token is handed out by this process.

    Args:
        manifest: of the folder to read.
        split: "train" or "validation".

    Raises:
        DataError: there is no such split.
    """

    def __init__(self, manifest: Manifest, split: str) -> None:
        if split not in manifest.splits:
            raise DataError(split, "no such split", f"use one of {', '.join(manifest.splits)}")
        self.manifest = manifest
        self.split: Split = manifest.splits[split]
        self.n_tokens = self.split.n_tokens
        self.eod_id = manifest.eod_id
        self.dtype = np.dtype(manifest.token_dtype)
        self._blocks = [(i, block) for i, shard in enumerate(self.split.shards) for block in shard.blocks]
        ends = np.cumsum([block.n_tokens for _, block in self._blocks], dtype=np.int64)
        self._first_tokens = np.concatenate([[0], ends])
        self._maps: dict[int, np.ndarray] = {}
        self._verified = np.zeros(len(self._blocks), dtype=bool)

    @property
    def shard_first_tokens(self) -> np.ndarray:
        """Position of each shard's first token, and the total at the end: int64 [shards + 1]."""
        return np.concatenate([[0], np.cumsum([shard.n_tokens for shard in self.split.shards], dtype=np.int64)])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Copy tokens `start` to `stop` (exclusive) in the stored dtype.

        Raises:
            ValueError: the range is outside the split.
            DamagedData: a block does not match its digest.
        """
        out = np.empty(stop - start, dtype=self.dtype)
        for i, low, high in self._pieces(start, stop):
            first = int(self._first_tokens[i])
            out[low - start : high - start] = self._tokens_of(i)[low - first : high - first]
        return out

    def starts(self, start: int, stop: int) -> np.ndarray:
        """Positions of the document starts in `start` to `stop` (exclusive), ascending: int64.

        Raises:
            ValueError: the range is outside the split.
            DamagedData: a block does not match its digest.
        """
        parts = []
        for i, low, high in self._pieces(start, stop):
            positions = self._starts_of(i).astype(np.int64) + self._first_tokens[i]
            parts.append(positions[np.searchsorted(positions, low) : np.searchsorted(positions, high)])
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def _pieces(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        if not 0 <= start <= stop <= self.n_tokens:
            raise ValueError(f"tokens {start} to {stop} are outside 0 to {self.n_tokens}")
        pieces = []
        i = int(np.searchsorted(self._first_tokens, start, side="right")) - 1
        while start < stop:
            end = min(stop, int(self._first_tokens[i + 1]))
            pieces.append((i, start, end))
            start, i = end, i + 1
        return pieces

    def _tokens_of(self, i: int) -> np.ndarray:
        self._verify(i)
        return self._raw(i)[0].view(self.dtype)

    def _starts_of(self, i: int) -> np.ndarray:
        self._verify(i)
        return self._raw(i)[1].view(STARTS_DTYPE)

    def _verify(self, i: int) -> None:
        if self._verified[i]:
            return
        shard, block = self._blocks[i]
        if block_digest(*self._raw(i)) != block.sha256:
            path = self.manifest.folder / self.split.shards[shard].name
            problem = f"the block at byte {block.tokens_offset} does not match its digest"
            raise DamagedData(str(path), problem, "copy the shard again or make it with `transmamba data prepare`")
        self._verified[i] = True

    def _raw(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        shard, block = self._blocks[i]
        if shard not in self._maps:
            path = self.manifest.folder / self.split.shards[shard].name
            try:
                # A plain view: slicing np.memmap itself is several times slower.
                self._maps[shard] = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))
            except (OSError, ValueError) as error:
                raise DamagedData(str(path), f"cannot be mapped ({error})", "copy the shard again") from error
        data = self._maps[shard]
        tokens_end = block.tokens_offset + block.n_tokens * self.dtype.itemsize
        starts_end = block.starts_offset + block.n_starts * STARTS_DTYPE.itemsize
        return data[block.tokens_offset : tokens_end], data[block.starts_offset : starts_end]


def block_digest(tokens: np.ndarray, starts: np.ndarray) -> str:
    """SHA-256 over the raw bytes of a block's tokens and then of its document starts."""
    digest = hashlib.sha256(tokens.tobytes())
    digest.update(starts.tobytes())
    return digest.hexdigest()
