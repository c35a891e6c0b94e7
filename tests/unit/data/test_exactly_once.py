"""A global batch has one content and order, whatever the ranks, micro-batches, stops and readers; an epoch is exact."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data.corpora import EOD, numbered_documents, store_of_sizes, write_corpus
from transmamba.batches import Batches, MicroBatch
from transmamba.data_pipeline import stream as stream_module
from transmamba.data_pipeline.blend import Stage
from transmamba.data_pipeline.manifest import Manifest
from transmamba.data_pipeline.mixture import Mixture
from transmamba.data_pipeline.order import EpochOrder
from transmamba.data_pipeline.stream import Stream
from transmamba.data_pipeline.tokens import TokenStore
from transmamba.ledger import audit, read_ledger

RANKS = (1, 2, 3, 4, 6, 8)
SEQ_LEN = 5


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    """Folders of one tiny shard, of primes, of a single window, and of many shards with cut documents."""
    lengths = [[SEQ_LEN + 1], [7, 2, 31, 13, 5, 3], [2] * 40, [61, 1, 1, 90, 33, 7, 128, 40, 19, 3, 77]]
    sizes = [(1000, 1000), (17, 11), (13, 13), (96, 32)]
    return [
        write_corpus(
            tmp_path_factory.mktemp(f"data{i}"), numbered_documents(own), shard_tokens=shard, block_tokens=block
        )
        for i, (own, (shard, block)) in enumerate(zip(lengths, sizes, strict=True))
    ]


def one_rank_of(dp: int, dp_rank: int) -> Any:
    """What batches ask of a topology, without process groups: sums stay local."""
    return SimpleNamespace(
        device=torch.device("cpu"),
        dp=dp,
        dp_rank=dp_rank,
        is_first_of_rows=True,
        shards=SimpleNamespace(own_tokens=lambda tensor: tensor),
        sum_rows=lambda values: values,
    )


def settings_of(global_batch: int, micro_batch: int, skip: list[str], ahead: int = 0) -> Any:
    """The part of a configuration that batches read."""
    return SimpleNamespace(
        data=SimpleNamespace(document_mask=True, skip=skip, prefetch=ahead),
        train=SimpleNamespace(global_batch=global_batch, micro_batch=micro_batch),
        watchdog=SimpleNamespace(limit_s=20.0),
    )


def tokens_of(micro_batches: list[MicroBatch]) -> list[list[int]]:
    """Inputs and last target of every row, in order."""
    return [
        [*ids, targets[-1]]
        for batch in micro_batches
        for ids, targets in zip(batch.ids_BT.tolist(), batch.targets_BT.tolist(), strict=True)
    ]


@settings(max_examples=120, derandomize=True, deadline=None)
@given(data=st.data())
def test_a_global_batch_is_the_same_for_every_schedule_of_ranks_stops_and_micro_batches(
    corpora: list[Manifest], data: st.DataObject
) -> None:
    check_a_schedule(corpora, data)


@pytest.mark.long
@settings(max_examples=1000, deadline=None)
@given(data=st.data())
def test_a_global_batch_is_the_same_for_a_thousand_schedules(corpora: list[Manifest], data: st.DataObject) -> None:
    check_a_schedule(corpora, data)


def check_a_schedule(corpora: list[Manifest], data: st.DataObject) -> None:
    """A run with a random blend, stages and skips, once in one piece and once with stops and other ranks."""
    chosen = data.draw(st.lists(st.sampled_from(range(len(corpora))), min_size=1, max_size=3, unique=True))
    shuffle = data.draw(st.sampled_from([1, 2, 3, "all"]))
    seed = data.draw(st.integers(0, 2**40))
    first_stage = {str(i): float(data.draw(st.integers(1, 5))) for i in chosen}
    stages = [Stage(0, first_stage)]
    if data.draw(st.booleans()):
        stages.append(Stage(data.draw(st.integers(1, 60)), {str(chosen[0]): 1.0}))

    def fresh() -> Mixture:
        streams = {
            str(i): Stream(TokenStore(corpora[i], "train"), seq_len=SEQ_LEN, seed=seed, shuffle_shards=shuffle)
            for i in chosen
        }
        return Mixture(streams, stages)

    global_batch = 24
    skip = data.draw(st.sampled_from([[], ["1:2"], ["0:3", "4:5"]]))
    n_steps = data.draw(st.integers(1, 4))
    whole = Batches(fresh(), settings_of(global_batch, 24, skip), one_rank_of(1, 0))
    expected = [tokens_of(whole.of_step(step, [0])) for step in range(n_steps)]

    # A job that stops and goes on with other ranks and micro-batches, and now and then repeats a step.
    segment = st.tuples(st.sampled_from(RANKS), st.sampled_from([1, 2, 3, 4, 24]), st.integers(1, 3), st.booleans())
    step = 0
    for dp, micro_batch, n_more, repeats in [*data.draw(st.lists(segment, max_size=3)), (1, 24, n_steps, False)]:
        size = micro_batch if 24 // dp % micro_batch == 0 else 1
        mixture = fresh()
        ranks = [Batches(mixture, settings_of(global_batch, size, skip), one_rank_of(dp, rank)) for rank in range(dp)]
        for now in range(max(step - repeats, 0), min(step + n_more, n_steps)):
            assert [row for rank in ranks for row in tokens_of(rank.of_step(now, [0]))] == expected[now]
        step = min(step + n_more, n_steps)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(1, 97), min_size=1, max_size=9), min_size=1, max_size=3),
    weights=st.lists(st.integers(1, 6), min_size=3, max_size=3),
    shuffle=st.one_of(st.integers(1, 10), st.just("all")),
    seed=st.integers(0, 2**63),
)
def test_every_epoch_of_every_source_holds_every_window_once(
    sizes: list[list[int]], weights: list[int], shuffle: int | str, seed: int
) -> None:
    stores = [store_of_sizes(own) for own in sizes if sum(own) > SEQ_LEN + 1]
    if not stores:
        return
    streams = {
        str(i): Stream(store, seq_len=SEQ_LEN, seed=seed, shuffle_shards=shuffle) for i, store in enumerate(stores)
    }
    mixture = Mixture(streams, [Stage(0, {name: float(weights[int(name)]) for name in streams})])
    total = sum(weights[int(name)] for name in streams)
    n = max(3 * stream.n_windows * total // weights[int(name)] + total for name, stream in streams.items())
    sources, ranks = mixture.blend.at(np.arange(n))
    for name, stream in streams.items():
        numbers = stream.window_numbers(ranks[sources == int(name)])
        for epoch in range(3):
            part = numbers[epoch * stream.n_windows : (epoch + 1) * stream.n_windows]
            assert np.array_equal(np.sort(part), np.arange(stream.n_windows))


def test_a_batch_that_crosses_look_ups_and_epochs_is_made_of_its_rows(corpora: list[Manifest]) -> None:
    def fresh() -> Mixture:
        return Mixture({"a": Stream(TokenStore(corpora[3], "train"), seq_len=SEQ_LEN, seed=1, shuffle_shards="all")})

    first = 3 * 64 - 7
    together = fresh().rows(first, 20)
    alone = [fresh().rows(first + i, 1) for i in range(20)]
    assert np.array_equal(together.tokens_BT, np.concatenate([row.tokens_BT for row in alone]))
    assert np.array_equal(together.weight_BT, together.tokens_BT[:, :-1] != EOD)
    assert [starts.tolist() for starts in together.starts] == [row.starts[0].tolist() for row in alone]
    assert np.array_equal(fresh().tokens(first, 20), together.tokens_BT)
    with pytest.raises(ValueError, match="negative"):
        fresh().rows(-1, 1)


def test_a_source_of_one_window_makes_no_look_up_long(corpora: list[Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    made = Counter[str]()

    def counted(*args: Any, **options: Any) -> EpochOrder:
        made["orders"] += 1
        return EpochOrder(*args, **options)

    monkeypatch.setattr(stream_module, "EpochOrder", counted)
    streams = {
        name: Stream(TokenStore(corpora[i], "train"), seq_len=SEQ_LEN, seed=1, shuffle_shards="all")
        for name, i in {"one": 0, "many": 3}.items()
    }
    mixture = Mixture(streams, [Stage(0, {"one": 1.0, "many": 1.0})])
    assert (streams["one"].n_windows, streams["many"].n_windows) == (1, 92)
    mixture.samples(0, 8)
    assert 8 <= made["orders"] < 20


@pytest.mark.parametrize("dps", [(1, 2, 4), (3, 1), (2, 2)])
def test_the_ledger_names_every_window_of_every_step_once_and_its_audit_agrees(
    corpora: list[Manifest], tmp_path: Path, dps: tuple[int, ...]
) -> None:
    def fresh() -> Mixture:
        streams = {
            str(i): Stream(TokenStore(corpora[i], "train"), seq_len=SEQ_LEN, seed=3, shuffle_shards=2) for i in (1, 3)
        }
        return Mixture(streams, [Stage(0, {"1": 1.0, "3": 2.0})])

    step = 0
    for dp in dps:
        ranks = [Batches(fresh(), settings_of(12, 1, ["1:3"]), one_rank_of(dp, i), tmp_path) for i in range(dp)]
        # The last step before a stop is done again by those who go on.
        for now in range(max(step - 1, 0), step + 2):
            for rank in ranks:
                rank.of_step(now, [0])
        step += 2
        for rank in ranks:
            rank.close()
    positions: dict[int, Counter[int]] = {}
    for record in read_ledger(tmp_path):
        positions.setdefault(record["step"], Counter()).update(sample[0] for sample in record["samples"])
    skipped = [0, *range(3, 2 * len(dps) + 2)]
    for now, found in positions.items():
        first = 12 * skipped[now]
        assert sorted(found) == list(range(first, first + 12))
    assert audit(tmp_path, fresh(), 12) == (2 * len(dps), [])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda line: line.replace('"data_step":0', '"data_step":1'), "instead of positions 12 to 24"),
        (lambda line: line.replace('[0,"', '[1,"', 1), "is not what position 1 holds"),
        (lambda line: "", "6 windows instead of positions 0 to 12"),
    ],
)
def test_the_audit_finds_a_wrong_line(
    corpora: list[Manifest], tmp_path: Path, change: Callable[[str], str], words: str
) -> None:
    mixture = Mixture({"a": Stream(TokenStore(corpora[3], "train"), seq_len=SEQ_LEN, seed=3, shuffle_shards=2)})
    for rank in range(2):
        batches = Batches(mixture, settings_of(12, 1, []), one_rank_of(2, rank), tmp_path)
        batches.of_step(0, [0])
        batches.close()
    path = tmp_path / "ledger" / "rank00000.jsonl"
    path.write_text(change(path.read_text()))
    _, faults = audit(tmp_path, mixture, 12)
    assert any(words in fault for fault in faults), faults


def test_changed_tokens_are_told_by_the_ledger(corpora: list[Manifest], tmp_path: Path) -> None:
    for corpus in (corpora[3], dataclasses.replace(corpora[3], eod_id=EOD)):
        mixture = Mixture({"a": Stream(TokenStore(corpus, "train"), seq_len=SEQ_LEN, seed=3, shuffle_shards=2)})
        batches = Batches(mixture, settings_of(12, 1, []), one_rank_of(1, 0), tmp_path)
        batches.of_step(0, [0])
        batches.close()
    path = tmp_path / "ledger" / "rank00000.jsonl"
    one, two = path.read_text().splitlines()
    assert one == two
    digest = two.rsplit('"', 2)[-2]
    path.write_text(one + "\n" + two.replace(digest, "00000000") + "\n")
    _, faults = audit(tmp_path, mixture, 12)
    assert faults == ["step 0: the tokens of position 11 changed"]
