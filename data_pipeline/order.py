"""The training order as a pure function of (seed, epoch, position): nothing stored, no random stream."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

_N_ROUNDS = 8
_Round = Callable[[np.ndarray], np.ndarray]
# The finalizer of MurmurHash3 (Austin Appleby, public domain).
_MIX_1, _MIX_2 = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)


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
        self._shards = shards
        sizes = np.diff(first_windows)[shards]
        self._first_window_of = first_windows[:-1][shards]
        # Position of each permuted shard's first window, were the windows not permuted inside the groups.
        self._first_positions = np.concatenate([[0], np.cumsum(sizes)])
        self._group_firsts = np.append(self._first_positions[: -1 : self._group_size], self._first_positions[-1])

    def windows(self, positions: np.ndarray) -> np.ndarray:
        """Window numbers at the given positions of the epoch, int64."""
        if len(self._group_firsts) == 2:
            return self._unpermuted(permute(positions, int(self._group_firsts[1]), self._keys(0)))
        groups = np.searchsorted(self._group_firsts, positions, side="right") - 1
        shuffled = np.empty(len(positions), dtype=np.int64)
        for group in np.unique(groups).tolist():
            inside = groups == group
            first, end = self._group_firsts[group : group + 2].tolist()
            shuffled[inside] = first + permute(positions[inside] - first, end - first, self._keys(group))
        return self._unpermuted(shuffled)

    def _keys(self, group: int) -> np.ndarray:
        return round_keys("windows", *self._keys_of, group)

    def _unpermuted(self, shuffled: np.ndarray) -> np.ndarray:
        """Window numbers at places of the line of permuted shards."""
        shards = np.searchsorted(self._first_positions, shuffled, side="right") - 1
        return self._first_window_of[shards] + shuffled - self._first_positions[shards]

    def group_of(self, position: int) -> tuple[int, int, int]:
        """The group of shards that a position of the epoch reads from, its first position, and the next one's."""
        group = int(np.searchsorted(self._group_firsts, position, side="right")) - 1
        first, end = self._group_firsts[group : group + 2].tolist()
        return group, first, end

    def shards_of(self, group: int) -> list[int]:
        """The shards of a group; none beyond the last one."""
        return self._shards[group * self._group_size : (group + 1) * self._group_size].tolist()


def round_keys(purpose: str, *numbers: int) -> np.ndarray:
    """Keys of the rounds of `permute`, derived from a purpose and integers: uint32 [rounds]."""
    digest = hashlib.blake2b(repr((purpose, *numbers)).encode("ascii"), digest_size=4 * _N_ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u4")


def permute(index: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Apply a keyed bijection of 0..n-1 to each index.

    A Feistel network permutes the next power of two, and is repeated until the result is below n.

    Args:
        index: integers in 0..n-1.
        n: size of the set, 1 to 2^63.
        keys: from `round_keys`.
    """
    n_bits = max(int(n - 1).bit_length(), 1)
    low_bits = (n_bits + 1) // 2
    rounds = [partial(_mix, key=key) for key in keys]
    if 1 << low_bits <= len(index):
        # Halves have fewer values than there are numbers: all rounds are looked up.
        rounds = [mix(np.arange(1 << low_bits)).take for mix in rounds]
    out = _permute_bits(np.asarray(index, dtype=np.int64), rounds, low_bits, n_bits - low_bits)
    outside = np.flatnonzero(out >= n)
    while len(outside):
        # What landed between n and the power of two goes round again until it lands inside.
        moved = _permute_bits(out[outside], rounds, low_bits, n_bits - low_bits)
        out[outside] = moved
        outside = outside[moved >= n]
    return out


def _permute_bits(numbers: np.ndarray, rounds: Sequence[_Round], low_bits: int, high_bits: int) -> np.ndarray:
    low_mask, high_mask = (1 << low_bits) - 1, (1 << high_bits) - 1
    low, high = numbers & low_mask, numbers >> low_bits
    for i, mix in enumerate(rounds):
        if i % 2 == 0:
            low ^= mix(high) & low_mask
        else:
            high ^= mix(low) & high_mask
    return (high << low_bits) | low


def _mix(half: np.ndarray, key: np.uint32) -> np.ndarray:
    mixed = half.astype(np.uint32) ^ key
    mixed ^= mixed >> np.uint32(16)
    mixed *= _MIX_1
    mixed ^= mixed >> np.uint32(13)
    mixed *= _MIX_2
    mixed ^= mixed >> np.uint32(16)
    return mixed.astype(np.int64)
