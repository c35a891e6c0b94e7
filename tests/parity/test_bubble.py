"""How long pipeline ranks wait: the order that megatron-core's schedules really run, replayed with given durations."""

from functools import cache

import pytest

from tests.parity import jobs_traffic
from tests.parity.forkserver import run
from transmamba.compose import load
from transmamba.costs import logit_flops
from transmamba.plan import make_plan
from transmamba.stages import Event, Kind, chunk_costs, durations, equal_partition, partition, replay

pytestmark = pytest.mark.xdist_group("ranks")


@cache
def recorded(pp: int, vpp: int) -> list[list[Event]]:
    """Orders of all ranks with four micro-batches per stage."""
    return run(pp, jobs_traffic.events, {"pp": pp, "vpp": vpp}, 4 * pp)


@pytest.mark.parametrize(("pp", "vpp"), [(2, 1), (2, 2), (4, 1)])
def test_equal_chunks_wait_as_long_as_the_formula_says(pp: int, vpp: int) -> None:
    n_chunks, n_micro = pp * vpp, 4 * pp
    orders = recorded(pp, vpp)
    assert sorted(event for order in orders for event in order) == sorted(
        (kind, micro_batch, chunk) for kind in "BF" for micro_batch in range(n_micro) for chunk in range(n_chunks)
    )
    for backward in (1.0, 2.0):
        costs: dict[tuple[Kind, int], float] = {("F", chunk): 1.0 for chunk in range(n_chunks)}
        costs |= {("B", chunk): backward for chunk in range(n_chunks)}
        assert replay(orders, costs).bubble == pytest.approx((pp - 1) / (n_micro * vpp), rel=0.03)


@pytest.mark.parametrize(("pp", "vpp"), [(2, 1), (2, 2), (4, 1)])
def test_chunks_of_equal_cost_end_sooner_than_chunks_of_equally_many_layers(pp: int, vpp: int) -> None:
    config = load(["model=400m", "transpoint=v9", "data.seq_len=8192", "model.vocab_size=50257"])
    plan = make_plan(config)
    costs = [layer.forward_flops_per_token for layer in plan.layers]
    extra = logit_flops(config.model, plan.vocab_rows)
    balanced, equal = (
        replay(recorded(pp, vpp), durations(chunk_costs(chunks, costs, extra)))
        for chunks in (partition(costs, pp * vpp, extra), equal_partition(len(costs), pp * vpp))
    )
    assert balanced.makespan < equal.makespan
