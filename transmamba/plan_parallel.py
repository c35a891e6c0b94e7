"""What each pipeline stage of a parallel run holds, sends and costs, by the closed formulas. Imports no torch."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from transmamba.communication import Memory, memory, traffic, weights_on_rank
from transmamba.config import Config
from transmamba.stages import chunk_costs, partition

if TYPE_CHECKING:
    from rich.console import Console

_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_SHORT = {"gradients": "grads"}  # a row fits 80 columns


@dataclass(frozen=True, slots=True)
class StagePlan:
    """One pipeline stage, as each of its ranks sees it."""

    layers: tuple[int, ...]
    cost_share: float
    """Of the forward FLOPs of the whole model, the output projection included."""
    sent: dict[str, int]
    """Bytes per optimizer step by group of ranks (see `communication`)."""
    memory: Memory


@dataclass(frozen=True, slots=True)
class ParallelPlan:
    """How a run is spread over its ranks."""

    world_size: int
    dp: int
    precision: str
    bubble: float
    """Idle over busy time of a pipeline of equal stages: (pp - 1) / (m vpp) for m micro-batches."""
    stages: tuple[StagePlan, ...]


def parallel_plan(
    config: Config, layer_costs: Sequence[float], head_cost: float, n_vocab_rows: int, world_size: int
) -> ParallelPlan | None:
    """Count what the ranks of a valid configuration hold and send; None for a single one.

    Args:
        config: a precision of null counts as bf16, which GPUs get, and as fp32 in ZeRO stage 0.
        layer_costs, head_cost: forward FLOPs per token of every layer and of the output projection.
        n_vocab_rows: rows of the embedding.
        world_size: a multiple of tp x pp x cp.
    """
    return None if world_size == 1 else plan_stages(config, layer_costs, head_cost, n_vocab_rows, world_size)


def plan_stages(
    config: Config, layer_costs: Sequence[float], head_cost: float, n_vocab_rows: int, world_size: int
) -> ParallelPlan:
    """The same, also for a single rank; arguments as in `parallel_plan`."""
    parallel, train = config.parallel, config.train
    precision = config.precision or ("bf16" if config.zero.stage else "fp32")
    config = config.model_copy(update={"precision": precision})
    dp = world_size // (parallel.tp * parallel.pp * parallel.cp)
    chunks = partition(layer_costs, parallel.pp * parallel.vpp, head_cost)
    costs = chunk_costs(chunks, layer_costs, head_cost)
    stages = []
    for rank in range(parallel.pp):
        layers = tuple(layer for chunk in chunks[rank :: parallel.pp] for layer in chunk)
        sent: dict[str, int] = {}
        for term in traffic(config, n_vocab_rows=n_vocab_rows, pipeline_rank=rank, layers=layers, dp=dp):
            sent[term.group] = sent.get(term.group, 0) + term.bytes
        held = weights_on_rank(config, n_vocab_rows=n_vocab_rows, pipeline_rank=rank, layers=layers)
        state = memory(config, sizes=[weight.size for weight in held], n_shards=dp * parallel.cp)
        stages.append(StagePlan(layers, math.fsum(costs[rank :: parallel.pp]) / math.fsum(costs), sent, state))
    n_micro = train.global_batch // (dp * train.micro_batch)
    return ParallelPlan(world_size, dp, precision, (parallel.pp - 1) / (n_micro * parallel.vpp), tuple(stages))


def print_parallel(plan: ParallelPlan, console: "Console") -> None:
    """Print one row per stage: layers, share of the cost, bytes sent per step and held."""
    from rich.table import Table

    bubble = f", bubble {plan.bubble:.1%}" if plan.bubble else ""
    console.print(
        f"{plan.world_size} ranks, {plan.dp} data parallel, {plan.precision}{bubble}; a rank sends per step and holds:",
        highlight=False,
    )
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim")
    groups = list(dict.fromkeys(group for stage in plan.stages for group in stage.sent if stage.sent[group] >= 1000))
    for name in ("stage", "layers", "cost", *groups, *asdict(plan.stages[0].memory)):
        table.add_column(_SHORT.get(name, name), justify="right", no_wrap=True)
    for number, stage in enumerate(plan.stages):
        sent = [short_bytes(stage.sent.get(group, 0)) for group in groups]
        held = [short_bytes(size) for size in asdict(stage.memory).values()]
        table.add_row(str(number), _ranges(stage.layers), f"{stage.cost_share:.1%}", *sent, *held)
    console.print(table)


def _ranges(layers: Sequence[int]) -> str:
    """Runs of neighbours as first-last."""
    cuts = [0, *(i for i, (a, b) in enumerate(pairwise(layers), 1) if b != a + 1), len(layers)]
    runs = [(layers[start], layers[stop - 1]) for start, stop in pairwise(cuts)]
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def short_bytes(size: int) -> str:
    """A size with its unit, in three digits."""
    for scale, unit in _UNITS:
        if size >= scale:
            return f"{size / scale:.3g}{unit}"
    return f"{size}B"
