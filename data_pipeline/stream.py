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
            a document cut by the window starts anew.
        weight_BT: bool [rows, seq_len]; false where the input ends a document (its target belongs to the next
            one) or where the target is padding.
    """

    tokens_BT: np.ndarray
    starts: list[np.ndarray]
    weight_BT: np.ndarray

    @classmethod
    def of_tokens(cls, tokens_BT: np.ndarray, eod_id: int) -> Windows:
        """Windows of these tokens, all of them real; documents end at every `eod_id` and nowhere else."""
        n_rows, seq_len = tokens_BT.shape[0], tokens_BT.shape[1] - 1
        weight_BT = tokens_BT[:, :-1] != eod_id
        # In the flattened rows a document starts behind every end and at every row's begin.
        begins = np.arange(0, (n_rows + 1) * seq_len, seq_len)
        inner = np.flatnonzero(~weight_BT) + 1
        flat = np.concatenate([begins[:-1], inner[inner % seq_len != 0]])
        flat.sort()
        bounds = flat.searchsorted(begins).tolist()
        flat %= seq_len
        starts = [flat[first:end] for first, end in itertools.pairwise(bounds)]
        return cls(tokens_BT.astype(np.int64), starts, weight_BT)


class Stream:
    """Windows of seq_len + 1 tokens with stride seq_len: every token is a target once per epoch.

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
        self.n_windows = self._n_targets // seq_len
        self.n_dropped_tokens = self._n_targets - self.n_windows * seq_len
        self.n_sequential_windows = -(-self._n_targets // seq_len)
        # A window belongs to the shard that holds its first token.
        owned = -(-store.shard_first_tokens // seq_len)
        self._first_windows = np.minimum(owned, self.n_windows)
        self._orders: dict[int, EpochOrder] = {}
        # Positions whose group of shards the store was told of.
        self._near = range(0)

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

        Position p is in epoch p // n_windows; the ragged last window is left out of it (`n_dropped_tokens`).

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
        """Tokens of whole windows in the stored dtype: [B, seq_len + 1].

        Raises:
            DamagedData: a block does not match its digest.
        """
        return self.store.gather(self.locate(numbers_B))

    def locate(self, numbers_B: np.ndarray) -> Places:
        """Where whole windows lie."""
        return self.store.locate(numbers_B * self.seq_len, self.seq_len + 1)

    def in_windows_of(self, seq_len: int) -> Stream:
        """The same tokens and seed in windows of another length, whose order is one of its own."""
        return Stream(self.store, seq_len=seq_len, seed=self.seed, shuffle_shards=self.shuffle_shards)

    def position_after(self, position: int, seq_len: int) -> int:
        """Where this order goes on when windows of `seq_len` tokens were read up to `position` of theirs.

        In the same epoch, behind as many of its tokens: the first position that does not lie before them, so no token
        is counted twice and the epoch ends where it should. At most, a window's worth of tokens is left out.

        Raises:
            DataError: the split is shorter than one window of `seq_len`.
        """
        if position == 0:
            return 0
        if self._n_targets < seq_len:
            problem = f"{self.store.n_tokens} tokens are less than one window of {seq_len + 1}"
            raise DataError("data.seq_len", problem, "use the data that was trained on")
        epoch, inside = divmod(position, self._n_targets // seq_len)
        return epoch * self.n_windows + min(-(-inside * seq_len // self.seq_len), self.n_windows)

    def approach(self, position: int) -> None:
        """Let the store prepare for a position of the training order and what comes after it."""
        if position in self._near:
            return
        epoch, inside = divmod(position, self.n_windows)
        order = self._order_of(epoch)
        group, first, end = order.group_of(inside)
        self._near = range(epoch * self.n_windows + first, epoch * self.n_windows + end)
        soon = order.shards_of(group + 1) or self._order_of(epoch + 1).shards_of(0)
        self.store.expect(order.shards_of(group), soon)

    def sequential(self, first: int, count: int) -> Windows:
        """Windows `first` to `first + count` in the order of the text, the last one padded with weight 0.

        Raises:
            ValueError: beyond `n_sequential_windows`.
            DamagedData: a block does not match its digest.
        """
        if not 0 <= first <= first + count <= self.n_sequential_windows:
            raise ValueError(f"windows {first} to {first + count} are outside 0 to {self.n_sequential_windows}")
        n_whole = min(first + count, self.n_windows) - first
        tokens_BT = np.full((count, self.seq_len + 1), self.store.eod_id, dtype=self.store.dtype)
        if n_whole:
            tokens_BT[:n_whole] = self.tokens(np.arange(first, first + n_whole))
        n_real = self.store.n_tokens - self.n_windows * self.seq_len
        if n_whole < count:
            tokens_BT[-1, :n_real] = self.store.read(self.store.n_tokens - n_real, self.store.n_tokens)
        windows = Windows.of_tokens(tokens_BT, self.store.eod_id)
        if n_whole < count:
            # Padding is one document's end after another: it has neither starts nor weight.
            windows.weight_BT[-1, n_real - 1 :] = False
            windows.starts[-1] = windows.starts[-1][windows.starts[-1] < n_real]
        return windows

    def _order_of(self, epoch: int) -> EpochOrder:
        if epoch not in self._orders:
            # A batch touches two neighbouring epochs at most, unless it is longer than an epoch.
            self._orders = {known: order for known, order in self._orders.items() if abs(known - epoch) == 1}
            self._orders[epoch] = EpochOrder(
                self._first_windows, seed=self.seed, epoch=epoch, shuffle_shards=self.shuffle_shards
            )
        return self._orders[epoch]
