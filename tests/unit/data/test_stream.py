"""Every token is trained on exactly once per epoch, in an order that no layout or restart can change."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data.corpora import EOD, numbered_documents, store_of_sizes
from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.manifest import Manifest
from transmamba.data_pipeline.stream import Stream, Windows
from transmamba.data_pipeline.tokens import TokenStore

MakeCorpus = Callable[..., Manifest]
LENGTHS = [5, 61, 2, 2, 90, 33, 7, 128, 40, 19, 3, 77]


def joined(parts: list[Windows]) -> Windows:
    return Windows(
        np.concatenate([part.tokens_BT for part in parts]),
        [row for part in parts for row in part.starts],
        np.concatenate([part.weight_BT for part in parts]),
    )


def assert_equal_windows(one: Windows, other: Windows) -> None:
    assert np.array_equal(one.tokens_BT, other.tokens_BT)
    assert np.array_equal(one.weight_BT, other.weight_BT)
    assert [row.tolist() for row in one.starts] == [row.tolist() for row in other.starts]


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=12),
    seq_len=st.integers(1, 40),
    shuffle_shards=st.one_of(st.integers(1, 13), st.just("all")),
    seed=st.integers(0, 2**63),
    cuts=st.lists(st.integers(0, 10_000), max_size=5),
)
def test_every_window_comes_once_per_epoch_whatever_the_shards_and_restarts(
    sizes: list[int], seq_len: int, shuffle_shards: int | str, seed: int, cuts: list[int]
) -> None:
    def fresh() -> Stream:
        return Stream(store_of_sizes(sizes), seq_len=seq_len, seed=seed, shuffle_shards=shuffle_shards)

    n, n_targets = fresh().n_windows, sum(sizes) - 1
    assert n == (-(-n_targets // seq_len) if n_targets >= seq_len else 0)
    if n == 0:
        return
    whole = fresh().window_numbers(np.arange(3 * n))
    for epoch in range(3):
        assert np.array_equal(np.sort(whole[epoch * n : (epoch + 1) * n]), np.arange(n))
    bounds = [0, *sorted(cut % (3 * n) for cut in cuts), 3 * n]
    resumed = [fresh().window_numbers(np.arange(a, b)) for a, b in itertools.pairwise(bounds)]
    assert np.array_equal(np.concatenate(resumed), whole)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    store = store_of_sizes([1000, 1000])
    one = Stream(store, seq_len=10, seed=1, shuffle_shards="all")
    other = Stream(store, seq_len=10, seed=2, shuffle_shards="all")
    epochs = one.window_numbers(np.arange(2 * one.n_windows)).reshape(2, -1)
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], other.window_numbers(np.arange(one.n_windows)))


@pytest.mark.parametrize("shuffle_shards", [1, 2, "all"])
def test_every_token_but_the_first_is_a_target_once_per_epoch(
    make_corpus: MakeCorpus, shuffle_shards: int | str
) -> None:
    store = TokenStore(make_corpus(LENGTHS), "train")
    stream = Stream(store, seq_len=13, seed=3, shuffle_shards=shuffle_shards)
    windows = stream.rows(0, stream.n_windows)
    n_targets = store.n_tokens - 1
    assert 0 < windows.tokens_BT[:, 1:].size - n_targets < 13
    # A target that follows a document's end has no weight, nor has padding.
    everything = store.read(0, store.n_tokens)
    counted = everything[1:][everything[:-1] != EOD]
    assert np.array_equal(np.sort(windows.tokens_BT[:, 1:][windows.weight_BT]), np.sort(counted))


@pytest.mark.parametrize("first", [0, 24, 30])
@pytest.mark.parametrize(("n_ranks", "micro_batch"), [(1, 1), (1, 12), (2, 3), (3, 2), (4, 3), (6, 1)])
def test_a_global_batch_is_the_same_for_every_split_into_ranks_and_micro_batches(
    make_corpus: MakeCorpus, first: int, n_ranks: int, micro_batch: int
) -> None:
    manifest = make_corpus(LENGTHS)
    global_batch = 12

    def fresh() -> Stream:
        return Stream(TokenStore(manifest, "train"), seq_len=13, seed=3, shuffle_shards=2)

    per_rank = global_batch // n_ranks
    parts = [
        stream.rows(first + rank * per_rank + offset, micro_batch)
        for rank, stream in ((rank, fresh()) for rank in range(n_ranks))
        for offset in range(0, per_rank, micro_batch)
    ]
    assert_equal_windows(joined(parts), fresh().rows(first, global_batch))


def test_a_batch_may_be_longer_than_an_epoch(make_corpus: MakeCorpus) -> None:
    stream = Stream(TokenStore(make_corpus([50, 60]), "train"), seq_len=20, seed=3, shuffle_shards="all")
    assert stream.n_windows == 6  # 109 targets
    assert_equal_windows(stream.rows(0, 13), joined([stream.rows(p, 1) for p in range(13)]))


def test_document_starts_and_weights_are_those_of_the_text(make_corpus: MakeCorpus) -> None:
    manifest = make_corpus(LENGTHS)
    stream = Stream(TokenStore(manifest, "train"), seq_len=13, seed=3, shuffle_shards="all")
    everything = np.concatenate(numbered_documents(LENGTHS))
    starts = np.cumsum([0, *LENGTHS])[:-1]
    windows = stream.rows(0, stream.n_windows)
    numbers = stream.window_numbers(np.arange(stream.n_windows)).tolist()
    for row, number in enumerate(numbers):
        begin = 13 * number
        n_real = min(14, len(everything) - begin)
        assert windows.tokens_BT[row].tolist() == [*everything[begin : begin + 14].tolist(), *[EOD] * (14 - n_real)]
        inside = starts[(starts > begin) & (starts < begin + 13)] - begin
        assert windows.starts[row].tolist() == [0, *inside.tolist()]
        weight = (everything[begin : begin + 13] != EOD).tolist()
        assert windows.weight_BT[row].tolist() == [*weight, *[False] * (13 - len(weight))]
    assert 0 < windows.weight_BT.mean() < 1
    assert windows.tokens_BT.dtype == np.int64
    assert windows.weight_BT.dtype == np.bool_


@pytest.mark.parametrize("seq_len", [1, 13, 31, 465, 466])
def test_the_last_window_is_padded_alike_in_training_and_in_order(make_corpus: MakeCorpus, seq_len: int) -> None:
    stream = Stream(TokenStore(make_corpus(LENGTHS), "train"), seq_len=seq_len, seed=3, shuffle_shards=2)
    numbers = stream.window_numbers(np.arange(stream.n_windows))
    shuffled, ordered = stream.rows(0, stream.n_windows), stream.sequential(0, stream.n_sequential_windows)
    assert_equal_windows(
        shuffled,
        Windows(ordered.tokens_BT[numbers], [ordered.starts[n] for n in numbers], ordered.weight_BT[numbers]),
    )


def test_empty_documents_and_padding_begin_none() -> None:
    tokens = np.array([[5, EOD, EOD, 7, 8, EOD, 9], [EOD, EOD, 4, EOD, EOD, EOD, EOD]])
    windows = Windows.of_tokens(tokens, EOD)
    assert [row.tolist() for row in windows.starts] == [[0, 3], [0, 2]]
    assert windows.weight_BT.tolist() == [[True, False, False, True, True, False], [False, False, True] + 3 * [False]]


@pytest.mark.parametrize("seq_len", [1, 13, 31, 466, 467, 1000])
def test_sequential_windows_cover_the_text_in_order_and_pad_the_last_with_weight_0(
    make_corpus: MakeCorpus, seq_len: int
) -> None:
    store = TokenStore(make_corpus(LENGTHS), "train")
    stream = Stream(store, seq_len=seq_len, seed=3, shuffle_shards="all")
    windows = stream.sequential(0, stream.n_sequential_windows)
    everything = np.concatenate(numbered_documents(LENGTHS))
    n_targets = len(everything) - 1
    assert np.array_equal(windows.tokens_BT[:, 1:].ravel()[:n_targets], everything[1:])
    assert np.array_equal(windows.tokens_BT[:, :-1].ravel()[:n_targets], everything[:-1])
    assert np.array_equal(windows.weight_BT.ravel()[:n_targets], everything[:-1] != EOD)
    padding = windows.tokens_BT[:, 1:].ravel()[n_targets:]
    assert np.all(padding == EOD)
    assert not windows.weight_BT.ravel()[n_targets:].any()
    assert len(padding) < seq_len
    with pytest.raises(ValueError, match="outside"):
        stream.sequential(0, stream.n_sequential_windows + 1)


def test_tokens_are_counted_whatever_the_shards(make_corpus: MakeCorpus) -> None:
    store = TokenStore(make_corpus(LENGTHS), "train")
    counts = Stream(store, seq_len=13, seed=3, shuffle_shards="all").token_counts()
    assert counts.tolist() == np.bincount(store.read(0, store.n_tokens)).tolist()


def test_a_split_shorter_than_a_window_is_refused_with_both_numbers(make_corpus: MakeCorpus) -> None:
    stream = Stream(TokenStore(make_corpus([50]), "train"), seq_len=50, seed=3, shuffle_shards="all")
    assert stream.n_windows == 0
    with pytest.raises(DataError, match=r"50 tokens are less than one window of 51"):
        stream.rows(0, 1)


def test_a_negative_position_is_refused() -> None:
    with pytest.raises(ValueError, match="position -1 is negative"):
        Stream(store_of_sizes([9]), seq_len=2, seed=0, shuffle_shards=1).window_numbers(np.array([-1, 0]))


@pytest.mark.parametrize(("seq_len", "shuffle_shards"), [(0, 1), (4, 0), (4, "some"), (4, 1.5)])
def test_options_out_of_range_are_refused(seq_len: int, shuffle_shards: int | str) -> None:
    with pytest.raises(DataError):
        Stream(store_of_sizes([9]), seq_len=seq_len, seed=0, shuffle_shards=shuffle_shards)


def test_groups_of_one_shard_are_read_shard_by_shard_in_another_order_each_epoch() -> None:
    sizes = [25, 37, 101, 58, 66, 83]
    stream = Stream(store_of_sizes(sizes), seq_len=10, seed=4, shuffle_shards=1)
    shard_orders = set()
    for epoch in range(4):
        numbers = stream.window_numbers(epoch * stream.n_windows + np.arange(stream.n_windows))
        # A window belongs to the shard of its first token.
        shards = np.searchsorted(np.cumsum(sizes), numbers * 10, side="right")
        runs = [shard for shard, _ in itertools.groupby(shards.tolist())]
        assert sorted(runs) == list(range(len(sizes)))
        shard_orders.add(tuple(runs))
    assert len(shard_orders) == 4
