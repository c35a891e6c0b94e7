"""Document boundaries of a micro-batch of packed rows, known on the host."""

# B batch, T tokens, P prefix, L tokens per padded document prefix.

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import torch
from torch import Tensor

SHORTEST_BUCKET = 16  # shorter document prefixes are padded to it: a tiny attention call costs more than the padding


@dataclass(frozen=True)
class PrefixPlan:
    """The tokens with `pos < P`, laid out as padded document prefixes of few distinct lengths.

    The padded prefixes of all buckets lie one after the other; a place in that list is a slot.
    Padding repeats the last token of its prefix, at the end, so that causal attention never sees it.

    Attributes:
        buckets: (number of prefixes, padded length L) of every bucket, shortest first.
        padded_tokens: index into the flattened B * T tokens of every slot.
        tokens: index into the flattened B * T tokens of every real prefix token, each once.
        slots: the slot of each of `tokens`.
    """

    buckets: tuple[tuple[int, int], ...]
    padded_tokens: Tensor
    tokens: Tensor
    slots: Tensor


@dataclass(frozen=True)
class PackedPlan:
    """The tokens with `pos < P`, document after document, without padding.

    Attributes:
        tokens: index into the flattened B * T tokens; None where all of them attend.
        pos: int64 offset of each of them in its document.
        edges: int32 index of every document's first one among them, and their number at the end.
        longest: most tokens of one document.
    """

    tokens: Tensor | None
    pos: Tensor
    edges: Tensor
    longest: int


class Documents:
    """Where documents start in the rows of a micro-batch.

    Every row starts a document at column 0; a document cut by the window starts anew there. The boundaries
    live on the host, so nothing here waits for a device.

    Attributes:
        n_rows, n_tokens: sizes B and T.
        starts: per row the sorted start offsets.
        pos_BT: int64 offset of every token in its document.
        start_BT: int32 column at which every token's document starts.
        reset_BT: True at every document start, column 0 included.
        is_whole: every row is one document.
    """

    def __init__(self, starts: tuple[tuple[int, ...], ...], n_tokens: int, device: torch.device | str) -> None:
        self.n_rows = len(starts)
        self.n_tokens = n_tokens
        self.starts = starts
        self.is_whole = all(row == (0,) for row in starts)
        self.device = torch.device(device)
        reset_BT = torch.zeros(self.n_rows, n_tokens, dtype=torch.bool)
        if n_tokens:
            for row, offsets in enumerate(starts):
                reset_BT[row, list(offsets)] = True
        column_T = torch.arange(n_tokens)
        start_BT = torch.where(reset_BT, column_T, 0).cummax(dim=1).values if n_tokens else column_T
        start_BT = start_BT.expand(self.n_rows, n_tokens)
        self.pos_BT = (column_T - start_BT).to(device)
        self.start_BT = start_BT.to(torch.int32).contiguous().to(device)
        self.reset_BT = reset_BT.to(device)
        self._prefixes: dict[int, PrefixPlan] = {}
        self._packed: dict[int, PackedPlan] = {}
        self._edges: dict[int, tuple[list[int], Tensor, Tensor]] = {}

    @classmethod
    def whole(cls, n_rows: int, n_tokens: int, device: torch.device | str = "cpu") -> Self:
        """Every row is one document."""
        return cls(((0,),) * n_rows, n_tokens, device)

    @classmethod
    def from_starts(cls, starts: Sequence[Sequence[int]], n_tokens: int, device: torch.device | str = "cpu") -> Self:
        """Boundaries from per-row start offsets.

        Args:
            starts: per row the sorted offsets of document starts, the first one 0.
            n_tokens: tokens per row.

        Raises:
            ValueError: a row does not begin with 0, is not strictly increasing, or reaches past `n_tokens`.
        """
        rows = tuple(tuple(int(offset) for offset in row) for row in starts)
        for row, offsets in enumerate(rows):
            if not offsets or offsets[0] != 0:
                raise ValueError(f"document starts of row {row} must begin with 0, got {offsets[:3]}")
            if any(later <= earlier for earlier, later in pairwise(offsets)):
                raise ValueError(f"document starts of row {row} must be strictly increasing, got {offsets}")
            if offsets[-1] >= max(n_tokens, 1):
                raise ValueError(f"document start {offsets[-1]} of row {row} is outside {n_tokens} tokens")
        return cls(rows, n_tokens, device)

    def spans(self) -> list[tuple[int, int, int]]:
        """(row, start, length) of every document, row by row."""
        return [
            (row, start, stop - start)
            for row, offsets in enumerate(self.starts)
            for start, stop in zip(offsets, (*offsets[1:], self.n_tokens), strict=True)
        ]

    def prefix(self, P: int | float) -> PrefixPlan:
        """Layout for attention on tokens with `pos < P`; P may be 0, `math.inf` or above T. Cached per P."""
        n_prefix = self._clip(P)
        if n_prefix not in self._prefixes:
            self._prefixes[n_prefix] = self._plan(n_prefix)
        return self._prefixes[n_prefix]

    def packed(self, P: int | float) -> PackedPlan:
        """The same tokens for an attention that takes documents of any length in one call. Cached per P."""
        n_prefix = self._clip(P)
        if n_prefix not in self._packed:
            spans = self.spans()
            sizes = torch.tensor([min(length, n_prefix) for _, _, length in spans], dtype=torch.int32)
            edges = torch.nn.functional.pad(sizes.cumsum(0, dtype=torch.int32), (1, 0))
            tokens = None
            if int(edges[-1]) < self.n_rows * self.n_tokens:
                firsts = [row * self.n_tokens + start for row, start, _ in spans]
                parts = [torch.arange(first, first + size) for first, size in zip(firsts, sizes.tolist(), strict=True)]
                tokens = torch.cat([torch.zeros(0, dtype=torch.int64), *parts]).to(self.device)
            pos = self.pos_BT.flatten() if tokens is None else self.pos_BT.flatten()[tokens]
            longest = int(sizes.max()) if spans else 0
            self._packed[n_prefix] = PackedPlan(tokens, pos, edges.to(self.device), longest)
        return self._packed[n_prefix]

    def first_output(self, P: int | float) -> int:
        """Smallest column, over all rows, with `pos >= P`; `n_tokens` if there is none."""
        n_prefix = self._clip(P)
        reached = [start + n_prefix for _, start, length in self.spans() if length > n_prefix]
        return min(reached, default=self.n_tokens)

    def edge_rows(self, n_edge: int) -> tuple[list[int], Tensor, Tensor]:
        """Tokens with `pos < n_edge`: columns as a sorted list, then columns and rows as indices. Cached."""
        if n_edge not in self._edges:
            edges = sorted(
                (start + offset, row) for row, start, length in self.spans() for offset in range(min(n_edge, length))
            )
            columns, rows = [column for column, _ in edges], [row for _, row in edges]
            self._edges[n_edge] = (
                columns,
                torch.tensor(columns, dtype=torch.int64).to(self.device),
                torch.tensor(rows, dtype=torch.int64).to(self.device),
            )
        return self._edges[n_edge]

    def _clip(self, P: int | float) -> int:
        return math.ceil(min(max(P, 0), self.n_tokens))

    def _plan(self, n_prefix: int) -> PrefixPlan:
        by_length: dict[int, list[tuple[int, int]]] = {}
        for row, start, length in self.spans():
            size = min(length, n_prefix)
            if size:
                padded = min(max(1 << (size - 1).bit_length(), SHORTEST_BUCKET), self.n_tokens)
                by_length.setdefault(padded, []).append((row * self.n_tokens + start, size))
        empty = torch.zeros(0, dtype=torch.int64)
        padded_tokens, tokens, slots, n_slots = [empty], [empty], [empty], 0
        for padded, prefixes in sorted(by_length.items()):
            first, size = torch.tensor(prefixes, dtype=torch.int64)[:, :, None].unbind(1)
            offset_L = torch.arange(padded)
            index = (first + torch.minimum(offset_L, size - 1)).flatten()
            real = (offset_L < size).flatten()
            padded_tokens.append(index)
            tokens.append(index[real])
            slots.append(real.nonzero().flatten() + n_slots)
            n_slots += index.numel()
        return PrefixPlan(
            buckets=tuple((len(prefixes), padded) for padded, prefixes in sorted(by_length.items())),
            padded_tokens=torch.cat(padded_tokens).to(self.device),
            tokens=torch.cat(tokens).to(self.device),
            slots=torch.cat(slots).to(self.device),
        )
