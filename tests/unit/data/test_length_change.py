"""A run whose windows change their length goes on behind as many tokens of every source, in the same epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data.corpora import numbered_documents, store_of_sizes, write_corpus
from tests.unit.data.test_exactly_once import one_rank_of, settings_of, tokens_of
from transmamba import checkpoint
from transmamba.batches import Batches
from transmamba.data_pipeline.blend import Stage
from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.manifest import Manifest
from transmamba.data_pipeline.mixture import Length, Mixture
from transmamba.data_pipeline.stream import Stream
from transmamba.data_pipeline.tokens import TokenStore
from transmamba.data_position import data_steps_past, lengths_of
from transmamba.ledger import audit
from transmamba.slices import Piece

BATCH = 12


def stream_of(n_tokens: int, seq_len: int, *, shuffle: int | str = "all", seed: int = 7) -> Stream:
    return Stream(store_of_sizes([n_tokens]), seq_len=seq_len, seed=seed, shuffle_shards=shuffle)


def windows(mixture: Mixture, first: int, count: int) -> list[tuple[str, int, int]]:
    """Source, epoch and window of these samples."""
    sources, ranks = mixture.at(np.arange(first, first + count))
    found: list[Any] = [None] * count
    for i, (name, stream) in enumerate(mixture.streams.items()):
        own = np.flatnonzero(sources == i)
        numbers = stream.window_numbers(ranks[own]).tolist() if len(own) else []
        for place, rank, number in zip(own.tolist(), ranks[own].tolist(), numbers, strict=True):
            found[place] = (name, rank // stream.n_windows, number)
    return found


def test_a_run_goes_on_behind_as_many_tokens() -> None:
    # 32 targets are eight windows of 4 or four of 8. After three of 4 there are 12 tokens, so two of 8 are passed.
    short, long = stream_of(33, 4), stream_of(33, 8)
    first, *rest = long.window_numbers(np.arange(2, 8)).tolist()
    extended = Mixture({"a": short}).following([Length(0, 4), Length(3, 8)])
    assert windows(extended, 3, 2) == [("a", 0, first), ("a", 0, rest[0])]
    # The epoch ends behind them, and the next one is whole.
    assert windows(extended, 5, 4) == [("a", 1, number) for number in rest[1:5]]
    assert sorted(rest[1:5]) == [0, 1, 2, 3]
    assert extended.epochs(5) == {"a": 1.0}
    assert extended.epochs(3) == {"a": 0.5}
    # And back again in the middle of the second epoch: one window of 8 read, so two of 4 are passed.
    back = Mixture({"a": short}).following([Length(0, 4), Length(3, 8), Length(6, 4)])
    again = short.window_numbers(np.arange(8 + 2, 16)).tolist()
    assert windows(back, 6, 6) == [("a", 1, number) for number in again]


@pytest.mark.parametrize(
    ("n_targets", "before", "position", "now", "expected"),
    [
        (32, 4, 0, 8, 0),
        (32, 4, 4, 8, 2),
        (32, 4, 5, 8, 3),
        (32, 4, 8, 8, 4),
        (32, 8, 3, 4, 6),
        # 23 tokens are six windows of 4 or four of 7, the last ones padded. Ten epochs are ten epochs.
        (23, 4, 60, 7, 40),
        (23, 4, 61, 7, 41),
        (23, 4, 62, 7, 42),
        # Behind 20 of 23 tokens the last window of 7 is left, behind all of them none.
        (23, 5, 4, 7, 3),
        (23, 5, 3, 7, 3),
        (23, 8, 2, 7, 3),
        (23, 8, 3, 7, 4),
        (100, 1, 99, 100, 1),
    ],
)
def test_positions_by_hand(n_targets: int, before: int, position: int, now: int, expected: int) -> None:
    assert stream_of(n_targets + 1, now).position_after(position, before) == expected


@pytest.mark.parametrize(("shuffle", "passed"), [("all", 0.25), ("all", 0.5), ("all", 0.9), (4, 0.5), (1, 0.5)])
def test_an_epoch_keeps_its_number_of_tokens_and_small_groups_keep_most_of_its_tokens(
    shuffle: int | str, passed: float
) -> None:
    # The orders of both lengths are permutations of their own, but for that of the shards.
    store = store_of_sizes([3000 + 37 * i for i in range(64)])
    short = Stream(store, seq_len=16, seed=1, shuffle_shards=shuffle)
    long, n_read = short.in_windows_of(64), int(passed * short.n_windows)
    numbers = np.arange(n_read), np.arange(long.position_after(n_read, 16), long.n_windows)
    times = np.zeros(store.n_tokens, dtype=np.int64)
    for stream, positions in zip((short, long), numbers, strict=True):
        firsts = stream.window_numbers(positions) * stream.seq_len
        targets = firsts[:, None] + np.arange(stream.seq_len)
        np.add.at(times, targets[targets < store.n_tokens - 1], 1)
    assert abs(store.n_tokens - 1 - times.sum()) < 2 * 64
    twice, never = np.mean(times == 2), np.mean(times == 0)
    if shuffle == "all":
        assert twice == pytest.approx(passed * (1 - passed), abs=0.01)
        assert never == pytest.approx(passed * (1 - passed), abs=0.01)
    else:
        assert max(twice, never) < 0.03


def test_a_length_that_the_source_never_had_is_refused() -> None:
    with pytest.raises(DataError, match="5 tokens are less than one window of 9"):
        stream_of(5, 2).position_after(3, 8)


def test_samples_before_the_last_change_are_out_of_reach() -> None:
    extended = Mixture({"a": stream_of(33, 4)}).following([Length(0, 4), Length(3, 8)])
    with pytest.raises(ValueError, match="before sample 3"):
        extended.rows(2, 1)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(data=st.data())
def test_every_source_goes_on_as_if_counted_by_hand(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(60, 400), min_size=1, max_size=3))
    names = [str(i) for i in range(len(sizes))]
    weights = st.fixed_dictionaries({name: st.integers(0, 4).map(float) for name in names}).filter(
        lambda found: any(found.values())
    )
    stages = [Stage(first, data.draw(weights)) for first in [0, *sorted(data.draw(st.sets(st.integers(1, 150))))][:4]]
    changes = sorted(data.draw(st.sets(st.integers(1, 150), max_size=4)))
    lengths = [Length(first, data.draw(st.integers(1, 40))) for first in (0, *changes)]
    seed, shuffle = data.draw(st.integers(0, 2**40)), data.draw(st.sampled_from([1, 2, "all"]))

    def stream(i: int, seq_len: int) -> Stream:
        shards = [sizes[i] // 3, sizes[i] - sizes[i] // 3]
        return Stream(store_of_sizes(shards), seq_len=seq_len, seed=seed, shuffle_shards=shuffle)

    whole = Mixture({name: stream(int(name), 9) for name in names}, stages)
    sources, _ = whole.blend.at(np.arange(200))
    # By hand: the epoch of every source, and its windows passed within it.
    epochs, passed = [0] * len(names), [0] * len(names)
    for n, (first, seq_len), end in zip(range(len(lengths)), lengths, [*changes, 200], strict=True):
        streams = [stream(i, seq_len) for i in range(len(names))]
        for i in range(len(names)):
            n_tokens = passed[i] * lengths[max(n - 1, 0)].seq_len
            passed[i] = next(k for k in range(1000) if k * seq_len >= n_tokens)
        expected, orders = [], {}
        for source in sources[first:end].tolist():
            n_windows = streams[source].n_windows
            if passed[source] >= n_windows:
                epochs[source], passed[source] = epochs[source] + 1, 0
            order = orders.setdefault((source, epochs[source]), [])
            if not order:
                whole_epoch = epochs[source] * n_windows + np.arange(n_windows)
                order += streams[source].window_numbers(whole_epoch).tolist()
            expected.append((names[source], epochs[source], order[passed[source]]))
            passed[source] += 1
        mixture = whole.following(lengths[: n + 1])
        assert windows(mixture, first, end - first) == expected
        # Whoever comes in the middle finds the same.
        middle = (first + end) // 2
        assert windows(whole.following(lengths[: n + 1]), middle, end - middle) == expected[middle - first :]
        for i, one in enumerate(streams):
            if passed[i] == one.n_windows:  # a whole epoch, which leaves nothing to count
                epochs[i], passed[i] = epochs[i] + 1, 0


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    lengths = [[7, 2, 31, 13, 5, 3] * 4, [61, 1, 1, 90, 33, 7, 128, 40, 19, 3, 77]]
    return [
        write_corpus(tmp_path_factory.mktemp(f"data{i}"), numbered_documents(own), shard_tokens=96, block_tokens=32)
        for i, own in enumerate(lengths)
    ]


def fresh(corpora: list[Manifest], seq_len: int, stages: list[Stage]) -> Mixture:
    streams = {
        str(i): Stream(TokenStore(manifest, "train"), seq_len=seq_len, seed=3, shuffle_shards=2)
        for i, manifest in enumerate(corpora)
    }
    return Mixture(streams, stages)


STAGES = [Stage(0, {"0": 1.0, "1": 2.0}), Stage(5 * BATCH, {"0": 1.0})]
SKIP = ["1:3", "6:7"]
# Changes at steps 2 and 4, which are data steps 4 and 7: the range that comes next is still ahead of the second.
LENGTHS = [Length(0, 5), Length(4 * BATCH, 11), Length(6 * BATCH, 3)]


def length_at(step: int) -> int:
    return 1 + (step >= 2) + (step >= 4)


@pytest.mark.parametrize(("dp", "ahead"), [(1, 0), (2, 0), (3, 0), (4, 0), (6, 0), (1, 2)])
def test_ranks_micro_batches_restarts_and_the_reader_see_the_same_after_a_change(
    corpora: list[Manifest], dp: int, ahead: int
) -> None:
    for step in range(6):
        known = LENGTHS[: length_at(step)]
        # Whatever length the streams begin with, the last one counts.
        single = fresh(corpora, known[-1].seq_len, STAGES).following(known)
        several = fresh(corpora, 8, STAGES).following(known)
        whole = Batches(single, settings_of(BATCH, BATCH, SKIP), one_rank_of(1, 0))
        expected = tokens_of(whole.of_step(step, [0]))
        assert {len(row) for row in expected} == {known[-1].seq_len + 1}
        ranks = [Batches(several, settings_of(BATCH, 1, SKIP, ahead), one_rank_of(dp, rank)) for rank in range(dp)]
        try:
            assert [row for rank in ranks for row in tokens_of(rank.of_step(step, [0]))] == expected
        finally:
            for rank in ranks:
                rank.close()


def manifest_of(step: int, seq_len: int, skip: list[str], recorded: list[Length] | None = None) -> dict[str, Any]:
    config = {"data": {"seq_len": seq_len, "skip": skip}, "train": {"global_batch": BATCH}}
    data = {} if recorded is None else {"lengths": [list(length) for length in recorded]}
    return {"step": step, "config": config, "data": data}


def test_a_checkpoint_tells_the_lengths_so_far() -> None:
    assert lengths_of(manifest_of(9, 5, []), 5) == [(0, 5)]
    assert lengths_of(manifest_of(9, 5, []), 11) == [(0, 5), (9 * BATCH, 11)]
    assert lengths_of(manifest_of(0, 5, []), 11) == [(0, 11)]
    assert lengths_of(manifest_of(2, 5, SKIP), 11) == LENGTHS[:2]
    assert lengths_of(manifest_of(3, 11, SKIP, LENGTHS[:2]), 11) == LENGTHS[:2]
    assert lengths_of(manifest_of(4, 11, SKIP, LENGTHS[:2]), 3) == LENGTHS


def test_a_range_to_skip_that_comes_next_may_still_go() -> None:
    # Data steps 6 to 8 were to be skipped next. What the run reads then has the new length either way.
    assert data_steps_past(4, SKIP) == 6
    (*_, now) = lengths_of(manifest_of(4, 11, SKIP, LENGTHS[:2]), 3)
    assert now.first == 6 * BATCH


@pytest.mark.parametrize("saved", [2, 4, 5, 6])
def test_the_audit_follows_a_run_across_changes(corpora: list[Manifest], tmp_path: Path, saved: int) -> None:
    dps = [1, 2, 3, 1, 4, 2]
    for step, dp in enumerate(dps):
        known = LENGTHS[: length_at(step)]
        mixture = fresh(corpora, known[-1].seq_len, STAGES).following(known)
        for rank in range(dp):
            batches = Batches(mixture, settings_of(BATCH, 1, SKIP), one_rank_of(dp, rank), tmp_path)
            batches.of_step(step, [0])
            batches.close()
    # The newest checkpoint may lie before the last change, which the run made when it went on from there.
    known = LENGTHS[: length_at(saved - 1)]
    manifest = manifest_of(saved, known[-1].seq_len, SKIP, known if len(known) > 1 else None)
    record = {key: manifest[key] for key in ("config", "data")}
    checkpoint.save(tmp_path / "checkpoints", saved, [Piece("w", "master", (1,), 0, torch.ones(1))], record)
    n_steps, faults = audit(tmp_path, fresh(corpora, 3 if saved >= 4 else 11, STAGES), BATCH)
    assert n_steps == len(dps)
    if saved >= 4:
        assert faults == []
    else:
        assert faults and all(fault.startswith(("step 4", "step 5")) for fault in faults)
