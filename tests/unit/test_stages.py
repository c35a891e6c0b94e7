"""Balanced pipeline chunks against every partition there is, and replayed schedules against their known bubbles."""

import math
import time
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transmamba.compose import load
from transmamba.costs import logit_flops
from transmamba.plan import make_plan
from transmamba.stages import Event, Kind, chunk_costs, durations, equal_partition, partition, replay


def alternating(forward: list[Event], backward: list[Event], ahead: int) -> list[Event]:
    """Some forwards, then one of each in turn, then the backwards that are left."""
    pairs = zip(forward[ahead:], backward, strict=False)
    return [*forward[:ahead], *(event for pair in pairs for event in pair), *backward[len(backward) - ahead :]]


def one_f_one_b(pp: int, n_micro: int) -> list[list[Event]]:
    """The textbook order: rank r runs pp - r - 1 forwards ahead, then alternates, then drains."""
    orders: list[list[Event]] = []
    for rank in range(pp):
        ahead = min(pp - rank - 1, n_micro)
        forward: list[Event] = [("F", micro, rank) for micro in range(n_micro)]
        backward: list[Event] = [("B", micro, rank) for micro in range(n_micro)]
        orders.append(alternating(forward, backward, ahead))
    return orders


def interleaved(pp: int, vpp: int, n_micro: int) -> list[list[Event]]:
    """The textbook order with vpp chunks per rank: groups of pp micro-batches visit one chunk after the other."""
    steps = [(group + micro, chunk) for group in range(0, n_micro, pp) for chunk in range(vpp) for micro in range(pp)]
    orders: list[list[Event]] = []
    for rank in range(pp):
        forward: list[Event] = [("F", micro, chunk * pp + rank) for micro, chunk in steps]
        backward: list[Event] = [("B", micro, (vpp - 1 - chunk) * pp + rank) for micro, chunk in steps]
        ahead = min(2 * (pp - rank - 1) + (vpp - 1) * pp, len(steps))
        orders.append(alternating(forward, backward, ahead))
    return orders


def constant(n_chunks: int, backward: float) -> dict[tuple[Kind, int], float]:
    kinds: dict[Kind, float] = {"F": 1.0, "B": backward}
    return {(kind, chunk): duration for kind, duration in kinds.items() for chunk in range(n_chunks)}


@pytest.mark.parametrize("backward", [1.0, 2.0])
@pytest.mark.parametrize("multiple", [1, 2, 4, 16])
@pytest.mark.parametrize("pp", [1, 2, 4, 8])
def test_1f1b_idles_for_pp_minus_one_micro_batches(pp: int, multiple: int, backward: float) -> None:
    n_micro = multiple * pp
    played = replay(one_f_one_b(pp, n_micro), constant(pp, backward))
    assert played.busy == (n_micro * (1 + backward),) * pp
    assert played.makespan == (n_micro + pp - 1) * (1 + backward)
    assert played.bubble == (pp - 1) / n_micro


@pytest.mark.parametrize("backward", [1.0, 2.0])
@pytest.mark.parametrize("vpp", [1, 2, 3])
@pytest.mark.parametrize("pp", [2, 4, 8])
def test_interleaving_divides_the_bubble_by_the_chunks_per_rank(pp: int, vpp: int, backward: float) -> None:
    played = replay(interleaved(pp, vpp, 4 * pp), constant(pp * vpp, backward))
    assert played.bubble == pytest.approx((pp - 1) / (4 * pp * vpp), rel=1e-12)


def test_a_replay_waits_for_the_slower_neighbour() -> None:
    played = replay([[("F", 0, 0), ("F", 1, 0)], [("F", 0, 1), ("F", 1, 1)]], {("F", 0): 1.0, ("F", 1): 3.0})
    assert (played.makespan, played.busy, played.bubble) == (7.0, (2.0, 6.0), 1 / 6)
    # The single rank's backward waits for its own forward and for nothing else.
    assert replay([[("F", 0, 0), ("B", 0, 0)]], constant(1, 2.0)).bubble == 0
    assert replay([], {}).makespan == 0


@pytest.mark.parametrize(
    ("orders", "message"),
    [
        ([[("B", 0, 0), ("F", 0, 0)], [("F", 0, 1), ("B", 0, 1)]], "rank 0 waits for .'F', 0, 0."),
        ([[("F", 0, 0)], [("B", 0, 1), ("F", 0, 1)]], "rank 1 waits for .'F', 0, 1."),
        ([[("F", 0, 1)], []], "rank 0 waits for .'F', 0, 0."),
        ([[("F", 0, 0), ("B", 0, 0)], []], "rank 0 waits for .'B', 0, 1."),
        ([[("F", 0, 0), ("F", 0, 0)]], "comes twice"),
        ([[("F", 0, 2)]], "no duration"),
    ],
)
def test_an_order_that_cannot_be_played_is_refused(orders: list[list[Event]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replay(orders, constant(2, 1.0))


def largest_by_brute_force(costs: list[float], n_chunks: int) -> float:
    cuts = combinations(range(1, len(costs)), n_chunks - 1)
    return min(max(sum(costs[a:b]) for a, b in pairwise((0, *cut, len(costs)))) for cut in cuts)


def check_shape(chunks: list[range], n_layers: int, n_chunks: int) -> None:
    assert len(chunks) == n_chunks
    assert all(len(chunk) >= 1 for chunk in chunks)
    assert [layer for chunk in chunks for layer in chunk] == list(range(n_layers))


@given(st.data())
def test_no_partition_has_a_cheaper_dearest_chunk(data: st.DataObject) -> None:
    costs = data.draw(st.lists(st.integers(0, 30).map(lambda n: n / 4), min_size=1, max_size=9))
    n_chunks = data.draw(st.integers(1, len(costs)))
    extra = data.draw(st.integers(0, 60).map(lambda n: n / 8))
    chunks = partition(costs, n_chunks, extra)
    check_shape(chunks, len(costs), n_chunks)
    # Sums of small multiples of 1/8 are exact, so equality needs no tolerance.
    best = largest_by_brute_force([*costs[:-1], costs[-1] + extra], n_chunks)
    assert max(chunk_costs(chunks, costs, extra)) == best


@given(st.lists(st.floats(0, 1e12), min_size=1, max_size=9), st.floats(0, 1e12), st.data())
def test_any_finite_costs_are_balanced(costs: list[float], extra: float, data: st.DataObject) -> None:
    n_chunks = data.draw(st.integers(1, len(costs)))
    chunks = partition(costs, n_chunks, extra)
    check_shape(chunks, len(costs), n_chunks)
    best = largest_by_brute_force([*costs[:-1], costs[-1] + extra], n_chunks)
    assert max(chunk_costs(chunks, costs, extra)) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize(("n_layers", "n_chunks"), [(1, 1), (7, 7), (10, 4), (11, 4), (12, 8), (64, 8)])
def test_layers_of_one_cost_are_spread_evenly(n_layers: int, n_chunks: int) -> None:
    for chunks in (equal_partition(n_layers, n_chunks), partition([0.1] * n_layers, n_chunks)):
        check_shape(chunks, n_layers, n_chunks)
        sizes = [len(chunk) for chunk in chunks]
        assert max(sizes) - min(sizes) <= 1
    assert [len(chunk) for chunk in equal_partition(10, 4)] == [3, 3, 2, 2]


def test_ties_are_broken_evenly() -> None:
    # One layer decides the largest cost; the others are shared all the same.
    assert [len(chunk) for chunk in partition([1, 1, 1, 1, 1, 1, 9], 4)] == [2, 2, 2, 1]
    assert [len(chunk) for chunk in partition([9, 1, 1, 1, 1, 1, 1], 4)] == [1, 2, 2, 2]
    assert [len(chunk) for chunk in partition([1, 1, 1, 9, 1, 1, 1], 4)] == [2, 1, 1, 3]
    assert [len(chunk) for chunk in partition([1] * 6, 3, last_extra=2)] == [3, 2, 1]


def test_ten_thousand_layers_are_partitioned_in_less_than_a_second() -> None:
    costs = [60e6 + 25e6 * math.sin(layer) ** 2 for layer in range(10_000)]
    for n_chunks in (8, 128, 5_000):
        started_at = time.perf_counter()
        chunks = partition(costs, n_chunks, 4e9)
        assert time.perf_counter() - started_at < 1
        check_shape(chunks, len(costs), n_chunks)


@pytest.mark.parametrize(
    ("costs", "n_chunks", "extra"),
    [([1.0], 2, 0), ([1.0], 0, 0), ([], 1, 0), ([1.0, -1.0], 1, 0), ([math.nan], 1, 0), ([1.0], 1, math.inf)],
)
def test_impossible_partitions_are_refused(costs: list[float], n_chunks: int, extra: float) -> None:
    with pytest.raises(ValueError, match=r"layers cannot fill|finite number of 0 or more"):
        partition(costs, n_chunks, extra)


def test_more_chunks_than_layers_have_no_equal_partition() -> None:
    with pytest.raises(ValueError, match="3 layers cannot fill 4 chunks"):
        equal_partition(3, 4)


def stages_of_the_cycle(model: str, vocab_size: int, pp: int) -> tuple[list[float], list[float]]:
    """Costs of balanced stages and of stages of equally many layers, at the paper's length and schedule."""
    config = load([f"model={model}", "transpoint=v9", "data.seq_len=8192", f"model.vocab_size={vocab_size}"])
    plan = make_plan(config)
    costs = [layer.forward_flops_per_token for layer in plan.layers]
    head = logit_flops(config.model, plan.vocab_rows)
    balanced = chunk_costs(partition(costs, pp, head), costs, head)
    return balanced, chunk_costs(equal_partition(len(costs), pp), costs, head)


@pytest.mark.parametrize(
    ("model", "vocab_size", "pp"),
    [("400m", 50257, 4), ("400m", 2048, 8), ("1_5b", 50257, 4), ("1_5b", 50257, 8), ("1_5b", 128_000, 8)],
)
def test_balanced_stages_of_the_cycle_schedule_finish_a_step_sooner(model: str, vocab_size: int, pp: int) -> None:
    orders = one_f_one_b(pp, 4 * pp)
    balanced, equal = (replay(orders, durations(costs)) for costs in stages_of_the_cycle(model, vocab_size, pp))
    assert balanced.makespan < equal.makespan, (
        f"{model} pp={pp}: {balanced.makespan / equal.makespan:.3f} of the time of equal layer counts; "
        f"bubbles {balanced.bubble:.3f} and {equal.bubble:.3f}"
    )


@pytest.mark.parametrize(
    ("model", "vocab_size", "pp"),
    [
        # The output projection outweighs two layers: one layer with it is the dearest stage, and cannot be less.
        ("400m", 50257, 8),
        # A small vocabulary weighs nothing, and stages of equally many layers hold whole periods of the schedule.
        ("1_5b", 2048, 4),
    ],
)
def test_where_equal_stages_are_the_best_balancing_costs_nothing(model: str, vocab_size: int, pp: int) -> None:
    orders = one_f_one_b(pp, 4 * pp)
    balanced, equal = (replay(orders, durations(costs)) for costs in stages_of_the_cycle(model, vocab_size, pp))
    assert balanced.makespan == pytest.approx(equal.makespan, rel=1e-12)
