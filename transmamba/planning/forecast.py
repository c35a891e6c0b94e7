"""What a run would take on named hardware: memory, communication, time and how sure that is. Imports no torch."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transmamba.communication import traffic
from transmamba.config import Config, tokens_per_step
from transmamba.costs import PositionShares
from transmamba.errors import ConfigError, Problem
from transmamba.plan_parallel import ParallelPlan
from transmamba.planning.ours import RESERVED_BYTES, StageMemory, activation_bytes, layout_of, shape_of
from transmamba.planning.shape import Layout, Recompute, Shape
from transmamba.planning.timing import (
    Constants,
    Hardware,
    StepTime,
    fitted,
    hardware_of,
    is_cpu,
    read_hardware,
    step_time,
)

RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
_PASSES = {"all_reduce": 2}
SECONDS_PER_DAY = 86400


@dataclass(frozen=True, slots=True)
class GroupTraffic:
    """What the busiest stage sends in one group per step, and how long that takes with nothing beside it."""

    group: str
    sent_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Anchor:
    """The published run most like this one, measured and predicted by the same model."""

    row: str
    source: str
    measured: float
    kind: str
    measured_step_s: float
    predicted_step_s: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """A prediction for `gpus` devices of one kind; times of a GPU are for bf16. None where a CPU has no answer."""

    hardware: str
    gpus: int
    device_memory_bytes: float | None
    recompute: Recompute
    stages: tuple[StageMemory, ...]
    peak_memory_bytes: dict[str, int]
    """Of the fullest rank, by what is recomputed."""
    fits: bool | None
    largest_micro_batch: int | None
    """That fits as everything else is; None if none does, or on a CPU."""
    communication: tuple[GroupTraffic, ...]
    time: StepTime | None
    stage_imbalance: float | None
    """Dearest pipeline stage over the mean, less one."""
    step_s: float
    error_bar: float
    """Share by which the step time may be off."""
    error_words: str
    tokens_per_s_per_gpu: float
    mfu_causal_half: float | None
    mfu_full_attention: float | None
    tokens: int
    days: float
    gpu_hours: float
    anchor: Anchor | None

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Question:
    """What a forecast is made from; the counts of FLOPs are per token, forward and backward."""

    config: Config
    n_vocab_rows: int
    shares: PositionShares
    parallel: ParallelPlan
    flops_causal_half: float
    flops_full_attention: float
    tokens: int


def forecast(question: Question, hardware: str) -> Forecast:
    """Predict a valid configuration on a profile of `hardware/`, named or by path.

    Raises:
        ConfigError: no such profile, or one that is not complete.
    """
    values = read_hardware(hardware)
    return _on_cpu(question, hardware, values) if is_cpu(values) else _on_gpus(question, hardware, values)


def stage_memory(
    config: Config, parallel: ParallelPlan, n_vocab_rows: int, recompute: Recompute
) -> tuple[StageMemory, ...]:
    """Peak memory of every pipeline stage's ranks on GPUs, in bf16."""
    n_micro = config.train.global_batch // (parallel.dp * config.train.micro_batch)
    found = []
    for rank, stage in enumerate(parallel.stages):
        state = stage.memory
        kept, logits = activation_bytes(config, stage.layers, n_vocab_rows, rank, n_micro, recompute)
        optimizer = state.masters + state.moments
        found.append(StageMemory(state.weights, state.gradients, optimizer, kept, logits, RESERVED_BYTES))
    return tuple(found)


def group_traffic(config: Config, parallel: ParallelPlan, n_vocab_rows: int, hardware: Hardware) -> list[GroupTraffic]:
    """Bytes and seconds by group of ranks, of the stage that takes longest there."""
    degrees = config.parallel
    config = config.model_copy(update={"precision": parallel.precision})
    tp, cp, pp, dp = degrees.tp, degrees.cp, degrees.pp, parallel.dp
    world = parallel.world_size
    groups = {"tp": (tp, 1), "cp": (cp, tp), "dp": (dp, tp * cp), "dp_cp": (dp * cp, tp), "pp": (pp, world // pp)}
    groups |= {"embedding": (pp, world // pp), "tp_pp": (tp * pp, world // pp), "world": (world, 1)}
    found: dict[str, GroupTraffic] = {}
    for rank, stage in enumerate(parallel.stages):
        sums: dict[str, tuple[int, float]] = {}
        for term in traffic(config, n_vocab_rows=n_vocab_rows, pipeline_rank=rank, layers=stage.layers, dp=dp):
            n, stride = groups[term.group]
            share = 1.0 if term.op == "send" else _PASSES.get(term.op, 1) * (n - 1) / n
            sent, seconds = sums.get(term.group, (0, 0.0))
            sums[term.group] = sent + term.bytes, seconds + share * term.bytes / hardware.link(n, stride)
        for group, (sent, seconds) in sums.items():
            if group not in found or seconds > found[group].seconds:
                found[group] = GroupTraffic(group, sent, seconds)
    return list(found.values())


def _on_gpus(question: Question, name: str, values: dict[str, Any]) -> Forecast:
    config, parallel = question.config, question.parallel
    hardware, (k, held_out) = hardware_of(values), fitted()
    by_recompute = {way: stage_memory(config, parallel, question.n_vocab_rows, way) for way in RECOMPUTE}
    peaks = {way: max(stage.total_bytes for stage in stages) for way, stages in by_recompute.items()}
    now = config.train.recompute
    shape, layout = shape_of(config, question.n_vocab_rows, question.shares), layout_of(config, parallel.world_size)
    time = step_time(shape, layout, hardware, k, [stage.layers for stage in parallel.stages])
    scan_share = time.scan_s / time.step_s
    words = f"80 % of the {held_out['rows']:.0f} held-out published runs are within {held_out['p80_error']:.0%}"
    if scan_share >= 0.01:
        words += "; scan, convolution and gated norm are a roofline estimate, counted as sure to within their own time"
    speed = tokens_per_step(config) / time.step_s / parallel.world_size
    return _forecast(
        question,
        name,
        device_memory_bytes=hardware.memory_bytes,
        stages=by_recompute[now],
        peak_memory_bytes=peaks,
        fits=peaks[now] <= hardware.memory_bytes,
        largest_micro_batch=_largest_micro_batch(question, hardware.memory_bytes),
        communication=tuple(group_traffic(config, parallel, question.n_vocab_rows, hardware)),
        time=time,
        stage_imbalance=max(time.stage_s) * len(time.stage_s) / math.fsum(time.stage_s) - 1,
        step_s=time.step_s,
        error_bar=held_out["p80_error"] + scan_share,
        error_words=words,
        mfu_causal_half=speed * question.flops_causal_half / hardware.peak_flops,
        mfu_full_attention=speed * question.flops_full_attention / hardware.peak_flops,
        anchor=_anchor(shape, layout, hardware, k),
    )


def _largest_micro_batch(question: Question, memory_bytes: float) -> int | None:
    """Of those that the layout and the global batch allow."""
    config, parallel = question.config, question.parallel
    per_rank, pp = config.train.global_batch // parallel.dp, config.parallel.pp
    small = [size for size in range(1, math.isqrt(per_rank) + 1) if per_rank % size == 0]
    for size in sorted({*small, *(per_rank // size for size in small)}, reverse=True):
        n_micro = per_rank // size
        if n_micro < pp or (config.parallel.vpp > 1 and n_micro % pp):
            continue
        sized = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": size})})
        stages = stage_memory(sized, parallel, question.n_vocab_rows, config.train.recompute)
        if max(stage.total_bytes for stage in stages) <= memory_bytes:
            return size
    return None


def _on_cpu(question: Question, name: str, values: dict[str, Any]) -> Forecast:
    from transmamba.planning.cpu_time import step_seconds

    ranks = question.parallel.world_size
    if ranks > 1:
        what = f"a CPU's profile is of one process, not {ranks}"
        raise ConfigError([Problem("--hardware", what, name, "use --gpus 1 and no parallel.*")])
    try:
        step_s = step_seconds(question.config, values)
    except ValueError as error:
        raise ConfigError([Problem("--hardware", str(error), name, "change that, or use a GPU's profile")]) from None
    return _forecast(
        question,
        name,
        device_memory_bytes=None,
        stages=(),
        peak_memory_bytes={},
        fits=None,
        largest_micro_batch=None,
        communication=(),
        time=None,
        stage_imbalance=None,
        step_s=step_s,
        error_bar=0.2,
        error_words="configurations that the profile was not fitted to are within 20 % on its machine",
        mfu_causal_half=None,
        mfu_full_attention=None,
        anchor=None,
    )


def _forecast(question: Question, name: str, *, step_s: float, **found: Any) -> Forecast:
    """The rest follows from the seconds of a step."""
    gpus = question.parallel.world_size
    speed = tokens_per_step(question.config) / step_s / gpus
    total_s = question.tokens / (speed * gpus)
    return Forecast(
        hardware=name,
        gpus=gpus,
        recompute=question.config.train.recompute,
        step_s=step_s,
        tokens_per_s_per_gpu=speed,
        tokens=question.tokens,
        days=total_s / SECONDS_PER_DAY,
        gpu_hours=total_s * gpus / 3600,
        **found,
    )


def _anchor(shape: Shape, layout: Layout, hardware: Hardware, k: Constants) -> Anchor:
    from transmamba.planning.published import nearest, predict

    row = nearest(shape, layout, hardware)
    predicted = predict([row], k)[0].step_s
    return Anchor(row.name, row.source, row.value, row.kind, row.step_s, predicted)


def time_parts(time: StepTime) -> Sequence[tuple[str, float]]:
    """Names and seconds of what a step is spent on, the dearest first, without what is nothing."""
    names = {
        "matrix products": time.matmul_s,
        "attention": time.attention_s,
        "scan and convolution": time.scan_s,
        "element-wise": time.elementwise_s,
        "tensor parallel": time.tp_s,
        "context parallel": time.cp_s,
        "pipeline sends": time.pp_s,
        "pipeline bubble": time.bubble_s,
        "gradients and weights": time.dp_s,
        "optimizer": time.optimizer_s,
        "starting kernels": time.launch_s,
        "waiting for others": time.waiting_s,
    }
    return sorted(((name, s) for name, s in names.items() if s > 0), key=lambda part: -part[1])
