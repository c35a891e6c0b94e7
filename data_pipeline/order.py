"""The training order as a pure function of (seed, epoch, position): nothing stored, no random stream."""

from __future__ import annotations

import hashlib

import numpy as np

_N_ROUNDS = 8
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


class EpochOrder:
    """Order of one epoch's windows in two closed-form levels.

    The shards are permuted, consecutive groups of `shuffle_shards` of them are formed, and the windows of a
    group are permuted among themselves. Set-up is linear in the number of shards; a position costs a search.

    Args:
        first_windows: number of the first window of each shard, and the total at the end: int64 [shards + 1].
        seed: of the run, any integer.
        epoch: 0 or more.
        shuffle_shards: shards per group, >= 1, or "all".
    """

    def __init__(self, first_windows: np.ndarray, *, seed: int, epoch: int, shuffle_shards: int | str) -> None:
        n_shards = len(first_windows) - 1
        self._keys_of = (seed, epoch)
        self._group_size = n_shards if shuffle_shards == "all" else min(int(shuffle_shards), n_shards)
        shards = permute(np.arange(n_shards), n_shards, round_keys("shards", seed, epoch))
        sizes = np.diff(first_windows)[shards]
        self._first_window_of = first_windows[:-1][shards]
        # Position of each permuted shard's first window, were the windows not permuted inside the groups.
        self._first_positions = np.concatenate([[0], np.cumsum(sizes)])
        self._group_firsts = np.append(self._first_positions[: -1 : self._group_size], self._first_positions[-1])

    def windows(self, positions: np.ndarray) -> np.ndarray:
        """Window numbers at the given positions of the epoch, int64."""
        groups = np.searchsorted(self._group_firsts, positions, side="right") - 1
        shuffled = np.empty(len(positions), dtype=np.int64)
        for group in np.unique(groups).tolist():
            inside = groups == group
            first, end = self._group_firsts[group : group + 2].tolist()
            keys = round_keys("windows", *self._keys_of, group)
            shuffled[inside] = first + permute(positions[inside] - first, end - first, keys)
        shards = np.searchsorted(self._first_positions, shuffled, side="right") - 1
        return self._first_window_of[shards] + shuffled - self._first_positions[shards]


def round_keys(purpose: str, *numbers: int) -> np.ndarray:
    """Keys of the rounds of `permute`, derived from a purpose and integers: uint64 [rounds]."""
    digest = hashlib.blake2b(repr((purpose, *numbers)).encode("ascii"), digest_size=8 * _N_ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8")


def permute(index: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Apply a keyed bijection of 0..n-1 to each index.

    A Feistel network permutes the next power of two, and is repeated until the result is below n.

    Args:
        index: integers in 0..n-1.
        n: size of the set, >= 1.
        keys: from `round_keys`.
    """
    n_bits = max(int(n - 1).bit_length(), 1)
    low_bits = np.uint64((n_bits + 1) // 2)
    low_mask = np.uint64((1 << int(low_bits)) - 1)
    high_mask = np.uint64((1 << (n_bits - int(low_bits))) - 1)
    out = np.asarray(index).astype(np.uint64)
    outside = np.arange(len(out))
    while len(outside):
        low, high = out[outside] & low_mask, out[outside] >> low_bits
        for i, key in enumerate(keys):
            if i % 2 == 0:
                low = low ^ (_mix(high, key) & low_mask)
            else:
                high = high ^ (_mix(low, key) & high_mask)
        out[outside] = (high << low_bits) | low
        # What landed between n and the power of two goes round again until it lands inside.
        outside = outside[out[outside] >= n]
    return out.astype(np.int64)


def _mix(half: np.ndarray, key: np.uint64) -> np.ndarray:
    mixed = (half ^ key) * _MIX_1
    mixed = (mixed ^ (mixed >> np.uint64(29))) * _MIX_2
    return mixed ^ (mixed >> np.uint64(32))
