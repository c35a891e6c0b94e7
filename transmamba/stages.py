"""Which layers a pipeline chunk holds, and what a schedule of chunks costs. Imports no torch.

Layers differ in cost because their TransPoints differ, and the last chunk also has the output projection, so
chunks of equally many layers leave ranks waiting for the dearest one. A layer's cost is its forward FLOPs per
token at its TransPoint (`plan.LayerPlan`), the output projection's is `costs.logit_flops`; the embedding is a
look-up of 0 FLOPs, so the first chunk has no extra.

Chunks are contiguous and numbered in model order; chunk c lives on pipeline rank c % pp, so rank r holds
`partition(...)[r::pp]` (Megatron-LM's interleaved order, arXiv 2104.04473, section 2.2).
"""

import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Literal

from transmamba.costs import TRAINING_OVER_FORWARD

Kind = Literal["F", "B"]
# (forward or backward, micro-batch, chunk)
Event = tuple[Kind, int, int]


def partition(layer_costs: Sequence[float], n_chunks: int, last_extra: float = 0.0) -> list[range]:
    """Contiguous chunks of at least one layer whose dearest chunk is as cheap as any partition allows.

    Beyond that, a chunk is dear only when one layer makes it so: chunks of several layers stay within the
    smallest bound that leaves no layer over, and under it every cut, from the first layer on, is as near as it
    can be to an even share of what is left (of two equally near ones the earlier).

    Args:
        layer_costs: per layer in model order, 0 or more, in any unit.
        n_chunks: pipeline stages times chunks per stage.
        last_extra: cost of what else the last chunk does, in the same unit.

    Returns:
        The layers of every chunk.

    Raises:
        ValueError: fewer layers than chunks, or a cost that is negative or not finite.
    """
    _check_sizes(len(layer_costs), n_chunks)
    wrong = [cost for cost in (*layer_costs, last_extra) if not (math.isfinite(cost) and cost >= 0)]
    if wrong:
        raise ValueError(f"a cost is a finite number of 0 or more, not {wrong[0]}")
    sums = _prefix_sums(layer_costs, last_extra)
    cuts = _even_cuts(sums, n_chunks, _smallest_bound(sums, n_chunks))
    return [range(start, stop) for start, stop in pairwise(cuts)]


def equal_partition(n_layers: int, n_chunks: int) -> list[range]:
    """The yardstick: chunks of equally many layers; what does not divide goes to the first ones, one layer each.

    The first ones, because the last chunk has the output projection already.

    Raises:
        ValueError: fewer layers than chunks.
    """
    _check_sizes(n_layers, n_chunks)
    size, rest = divmod(n_layers, n_chunks)
    cuts = [chunk * size + min(chunk, rest) for chunk in range(n_chunks + 1)]
    return [range(start, stop) for start, stop in pairwise(cuts)]


def chunk_costs(chunks: Sequence[range], layer_costs: Sequence[float], last_extra: float = 0.0) -> list[float]:
    """Cost of every chunk, the last one's with `last_extra`."""
    costs = [math.fsum(layer_costs[layer] for layer in chunk) for chunk in chunks]
    return [*costs[:-1], costs[-1] + last_extra]


def durations(costs: Sequence[float]) -> dict[tuple[Kind, int], float]:
    """What `replay` wants, from the forward cost of every chunk; a backward costs two forwards."""
    kinds: dict[Kind, int] = {"F": 1, "B": TRAINING_OVER_FORWARD - 1}
    return {(kind, chunk): factor * cost for kind, factor in kinds.items() for chunk, cost in enumerate(costs)}


@dataclass(frozen=True, slots=True)
class Replay:
    """When a schedule ends and how busy its ranks were, in the unit of the durations."""

    makespan: float
    busy: tuple[float, ...]
    bubble: float
    """Idle over busy time of the busiest rank: (pp - 1) / m for 1F1B of equal chunks and m micro-batches."""


def replay(orders: Sequence[Sequence[Event]], durations: Mapping[tuple[Kind, int], float]) -> Replay:
    """Play recorded orders of events against the dependencies of a pipeline; communication takes no time.

    F(m, c) needs F(m, c - 1); B(m, c) needs F(m, c) and B(m, c + 1). Every rank works through its list in order,
    one event at a time.

    Args:
        orders: per pipeline rank, (kind, micro-batch, chunk) in the order of execution.
        durations: per kind and chunk, of all chunks of the model.

    Raises:
        ValueError: an event has no duration or comes twice, or the orders wait for each other or for an event
            that no rank has.
    """
    n_chunks = 1 + max((chunk for _, chunk in durations), default=-1)
    position, clock, busy = [0] * len(orders), [0.0] * len(orders), [0.0] * len(orders)
    finished: dict[Event, float] = {}
    waiting: dict[Event, list[int]] = {}
    ready = deque(range(len(orders)))
    while ready:
        rank = ready.popleft()
        while position[rank] < len(orders[rank]):
            event = orders[rank][position[rank]]
            duration = _duration(event, durations, finished)
            needed = _needed(event, n_chunks)
            missing = next((other for other in needed if other not in finished), None)
            if missing is not None:
                waiting.setdefault(missing, []).append(rank)
                break
            clock[rank] = max([clock[rank], *(finished[other] for other in needed)]) + duration
            finished[event] = clock[rank]
            busy[rank] += duration
            position[rank] += 1
            ready.extend(waiting.pop(event, ()))
    if waiting:
        stuck = "; ".join(f"rank {rank} waits for {event}" for event, ranks in waiting.items() for rank in ranks)
        raise ValueError(f"the schedule is deadlocked: {stuck}")
    makespan, work = max(clock, default=0.0), max(busy, default=0.0)
    return Replay(makespan, tuple(busy), (makespan - work) / work if work else 0.0)


def _check_sizes(n_layers: int, n_chunks: int) -> None:
    if not 1 <= n_chunks <= n_layers:
        raise ValueError(f"{n_layers} layers cannot fill {n_chunks} chunks of at least one layer")


def _prefix_sums(layer_costs: Sequence[float], last_extra: float) -> list[int]:
    """Exact integers proportional to the cost of the first 0, 1, .. layers.

    Floats are multiples of powers of two, so one scale makes them whole: comparisons then are exact whatever
    the order of summation. The last layer is always in the last chunk, whose extra cost it can carry.
    """
    ratios = [cost.as_integer_ratio() for cost in (*layer_costs, last_extra)]
    scale = math.lcm(*{denominator for _, denominator in ratios})
    *costs, extra = (numerator * (scale // denominator) for numerator, denominator in ratios)
    costs[-1] += extra
    return list(accumulate(costs, initial=0))


def _smallest_bound(sums: list[int], n_chunks: int) -> int:
    """The smallest bound under which chunks of several layers can stay while a layer of any cost may stand alone.

    The partition's largest cost is this bound or the dearest layer. Exact bisection between attained bounds:
    Pinar and Aykanat, "Fast optimal load balancing algorithms for 1D partitioning" (2004). Fewer chunks than
    `n_chunks` are enough, because costs are 0 or more and splitting a chunk makes none dearer.
    """
    low, high = 1, max(1, sums[-1])
    while low < high:
        attained, next_bound = _fill(sums, n_chunks, (low + high) // 2)
        if attained is None:
            low = next_bound
        else:
            high = max(low, attained)
    return high


def _fill(sums: list[int], n_chunks: int, bound: int) -> tuple[int | None, int]:
    """Fill chunks from the left up to `bound`, but with one layer at least.

    Returns:
        The dearest chunk of several layers, or None when layers are left over; and the smallest bound that fills
        otherwise.
    """
    n_layers, start, dearest, next_bound = len(sums) - 1, 0, 0, sums[-1]
    for _ in range(n_chunks):
        stop = max(start + 1, bisect_right(sums, sums[start] + bound, lo=start) - 1)
        if stop > start + 1:
            dearest = max(dearest, sums[stop] - sums[start])
        if stop == n_layers:
            return dearest, next_bound
        next_bound = min(next_bound, sums[stop + 1] - sums[start])
        start = stop
    return None, next_bound


def _even_cuts(sums: list[int], n_chunks: int, bound: int) -> list[int]:
    """First layers of the chunks, and the number of layers; chunks of several layers stay within `bound`."""
    # A layer beyond the bound fills its chunk and no more, so it does not distort the shares of the others.
    sums = list(accumulate((min(stop - start, bound) for start, stop in pairwise(sums)), initial=0))
    n_layers = len(sums) - 1
    # From these cuts on, the layers that are left fit into the chunks that are left.
    earliest = [n_layers]
    for _ in range(n_chunks - 1):
        earliest.append(bisect_left(sums, sums[earliest[-1]] - bound))
    earliest.reverse()
    cuts = [0]
    for n_left in range(n_chunks, 1, -1):
        start = cuts[-1]
        low = max(start + 1, earliest[n_chunks - n_left])
        high = min(n_layers - n_left + 1, bisect_right(sums, sums[start] + bound) - 1)
        # The even share of what is left; a fraction, because whole numbers would round it to one side.
        target = sums[start] + Fraction(sums[-1] - sums[start], n_left)
        after = bisect_left(sums, target)
        before, after = (min(max(cut, low), high) for cut in (after - 1, after))
        cuts.append(after if sums[after] - target < target - sums[before] else before)
    return [*cuts, n_layers]


def _duration(event: Event, durations: Mapping[tuple[Kind, int], float], finished: Mapping[Event, float]) -> float:
    kind, _, chunk = event
    if (kind, chunk) not in durations:
        raise ValueError(f"{event} has no duration")
    if event in finished:
        raise ValueError(f"{event} comes twice")
    return durations[kind, chunk]


def _needed(event: Event, n_chunks: int) -> list[Event]:
    kind, micro_batch, chunk = event
    if kind == "F":
        return [("F", micro_batch, chunk - 1)] if chunk > 0 else []
    after: list[Event] = [("B", micro_batch, chunk + 1)] if chunk < n_chunks - 1 else []
    return [("F", micro_batch, chunk), *after]
