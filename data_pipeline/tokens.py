"""Tokens on disk as one long array: memory-mapped shards, each block verified before its first token is used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from transmamba.data_pipeline.blocks import STARTS_DTYPE, block_digest, blocks_name, faults_of, map_rows, rows_digest
from transmamba.data_pipeline.errors import DamagedData, DataError
from transmamba.data_pipeline.manifest import Manifest, Shard, Split, check_shard

_AGAIN = "copy it again or make it with `transmamba data prepare --replace`"


# What is known of a block: it was verified in the head of its shard, or in the whole one.
_HEAD, _WHOLE = 1, 2


class Places(NamedTuple):
    """Where rows of tokens lie on disk, an entry per row: its first token in the split, its shard and row of the table,
    the bytes of the shard that its first block holds of it, the tokens that then are left, and where in the shard the
    next block holds them (-1 if they go on elsewhere)."""

    starts: np.ndarray
    shards: np.ndarray
    rows: np.ndarray
    first_bytes: np.ndarray
    end_bytes: np.ndarray
    left: np.ndarray
    next_bytes: np.ndarray

    def pick(self, indices: np.ndarray | slice) -> Places:
        """These of them, in this order."""
        return Places(*(column[indices] for column in self))


class ShardFiles(Protocol):
    """Where a store finds its shards."""

    def path(self, shard: Shard, n_bytes: int | None = None) -> Path:
        """A local copy of the shard, or of its first `n_bytes` or more; may have to be fetched first."""
        ...

    def expect(self, now: Sequence[Shard], soon: Sequence[Shard]) -> None:
        """These shards are wanted now and these after them; others can go."""
        ...


class LocalFiles:
    """Shards that lie beside their manifest."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, shard: Shard, n_bytes: int | None = None) -> Path:
        """The shard's place."""
        return self._folder / shard.name

    def expect(self, now: Sequence[Shard], soon: Sequence[Shard]) -> None:
        """They are here already."""


class TokenStore:
    """The tokens of one split in manifest order, as if its shards were one array.

    What is kept per shard and per block in memory is a few numbers and one byte; the rest stays on disk.

    Args:
        manifest: of the folder to read.
        split: "train" or "validation".
        files: where the shards are; not given, beside the manifest.

    Raises:
        DataError: there is no such split, or its table of blocks has another size.
    """

    def __init__(self, manifest: Manifest, split: str, files: ShardFiles | None = None) -> None:
        if split not in manifest.splits:
            raise DataError(split, "no such split", f"use one of {', '.join(manifest.splits)}")
        self.manifest = manifest
        self.split: Split = manifest.splits[split]
        self.n_tokens = self.split.n_tokens
        self.eod_id = manifest.eod_id
        self.dtype = np.dtype(manifest.token_dtype)
        self.files = LocalFiles(manifest.folder) if files is None else files
        shards = self.split.shards
        self._first_tokens = np.cumsum([0, *(shard.n_tokens for shard in shards)], dtype=np.int64)
        self._first_rows = np.cumsum([0, *(shard.n_blocks for shard in shards)], dtype=np.int64)
        self._table_path = manifest.folder / blocks_name(split)
        self._table: np.ndarray | None = None
        self._verified = np.zeros(int(self._first_rows[-1]), dtype=np.uint8)
        self._checked_rows = np.zeros(len(shards), dtype=bool)
        # Shard files; blocks are ranges of them. A window that ends in another shard needs only the head of that one.
        self._maps: dict[int, memoryview] = {}
        self._heads: dict[int, memoryview] = {}

    @property
    def shard_first_tokens(self) -> np.ndarray:
        """Position of each shard's first token, and the total at the end: int64 [shards + 1]."""
        return self._first_tokens

    def read(self, start: int, stop: int) -> np.ndarray:
        """Copy tokens `start` to `stop` (exclusive) in the stored dtype.

        Raises:
            ValueError: the range is outside the split.
            DamagedData: a block does not match its digest.
        """
        if not 0 <= start <= stop <= self.n_tokens:
            raise ValueError(f"tokens {start} to {stop} are outside 0 to {self.n_tokens}")
        if start == stop:
            return np.empty(0, dtype=self.dtype)
        return self.gather(self.locate(np.array([start], dtype=np.int64), stop - start))[0]

    def locate(self, starts_B: np.ndarray, length: int) -> Places:
        """Where the `length` tokens from each start lie; reads the table of blocks and no token.

        A row may reach beyond the end of the split; `gather` pads it.

        Raises:
            ValueError: a row starts outside the split.
            DamagedData: the table of blocks does not match its digest.
        """
        if len(starts_B) and not 0 <= starts_B.min() <= starts_B.max() < self.n_tokens:
            raise ValueError(f"rows at {starts_B.min()} to {starts_B.max()} are outside 0 to {self.n_tokens}")
        shards_B = np.searchsorted(self._first_tokens, starts_B, side="right") - 1
        blocks_B, inside_B = np.divmod(starts_B - self._first_tokens[shards_B], self.manifest.block_tokens)
        rows_B = self._first_rows[shards_B] + blocks_B
        for shard in set(shards_B[~self._checked_rows[shards_B]].tolist()):
            self._check_rows(shard)
        table, width = self._rows(), self.dtype.itemsize
        offsets = table["tokens_offset"]
        first_bytes_B = offsets[rows_B].astype(np.int64) + width * inside_B
        heads_B = np.minimum(table["n_tokens"][rows_B].astype(np.int64) - inside_B, length)
        following_B = np.minimum(rows_B + 1, self._first_rows[shards_B + 1] - 1)
        next_bytes_B = offsets[following_B].astype(np.int64)
        next_bytes_B[(following_B == rows_B) | (length - heads_B > table["n_tokens"][following_B])] = -1
        end_bytes_B = first_bytes_B + width * heads_B
        return Places(starts_B, shards_B, rows_B, first_bytes_B, end_bytes_B, length - heads_B, next_bytes_B)

    def gather(self, places: Places) -> np.ndarray:
        """Copy the tokens of rows, in the stored dtype: [B, the length they were located with].

        Behind the end of the split a row holds ends of documents.

        Raises:
            DamagedData: a block does not match its digest.
        """
        for row in set(places.rows[self._verified[places.rows] != _WHOLE].tolist()):
            self._block(row, whole=True)
        maps = self._maps
        spans = zip(places.shards.tolist(), places.first_bytes.tolist(), places.end_bytes.tolist(), strict=True)
        pieces = [maps[shard][first:end] for shard, first, end in spans]
        # A row that goes on in the next block has a member's header between its parts.
        for i in reversed(places.left.nonzero()[0].tolist()):
            pieces[i + 1 : i + 1] = self._rest(places, i)
        # Joining bytes costs a fraction of what NumPy takes to concatenate as many arrays.
        return np.frombuffer(bytearray().join(pieces), dtype=self.dtype).reshape(len(places.rows), -1)

    def starts(self, start: int, stop: int) -> np.ndarray:
        """Positions of the document starts in `start` to `stop` (exclusive) as the shards record them: int64.

        Raises:
            ValueError: the range is outside the split.
            DamagedData: a block does not match its digest.
        """
        if not 0 <= start <= stop <= self.n_tokens:
            raise ValueError(f"tokens {start} to {stop} are outside 0 to {self.n_tokens}")
        parts = [np.empty(0, dtype=np.int64)]
        while start < stop:
            _, row, begin = self._locate(start)
            tokens, starts = self._block(row, whole=True)
            found = starts.astype(np.int64) + begin
            parts.append(found[(found >= start) & (found < stop)])
            start = begin + len(tokens)
        return np.concatenate(parts)

    def expect(self, now: Sequence[int], soon: Sequence[int]) -> None:
        """Prepare for windows of the shards `now`, then of those in `soon`; maps of others are given up."""
        for shard in self._maps.keys() - set(now):
            del self._maps[shard]
            self._forget(shard)
        for shard in self._heads.keys() - self._maps.keys():
            self._forget(shard)
        self._heads.clear()
        shards = self.split.shards
        self.files.expect([shards[i] for i in now], [shards[i] for i in soon])

    def _rest(self, places: Places, i: int) -> list[memoryview]:
        """The bytes of a row that follow those in its first block."""
        shard, following, n_left = places.shards.item(i), places.next_bytes.item(i), places.left.item(i)
        if following >= 0 and self._verified.item(places.rows.item(i) + 1) == _WHOLE:
            return [self._maps[shard][following : following + self.dtype.itemsize * n_left]]
        n_head = (places.end_bytes.item(i) - places.first_bytes.item(i)) // self.dtype.itemsize
        return self._pieces(shard, places.starts.item(i) + n_head, n_left)

    def _pieces(self, home: int, start: int, length: int) -> list[memoryview]:
        """Bytes of the tokens from `start` on, block by block, maybe of shards after their `home`, verified; padded."""
        pieces = []
        while length and start < self.n_tokens:
            shard, row, begin = self._locate(start)
            tokens, _ = self._block(row, whole=shard == home)
            tokens = tokens[start - begin :][:length]
            pieces.append(tokens.view(np.uint8).data)
            start, length = start + len(tokens), length - len(tokens)
        if length:
            pieces.append(np.full(length, self.eod_id, dtype=self.dtype).view(np.uint8).data)
        return pieces

    def _locate(self, position: int) -> tuple[int, int, int]:
        """Shard and row of the table that hold a token, and the position at which the block begins."""
        shard = int(np.searchsorted(self._first_tokens, position, side="right")) - 1
        block, inside = divmod(position - int(self._first_tokens[shard]), self.manifest.block_tokens)
        return shard, int(self._first_rows[shard]) + block, position - inside

    def _block(self, row: int, *, whole: bool) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and starts of a block, verified; `whole` says that more of its shard will be needed."""
        shard = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        self._check_rows(shard)
        entry = self._rows()[row]
        first, second = int(entry["tokens_offset"]), int(entry["starts_offset"])
        end, starts_end = first + self.dtype.itemsize * int(entry["n_tokens"]), second + 4 * int(entry["n_starts"])
        data = self._open(shard, None if whole else max(end, starts_end))
        tokens = np.frombuffer(data[first:end], dtype=self.dtype)
        starts = np.frombuffer(data[second:starts_end], dtype=STARTS_DTYPE)
        if not self._verified[row]:
            if block_digest(tokens, starts) != entry["digest"].tobytes():
                path = self.manifest.folder / self.split.shards[shard].name
                raise DamagedData(str(path), f"the block at byte {first} does not match its digest", _AGAIN)
            self._verified[row] = _WHOLE if shard in self._maps else _HEAD
        return tokens, starts

    def _rows(self) -> np.ndarray:
        if self._table is None:
            rows = map_rows(self._table_path)
            if len(rows) != self._first_rows[-1]:
                problem = f"{len(rows)} blocks instead of {self._first_rows[-1]}"
                raise DamagedData(str(self._table_path), problem, _AGAIN)
            self._table = rows
        return self._table

    def _open(self, index: int, n_bytes: int | None = None) -> memoryview:
        """Map a shard, or its first `n_bytes` at least, and check its part of the table."""
        if index in self._maps:
            return self._maps[index]
        if n_bytes is not None and index in self._heads and len(self._heads[index]) >= n_bytes:
            return self._heads[index]
        shard = self.split.shards[index]
        path = self.files.path(shard, n_bytes)
        try:
            data = np.memmap(path, dtype=np.uint8, mode="r").data
            if n_bytes is None or len(data) >= shard.n_bytes:
                check_shard(path, shard)
                self._maps[index] = data
            elif len(data) >= n_bytes:
                self._heads[index] = data
            else:
                raise DataError(str(path), f"{len(data)} bytes instead of {n_bytes}", _AGAIN)
        except DataError as error:
            # It was whole when the manifest was read.
            raise DamagedData(error.what, error.problem, error.fix) from error
        except (OSError, ValueError) as error:
            raise DamagedData(str(path), f"cannot be mapped ({error})", _AGAIN) from error
        # What was verified before were the bytes of another map.
        self._forget(index)
        return data

    def _forget(self, index: int) -> None:
        self._verified[self._first_rows[index] : self._first_rows[index + 1]] = 0

    def _check_rows(self, index: int) -> None:
        """Compare a shard's part of the table with its digest, once."""
        if self._checked_rows[index]:
            return
        shard = self.split.shards[index]
        rows = self._rows()[self._first_rows[index] : self._first_rows[index + 1]]
        if rows_digest(rows) != shard.blocks_sha256:
            raise DamagedData(str(self._table_path), f"the rows of {shard.name} do not match their digest", _AGAIN)
        fault = faults_of(
            rows,
            n_bytes=shard.n_bytes,
            n_tokens=shard.n_tokens,
            block_tokens=self.manifest.block_tokens,
            width=self.dtype.itemsize,
        )
        if fault:
            raise DamagedData(str(self._table_path), f"{shard.name}: {fault}", _AGAIN)
        self._checked_rows[index] = True
