"""The order is a keyed bijection in two levels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transmamba.data_pipeline.order import EpochOrder, permute, round_keys


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.integers(1, 5000), st.integers())
def test_permute_is_a_bijection(n: int, seed: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, round_keys("test", seed))), np.arange(n))


def test_permute_is_a_bijection_beyond_32_bits() -> None:
    n = (1 << 40) + 12345
    index = np.arange(n - 100_000, n)
    out = permute(index, n, round_keys("test", 1))
    assert len(np.unique(out)) == len(index)
    assert out.min() >= 0
    assert out.max() < n
    # Neighbours are spread over the whole range.
    assert out.min() < n // 100
    assert out.max() > n - n // 100


@pytest.mark.parametrize("n", [2, 3, 7, 16, 23])
def test_every_element_reaches_every_place_equally_often(n: int) -> None:
    n_keys = 100 * n
    counts = np.zeros((n, n))
    for seed in range(n_keys):
        counts[np.arange(n), permute(np.arange(n), n, round_keys("test", seed))] += 1
    expected = n_keys / n
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    # A uniform permutation has mean (n-1)^2 and deviation sqrt(2) (n-1); five of those is one in a million.
    assert chi_square < (n - 1) ** 2 + 5 * 2**0.5 * (n - 1)


def test_neighbours_do_not_stay_neighbours() -> None:
    n = 10_007
    out = permute(np.arange(n), n, round_keys("test", 3))
    assert np.mean(np.abs(np.diff(out)) <= 2) < 0.002


def test_keys_depend_on_every_part() -> None:
    parts = [("a", 1, 2, 3), ("b", 1, 2, 3), ("a", 2, 2, 3), ("a", 1, 3, 3), ("a", 1, 2, 4), ("a", 12, 3)]
    assert len({round_keys(*part).tobytes() for part in parts}) == len(parts)


def test_the_windows_of_a_group_are_those_of_its_shards_and_mixed() -> None:
    first_windows = np.arange(0, 13) * 50
    order = EpochOrder(first_windows, seed=5, epoch=0, shuffle_shards=3)
    numbers = order.windows(np.arange(600)).reshape(4, 150)
    seen: set[int] = set()
    for group in numbers:
        shards = set((group // 50).tolist())
        assert len(shards) == 3
        assert not shards & seen
        seen |= shards
        # Mixed: the first third of the group is not one shard.
        assert len(set((group[:50] // 50).tolist())) == 3


@pytest.mark.parametrize("shuffle_shards", [1, 2, 5, "all"])
def test_a_position_alone_gives_the_same_window_as_in_a_batch(shuffle_shards: int | str) -> None:
    first_windows = np.array([0, 3, 3, 10, 11, 40])
    order = EpochOrder(first_windows, seed=2, epoch=7, shuffle_shards=shuffle_shards)
    whole = order.windows(np.arange(40))
    assert [int(order.windows(np.array([p]))[0]) for p in range(40)] == whole.tolist()
    assert sorted(whole.tolist()) == list(range(40))


@pytest.mark.parametrize(
    ("shuffle_shards", "expected"),
    [(2, [15324, 23260, 21939, 33679, 285]), ("all", [25166, 11131, 10652, 23723, 16564])],
)
def test_the_order_of_a_run_that_has_begun_never_changes(shuffle_shards: int | str, expected: list[int]) -> None:
    order = EpochOrder(np.array([0, 3000, 3000, 10000, 11000, 40000]), seed=2, epoch=7, shuffle_shards=shuffle_shards)
    # A run resumed by a later version goes on in the order of the earlier one.
    positions = [0, 1, 2, 10500, 39999]
    assert order.windows(np.array(positions)).tolist() == expected
    assert order.windows(np.arange(40000))[positions].tolist() == expected
