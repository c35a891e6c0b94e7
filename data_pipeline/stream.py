"""Windows of tokens in training or validation order; the state of the loader is one integer.

B windows, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.order import EpochOrder
from transmamba.data_pipeline.tokens import TokenStore


@dataclass(frozen=True, slots=True)
class Windows:
    """Rows of tokens, where their documents begin, and which targets count.

    Attributes:
        tokens_BT: int64 [rows, seq_len + 1]; inputs are the first seq_len, targets the last.
        starts: per row the document starts among the inputs, ascending int64; the first is always 0, because
            a document cut by the window starts anew.
        weight_BT: float32 [rows, seq_len]; 0 where the input ends a document (its target belongs to the next
            one) or where the target is padding, else 1.
    """

    tokens_BT: np.ndarray
    starts: list[np.ndarray]
    weight_BT: np.ndarray


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
        n_targets = max(store.n_tokens - 1, 0)
        self.n_windows = n_targets // seq_len
        self.n_dropped_tokens = n_targets - self.n_windows * seq_len
        self.n_sequential_windows = -(-n_targets // seq_len)
        # A window belongs to the shard that holds its first token.
        owned = -(-store.shard_first_tokens // seq_len)
        self._first_windows = np.minimum(owned, self.n_windows)
        self._orders: dict[int, EpochOrder] = {}

    def rows(self, first: int, count: int) -> Windows:
        """Windows at positions `first` to `first + count` of the endless training order.

        Position p is in epoch p // n_windows; the ragged last window is left out of it (`n_dropped_tokens`).

        Raises:
            DataError: the split is shorter than one window.
            DamagedData: a block does not match its digest.
        """
        if self.n_windows == 0:
            problem = f"{self.store.n_tokens} tokens are less than one window of {self.seq_len + 1}"
            raise DataError("data.seq_len", problem, "use a smaller seq_len or more data")
        return self._read(self.window_numbers(first, count))

    def window_numbers(self, first: int, count: int) -> np.ndarray:
        """Numbers of the windows at those positions of the training order; window w starts at w * seq_len."""
        if first < 0 or count < 0:
            raise ValueError(f"{count} windows from position {first}: neither may be negative")
        positions = np.arange(first, first + count)
        epochs = positions // self.n_windows
        numbers = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epochs).tolist():
            inside = epochs == epoch
            numbers[inside] = self._order_of(epoch).windows(positions[inside] - epoch * self.n_windows)
        return numbers

    def sequential(self, first: int, count: int) -> Windows:
        """Windows `first` to `first + count` in the order of the text, the last one padded with weight 0.

        Raises:
            ValueError: beyond `n_sequential_windows`.
            DamagedData: a block does not match its digest.
        """
        if not 0 <= first <= first + count <= self.n_sequential_windows:
            raise ValueError(f"windows {first} to {first + count} are outside 0 to {self.n_sequential_windows}")
        return self._read(np.arange(first, first + count))

    def _order_of(self, epoch: int) -> EpochOrder:
        if epoch not in self._orders:
            # A batch touches two neighbouring epochs at most, unless it is longer than an epoch.
            self._orders = {known: order for known, order in self._orders.items() if known == epoch - 1}
            self._orders[epoch] = EpochOrder(
                self._first_windows, seed=self.seed, epoch=epoch, shuffle_shards=self.shuffle_shards
            )
        return self._orders[epoch]

    def _read(self, numbers: np.ndarray) -> Windows:
        tokens_BT = np.full((len(numbers), self.seq_len + 1), self.store.eod_id, dtype=np.int64)
        weight_BT = np.zeros((len(numbers), self.seq_len), dtype=np.float32)
        starts = []
        for row, number in enumerate(numbers.tolist()):
            begin = number * self.seq_len
            end = min(begin + self.seq_len + 1, self.store.n_tokens)
            tokens_BT[row, : end - begin] = self.store.read(begin, end)
            weight_BT[row, : end - begin - 1] = tokens_BT[row, : end - begin - 1] != self.store.eod_id
            inputs_end = min(begin + self.seq_len, self.store.n_tokens)
            inner = self.store.starts(begin + 1, inputs_end) - begin
            starts.append(np.concatenate([np.zeros(1, dtype=np.int64), inner]))
        return Windows(tokens_BT, starts, weight_BT)
