"""Seconds of a training step on GPUs, from sizes, a hardware profile and a few fitted constants. Imports no torch.

    matrix product    2 M N K / R x (1 + d (1/M + 1/N + 1/K)); forward once, backward twice
    attention         4 FLOPs per key and channel forward, 10 backward, at the kernel's rate, which falls with narrow
                      heads (h / (h + 78), older kernels 19) and short windows (n / (n + 375)): the shapes of the
                      charts of FlashAttention-3 and -2
    element-wise      bytes / (eta HBM bandwidth), eta of fused or of eager kernels; logits likewise
    scan, convolution bytes / (0.55 HBM bandwidth): the roofline estimate, not fitted
    tp, cp            bytes / link; what overlaps costs a fitted share of its time
    dp                bytes / link, beside one micro-batch when it overlaps
    pipeline          (m + (pp - 1) / vpp) x the dearest stage
    optimizer         40 bytes per number of the shard / (eta HBM bandwidth)
    nodes             1 + j log2(nodes): ranks wait for the slowest
    launches          60 kernels a layer and micro-batch at 5 us each, where they take longer than the work: an
                      estimate, which only small models meet

Link of a group: NIC bandwidth x its members in a node, at most NVLink's; NVLink's inside a node.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from transmamba.planning.shape import Layer, Layout, Shape

FOLDER = Path(__file__).parent
SCAN_EFFICIENCY = 0.55
OPTIMIZER_BYTES = 40
_NARROW_HEAD = {"cudnn": 78, "flash2": 19, "triton": 19}
_SHORT_WINDOW = 375
LAUNCH_S, LAUNCHES = 5e-6, 60
PUBLISHED_CHIPS = ("h100", "a100")
_BYTES = 2


@dataclass(frozen=True, slots=True)
class Hardware:
    """A profile of `hardware/`; rates in FLOP/s and bytes/s per GPU and direction."""

    chip: str
    peak_flops: float
    memory_bytes: float
    hbm_bytes_per_s: float
    nvlink_bytes_per_s: float
    nic_bytes_per_s: float
    gpus_per_node: int

    def link(self, members: int, stride: int) -> float:
        """Bus bandwidth of a group whose neighbours are `stride` ranks apart."""
        if members * stride <= self.gpus_per_node:
            return self.nvlink_bytes_per_s
        return min(self.nvlink_bytes_per_s, self.nic_bytes_per_s * max(1, self.gpus_per_node // stride))


@dataclass(frozen=True, slots=True)
class Constants:
    """What `fit` finds: rates by chip in FLOP/s, shares of the HBM bandwidth, and shares of hidden time."""

    matmul: dict[str, float]
    small: float
    """d of the matrix product, in rows."""
    attention: dict[str, float]
    """FLOP/s of attention by "kernel chip", at heads of 128 and long windows."""
    fused: float
    eager: float
    contention: float
    """Share of a hidden collective's time by which it slows the work that hides it."""
    exposed: float
    """Share of the time of tensor-parallel collectives that overlap cannot hide."""
    jitter: float


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one step and what they are spent on; the parts add up to `step_s`."""

    step_s: float
    matmul_s: float
    attention_s: float
    elementwise_s: float
    scan_s: float
    tp_s: float
    cp_s: float
    pp_s: float
    dp_s: float
    bubble_s: float
    optimizer_s: float
    launch_s: float
    """By which starting kernels outlasts them."""
    waiting_s: float
    stage_s: tuple[float, ...]
    """Compute of one micro-batch by pipeline rank, forward and backward."""


@dataclass(slots=True)
class _Work:
    matmul: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    scan: float = 0.0
    tp: float = 0.0
    cp: float = 0.0

    def add(self, other: "_Work", times: float = 1.0) -> None:
        """Add the time of another piece of work."""
        self.matmul += times * other.matmul
        self.attention += times * other.attention
        self.elementwise += times * other.elementwise
        self.scan += times * other.scan
        self.tp += times * other.tp
        self.cp += times * other.cp

    @property
    def total(self) -> float:
        """Seconds."""
        return self.matmul + self.attention + self.elementwise + self.scan + self.tp + self.cp


def step_time(
    shape: Shape, layout: Layout, hardware: Hardware, k: Constants, stages: Sequence[Sequence[int]] | None = None
) -> StepTime:
    """Predict one optimizer step.

    Args:
        stages: layers of every pipeline rank, all chunks together; equally many each if None.
    """
    if stages is None:
        stages = _even_stages(len(shape.layers), layout.pp)
    distinct = {layer: _layer_work(layer, layout, hardware, k) for layer in set(shape.layers)}
    works = []
    for rank, numbers in enumerate(stages):
        work = _Work()
        for number in numbers:
            work.add(distinct[shape.layers[number]])
        if rank == layout.pp - 1:
            work.add(_head_work(shape, layout, hardware, k))
        works.append(work)
    busiest = max(works, key=lambda work: work.total)
    m = layout.n_micro
    bubble = (layout.pp - 1) / layout.vpp * busiest.total
    pp = _pipeline_s(shape, layout, hardware, k)
    weights = max(_rank_parameters(shape, layout, stages))
    dp = _data_parallel_s(weights, layout, hardware, k, busiest.total)
    shards = (layout.shard_group or layout.dp * layout.cp) if layout.zero else 1
    eta = getattr(k, layout.kernels)
    optimizer = OPTIMIZER_BYTES * weights / shards / (eta * hardware.hbm_bytes_per_s)
    launch = m * max(0.0, LAUNCH_S * LAUNCHES * max(len(numbers) for numbers in stages) - busiest.total)
    sum_s = m * busiest.total + bubble + pp + dp + optimizer + launch
    waiting = sum_s * k.jitter * math.log2(max(1.0, layout.gpus / hardware.gpus_per_node))
    return StepTime(
        step_s=sum_s + waiting,
        matmul_s=m * busiest.matmul,
        attention_s=m * busiest.attention,
        elementwise_s=m * busiest.elementwise,
        scan_s=m * busiest.scan,
        tp_s=m * busiest.tp,
        cp_s=m * busiest.cp,
        pp_s=pp,
        dp_s=dp,
        bubble_s=bubble,
        optimizer_s=optimizer,
        launch_s=launch,
        waiting_s=waiting,
        stage_s=tuple(work.total for work in works),
    )


def _even_stages(n_layers: int, pp: int) -> list[range]:
    cuts = [round(stage * n_layers / pp) for stage in range(pp + 1)]
    return [range(start, stop) for start, stop in pairwise(cuts)]


def _rank_parameters(shape: Shape, layout: Layout, stages: Sequence[Sequence[int]]) -> list[float]:
    counts = [sum(shape.layers[number].parameters for number in numbers) / layout.tp for numbers in stages]
    table = shape.vocab_rows * shape.d_model / layout.tp
    counts[0] += table
    if not shape.tied or layout.pp > 1:
        counts[-1] += table
    return counts


def _layer_work(layer: Layer, layout: Layout, hardware: Hardware, k: Constants) -> _Work:
    tokens, tp = layout.tokens, layout.tp
    full, selective = layout.recompute == "full", layout.recompute == "selective"
    products = [(n_in, n_out // tp) for n_in, n_out in layer.columns]
    products += [(n_in // tp, n_out) for n_in, n_out in layer.rows]
    forward = sum(_product_s(tokens, n_in, n_out, hardware, k) for n_in, n_out in products)
    attention = 4 * tokens * layer.attention_channels / tp * layer.keys
    if attention:
        attention /= _attention_rate(layer, layout, hardware, k)
    stream = tp if layout.sp else 1
    moved = [layer.stream_elements[way] / stream + layer.inner_elements[way] / tp for way in (0, 1)]
    elementwise = moved[0] * (1 + full) + moved[1]
    kernel = layer.kernel_bytes[0] * (1 + full + selective) + layer.kernel_bytes[1]
    hbm = hardware.hbm_bytes_per_s
    return _Work(
        matmul=(3 + full) * forward,
        attention=attention * (3.5 + full + selective),
        elementwise=tokens * _BYTES * elementwise / (getattr(k, layout.kernels) * hbm),
        scan=tokens * kernel / tp / (SCAN_EFFICIENCY * hbm),
        tp=_tensor_parallel_s(layer, layout, hardware, k),
        cp=_context_parallel_s(layer, layout, hardware, k),
    )


def _head_work(shape: Shape, layout: Layout, hardware: Hardware, k: Constants) -> _Work:
    """Logits and loss; eager kernels write them in several precisions."""
    rows = shape.vocab_rows // layout.tp
    elements = 6 if layout.kernels == "fused" else 14
    bandwidth = getattr(k, layout.kernels) * hardware.hbm_bytes_per_s
    return _Work(
        matmul=3 * _product_s(layout.tokens, shape.d_model, rows, hardware, k),
        elementwise=layout.tokens * elements * _BYTES * rows / bandwidth,
    )


def _product_s(m: float, n_in: int, n_out: int, hardware: Hardware, k: Constants) -> float:
    loss = 1 + k.small * (1 / m + 1 / n_in + 1 / n_out)
    return 2 * m * n_in * n_out / k.matmul[hardware.chip] * loss


def _attention_rate(layer: Layer, layout: Layout, hardware: Hardware, k: Constants) -> float:
    rate = k.attention[f"{layout.attention} {hardware.chip}"]
    narrow = _NARROW_HEAD[layout.attention]
    width = layer.head_dim * (128 + narrow) / (128 * (layer.head_dim + narrow))
    return rate * min(1.0, width) * layer.window / (layer.window + _SHORT_WINDOW)


def _tensor_parallel_s(layer: Layer, layout: Layout, hardware: Hardware, k: Constants) -> float:
    """All-gather and reduce-scatter around every pair of matrices, forward and backward."""
    tp = layout.tp
    if tp == 1:
        return 0.0
    repeats = 2 + 0.5 * (layout.recompute == "full")
    size = _BYTES * layout.tokens * layer.rows[0][1] * (tp - 1) / tp
    seconds = 2 * len(layer.rows) * repeats * size / hardware.link(tp, 1)
    return seconds * (k.exposed if layout.overlaps else 1.0)


def _context_parallel_s(layer: Layer, layout: Layout, hardware: Hardware, k: Constants) -> float:
    """Keys and values around a ring, beside attention, or an exchange of tokens for heads, which nothing hides."""
    cp = layout.cp
    if cp == 1:
        return 0.0
    link = hardware.link(cp, layout.tp)
    per_channel = _BYTES * layout.tokens / layout.tp * (3 + (layout.recompute == "full")) / link
    ring = per_channel * layer.ring_channels * (cp - 1) * (k.contention if layout.overlaps else 1.0)
    return ring + per_channel * layer.exchange_channels * (cp - 1) / cp * 2 / 3


def _pipeline_s(shape: Shape, layout: Layout, hardware: Hardware, k: Constants) -> float:
    """Activations and gradients between chunks, hidden but for the contention when they overlap."""
    if layout.pp == 1:
        return 0.0
    size = _BYTES * layout.tokens * shape.d_model / (layout.tp if layout.sp else 1)
    stride = layout.gpus // layout.pp
    seconds = 2 * layout.vpp * layout.n_micro * size / hardware.link(layout.pp, stride)
    return seconds * (k.contention if layout.overlaps else 1.0)


def _data_parallel_s(weights: float, layout: Layout, hardware: Hardware, k: Constants, window: float) -> float:
    """Collectives of gradients and weights that the step waits for."""
    ranks = layout.dp * layout.cp
    if ranks == 1:
        return 0.0
    group = min(layout.shard_group or ranks, ranks)
    inside = (group - 1) / group / hardware.link(group, layout.tp)
    m, gathered = layout.n_micro, _BYTES * weights * inside
    reduced = layout.reduce_bytes * weights * inside
    if group < ranks:
        copies = ranks // group
        between = (copies - 1) / copies / hardware.link(copies, layout.tp * group)
        reduced += 2 * layout.reduce_bytes * weights / group * between
    if layout.zero == 3:
        return m * _waited(2 * gathered + reduced, window, layout, k)
    if layout.zero == 2:
        return m * _waited(2 * reduced, window, layout, k) + gathered
    return _waited(gathered + reduced if layout.zero else 2 * reduced, window, layout, k)


def _waited(seconds: float, window: float, layout: Layout, k: Constants) -> float:
    if not layout.overlaps:
        return seconds
    hidden = min(seconds, window)
    return seconds - hidden + k.contention * hidden


@cache
def read_hardware(name: str) -> dict[str, Any]:
    """A profile as plain data, by the name of a file in `hardware/` or by path.

    Raises:
        ConfigError: there is no such file, or it is not plain YAML.
    """
    from transmamba import plain_yaml
    from transmamba.errors import ConfigError, Problem

    path = FOLDER / "hardware" / f"{name}.yaml"
    known = sorted(file.stem for file in (FOLDER / "hardware").glob("*.yaml"))
    if name not in known:
        path = Path(name)
    if not path.is_file():
        fix = f"choose {', '.join(known)} or give the path of a YAML file like them"
        raise ConfigError([Problem("--hardware", "no such profile", name, fix)])
    return plain_yaml.read(path)


def is_cpu(values: dict[str, Any]) -> bool:
    """Whether a profile is that of a CPU, which has a time model of its own (`cpu_time`)."""
    return values.get("chip") == "cpu"


@cache
def gpu(name: str) -> Hardware:
    """The profile of a GPU by name or path (ConfigError as the two functions beside)."""
    return hardware_of(read_hardware(name))


def hardware_of(values: dict[str, Any]) -> Hardware:
    """The profile of a GPU from `read_hardware`.

    Raises:
        ConfigError: a key is missing or unknown, or not a positive number.
    """
    from transmamba.errors import ConfigError, Problem

    problems = []
    names = Hardware.__annotations__
    for name in sorted(names.keys() ^ values.keys()):
        what = "unknown key" if name in values else "missing"
        problems.append(Problem(f"--hardware {name}", what, values.get(name), f"give {', '.join(names)}"))
    for name, value in values.items():
        if name in names and name != "chip" and not (isinstance(value, int | float) and value > 0):
            problems.append(Problem(f"--hardware {name}", "not a positive number", value, "give a number above 0"))
    if values.get("chip") not in PUBLISHED_CHIPS:
        fix = f"use one of {', '.join(PUBLISHED_CHIPS)}, whose rates are fitted to published runs"
        problems.append(Problem("--hardware chip", "no rates for it", values.get("chip"), fix))
    if problems:
        raise ConfigError(problems)
    return Hardware(**values)


@cache
def fitted() -> tuple[Constants, dict[str, float]]:
    """The committed constants, and what the held-out half of the published rows says of their errors."""
    import json

    values = json.loads((FOLDER / "constants.json").read_text(encoding="utf-8"))
    return Constants(**values["constants"]), values["held_out"]
