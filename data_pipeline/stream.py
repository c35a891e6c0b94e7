"""Windows of tokens of one source in training or validation order; the state of the loader is one integer.

B windows, T tokens.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.order import EpochOrder
from transmamba.data_pipeline.tokens import Places, TokenStore


@dataclass(frozen=True, slots=True)
class Windows:
    """Rows of tokens, where their documents begin, and which targets count.

    Attributes:
        tokens_BT: int64 [rows, seq_len + 1]; inputs are the first seq_len, targets the last.
        starts: per row the document starts among the inputs, ascending int64; the first is always 0, because
            a document cut by the window starts anew. Empty documents and padding belong to what is before them.
        weight_BT: bool [rows, seq_len]; false where the input ends a document (its target belongs to the next
            one), as it does everywhere in padding.
    """

    tokens_BT: np.ndarray
    starts: list[np.ndarray]
    weight_BT: np.ndarray

    @classmethod
    def of_tokens(cls, tokens_BT: np.ndarray, eod_id: int) -> Windows:
        """Windows of these tokens; documents end at every `eod_id` and nowhere else, padding is more of them."""
        n_rows, seq_len = tokens_BT.shape[0], tokens_BT.shape[1] - 1
        weight_BT = tokens_BT[:, :-1] != eod_id
        # In the flattened rows a document starts behind every end and at every row's begin.
        begins = np.arange(0, (n_rows + 1) * seq_len, seq_len)
        ends = np.flatnonzero(~weight_BT)
        ends = ends[tokens_BT[ends // seq_len, ends % seq_len + 1] != eod_id]
        inner = ends + 1
        flat = np.concatenate([begins[:-1], inner[inner % seq_len != 0]])
        flat.sort()
        bounds = flat.searchsorted(begins).tolist()
        flat %= seq_len
        starts = [flat[first:end] for first, end in itertools.pairwise(bounds)]
        return cls(tokens_BT.astype(np.int64), starts, weight_BT)


class Stream:
    """Windows of seq_len + 1 tokens with stride seq_len: every token but the first is a target once per epoch.

    The last window is padded with weight 0; a split shorter than one window has none.

    Args:
        store: the tokens.
        seq_len: inputs per window, >= 1.
        seed: of the order.
        shuffle_shards: shards whose windows are mixed, >= 1, or "all".

    Raises:
        DataError: seq_len or shuffle_shards is out of range.
    """

    def __init__(self, store: TokenStore, *, seq_len: int, seed: int, shuffle_shards: int | str) -> None:
        if seq_len < 1:
            raise DataError("data.seq_len", f"{seq_len} is not positive", "use 1 or more")
        if shuffle_shards != "all" and (not isinstance(shuffle_shards, int) or shuffle_shards < 1):
            raise DataError("data.shuffle_shards", f"{shuffle_shards!r} is no group size", "use 1 or more, or all")
        self.store = store
        self.seq_len = seq_len
        self.seed = seed
        self.shuffle_shards = shuffle_shards
        self._n_targets = max(store.n_tokens - 1, 0)
        self.n_sequential_windows = -(-self._n_targets // seq_len)
        self.n_windows = self._n_windows_of(seq_len)
        # A window belongs to the shard that holds its first token.
        owned = -(-store.shard_first_tokens // seq_len)
        self._first_windows = np.minimum(owned, self.n_windows)
        self._orders: dict[int, EpochOrder] = {}
        # Positions whose group of shards the store was told of, or the shards that are read in order.
        self._near = range(0)
        self._following = range(0)

    def rows(self, first: int, count: int) -> Windows:
        """Windows at positions `first` to `first + count` of the endless training order.

        Raises:
            DataError: the split is shorter than one window.
            DamagedData: a block does not match its digest.
        """
        numbers_B = self.window_numbers(np.arange(first, first + count))
        return Windows.of_tokens(self.tokens(numbers_B), self.store.eod_id)

    def window_numbers(self, positions_B: np.ndarray) -> np.ndarray:
        """Numbers of the windows at these positions of the training order; window w starts at w * seq_len.

        Position p is in epoch p // n_windows.

        Raises:
            DataError: the split is shorter than one window.
        """
        if len(positions_B) and positions_B.min() < 0:
            raise ValueError(f"position {positions_B.min()} is negative")
        if self.n_windows == 0:
            problem = f"{self.store.n_tokens} tokens are less than one window of {self.seq_len + 1}"
            raise DataError("data.seq_len", problem, "use a smaller seq_len or more data")
        epochs_B = positions_B // self.n_windows
        if len(epochs_B) and epochs_B[0] == epochs_B[-1] == epochs_B.max() == epochs_B.min():
            epoch = int(epochs_B[0])
            return self._order_of(epoch).windows(positions_B - epoch * self.n_windows)
        numbers_B = np.empty(len(positions_B), dtype=np.int64)
        for epoch in np.unique(epochs_B).tolist():
            inside = epochs_B == epoch
            numbers_B[inside] = self._order_of(epoch).windows(positions_B[inside] - epoch * self.n_windows)
        return numbers_B

    def tokens(self, numbers_B: np.ndarray) -> np.ndarray:
        """Tokens of windows in the stored dtype, the last one's padded: [B, seq_len + 1].

        Raises:
            DamagedData: a block does not match its digest.
        """
        return self.store.gather(self.locate(numbers_B))

    def locate(self, numbers_B: np.ndarray) -> Places:
        """Where windows lie."""
        return self.store.locate(numbers_B * self.seq_len, self.seq_len + 1)

    def in_windows_of(self, seq_len: int) -> Stream:
        """The same tokens and seed in windows of another length, whose order is one of its own."""
        return Stream(self.store, seq_len=seq_len, seed=self.seed, shuffle_shards=self.shuffle_shards)

    def position_after(self, position: int, seq_len: int) -> int:
        """Where this order goes on when windows of `seq_len` tokens were read up to `position` of theirs.

        In the same epoch, behind as many of its tokens, padding included: the first position that does not lie before
        them, so the epoch ends where it should. At most, a window's worth of tokens is left out.

        Raises:
            DataError: the split is shorter than one window of `seq_len`.
        """
        if position == 0:
            return 0
        n_windows = self._n_windows_of(seq_len)
        if n_windows == 0:
            problem = f"{self.store.n_tokens} tokens are less than one window of {seq_len + 1}"
            raise DataError("data.seq_len", problem, "use the data that was trained on")
        epoch, inside = divmod(position, n_windows)
        return epoch * self.n_windows + min(-(-inside * seq_len // self.seq_len), self.n_windows)

    def approach(self, position: int) -> None:
        """Let the store prepare for a position of the training order and what comes after it."""
        if position in self._near:
            return
        epoch, inside = divmod(position, self.n_windows)
        order = self._order_of(epoch)
        group, first, end = order.group_of(inside)
        self._following = range(0)
        self._near = range(epoch * self.n_windows + first, epoch * self.n_windows + end)
        soon = order.shards_of(group + 1) or self._order_of(epoch + 1).shards_of(0)
        self.store.expect(order.shards_of(group), soon)

    def sequential(self, first: int, count: int) -> Windows:
        """Windows `first` to `first + count` in the order of the text, also of a split shorter than one.

        Raises:
            ValueError: beyond `n_sequential_windows`.
            DamagedData: a block does not match its digest.
        """
        if not 0 <= first <= first + count <= self.n_sequential_windows:
            raise ValueError(f"windows {first} to {first + count} are outside 0 to {self.n_sequential_windows}")
        self._read_on(first * self.seq_len, min((first + count) * self.seq_len + 1, self.store.n_tokens))
        return Windows.of_tokens(self.tokens(np.arange(first, first + count)), self.store.eod_id)

    def token_counts(self) -> np.ndarray:
        """How often every token id occurs in the split, up to the largest that does: int64.

        Raises:
            DamagedData: a block does not match its digest.
        """
        counts = np.zeros(0, dtype=np.int64)
        for start, stop in itertools.pairwise(self.store.shard_first_tokens.tolist()):
            self._read_on(start, stop)
            more = np.bincount(self.store.read(start, stop), minlength=len(counts))
            more[: len(counts)] += counts
            counts = more
        return counts

    def _n_windows_of(self, seq_len: int) -> int:
        return -(-self._n_targets // seq_len) if self._n_targets >= seq_len else 0

    def _read_on(self, start: int, stop: int) -> None:
        """Let the store prepare for tokens in the order of the text and for the shard after them."""
        if start < stop:
            first, last = np.searchsorted(self.store.shard_first_tokens, [start, stop - 1], side="right").tolist()
            now = range(first - 1, last)
            if now != self._following:
                self._following, self._near = now, range(0)
                self.store.expect(now, [last] if last < len(self.store.split.shards) else [])

    def _order_of(self, epoch: int) -> EpochOrder:
        if epoch not in self._orders:
            # A batch touches two neighbouring epochs at most, unless it is longer than an epoch.
            self._orders = {known: order for known, order in self._orders.items() if abs(known - epoch) == 1}
            self._orders[epoch] = EpochOrder(
                self._first_windows, seed=self.seed, epoch=epoch, shuffle_shards=self.shuffle_shards
            )
        return self._orders[epoch]
