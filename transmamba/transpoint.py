"""TransPoint schedules: how many tokens each layer reads as attention before it scans (paper section 3.4)."""

import math
import random
from typing import Literal

from transmamba.config import Config, ModelConfig, ScheduleName, TranspointChange, TranspointConfig

LayerKind = Literal["transmamba", "transformer", "mamba2"]

_PAPER_SEQ_LEN = 8192
# Table 6 of the paper. The entry 8192 is the whole sequence there, hence "never scan" at any length here.
_PAPER_POINTS = {
    "v1": [2048],
    "v2": [4096],
    "v3": [6144],
    "v4": [3072, 4096, 5120],
    "v5": [2048, 3072, 4096],
    "v6": [512, 1024, 2048],
    "v7": [2048, 4096, 6144],
    "v8": [0, 1024, 2048, 6144, 8192],
    "v9": [0, 128, 256, 512, 1024, 2048, 4096, 8192],
}


def points(config: TranspointConfig, n_layers: int, seq_len: int, step: int = 0) -> list[int | float]:
    """The TransPoint of every layer at one training step; the same arguments always give the same list.

    Args:
        config: schedule, explicit points and the changes over time.
        n_layers: length of the list; shorter schedules are tiled.
        seq_len: tokens per window; fractions and scaled schedules refer to it.
        step: training step, from 0.

    Returns:
        Tokens read as attention: whole numbers, or infinity for a layer that never scans.

    Raises:
        ValueError: the schedule is `explicit` and has no points.
    """
    current: TranspointConfig | TranspointChange = config
    for change in sorted(config.changes, key=lambda change: change.step):
        if change.step <= step:
            current = change
    if current.points is not None:
        period = [_tokens(point, seq_len) for point in current.points]
    else:
        period = _period(current.schedule, config, n_layers, seq_len)
    return [period[layer % len(period)] for layer in range(n_layers)]


def layer_kinds(model: ModelConfig) -> list[LayerKind]:
    """The kind of every layer; `hybrid` tiles its pattern of A (transformer) and M (mamba2).

    Raises:
        ValueError: the pattern is empty or holds another letter.
    """
    if model.kind != "hybrid":
        return [model.kind] * model.n_layers
    if not model.pattern or set(model.pattern) - {"A", "M"}:
        raise ValueError(f"model.pattern is made of A and M, not {model.pattern!r}")
    letters = [model.pattern[layer % len(model.pattern)] for layer in range(model.n_layers)]
    return ["transformer" if letter == "A" else "mamba2" for letter in letters]


def effective_points(config: Config, step: int = 0) -> list[int | float]:
    """The TransPoint of every layer, whatever its kind: infinity for transformer, 0 for mamba2 layers."""
    scheduled = points(config.transpoint, config.model.n_layers, config.data.seq_len, step)
    fixed: dict[LayerKind, int | float] = {"transformer": math.inf, "mamba2": 0}
    kinds = layer_kinds(config.model)
    return [fixed.get(kind, point) for kind, point in zip(kinds, scheduled, strict=True)]


def cut_schedules(config: Config) -> list[str]:
    """A sentence for every named schedule of the run with values that no layer gets, because there are too few."""
    n_layers, seq_len, found = config.model.n_layers, config.data.seq_len, []
    if config.model.kind != "transmamba":
        return []
    for part in (config.transpoint, *config.transpoint.changes):
        if part.points is not None or part.schedule == "explicit":
            continue
        period = _period(part.schedule, config.transpoint, n_layers, seq_len)
        used = set(period[:n_layers])
        lost = [str(point) for point in dict.fromkeys(period) if point not in used]
        if lost:
            alone = ": they all scan from token 0, as in mamba_only" if used == {0} else ""
            key = {"layer_hybrid": "attention_every", "uniform": "period", "log": "period"}.get(part.schedule)
            other = f"transpoint.{key}={n_layers}" if key and n_layers > 1 else "transpoint.points=[...]"
            found.append(
                f"transpoint={part.schedule} has {len(period)} TransPoints, and {n_layers} layers never get "
                f"{', '.join(lost)}{alone}; use model.n_layers={len(period)} or more, or {other}"
            )
    return found


def _period(schedule: ScheduleName, config: TranspointConfig, n_layers: int, seq_len: int) -> list[int | float]:
    if schedule == "explicit":
        raise ValueError("transpoint.schedule=explicit needs transpoint.points")
    if schedule == "attention_only":
        return [math.inf]
    if schedule == "mamba_only":
        return [0]
    if schedule == "layer_hybrid":
        return [0] * (config.attention_every - 1) + [math.inf]
    if schedule == "uniform":
        return [_whole(i / (config.period - 1), seq_len) for i in range(config.period)]
    if schedule == "log":
        doublings = range(config.period - 2, -1, -1)
        return [0, *(_whole(2.0**-doubling, seq_len) for doubling in doublings)]
    if schedule == "random":
        draw = random.Random(config.seed)
        return [_log_uniform(draw.random(), seq_len) for _ in range(n_layers)]
    paper = _PAPER_POINTS["v9" if schedule == "cycle" else schedule]
    return [_whole(point / _PAPER_SEQ_LEN, seq_len) for point in paper]


def _tokens(point: int | float, seq_len: int) -> int | float:
    # Explicit whole numbers are literal: a point equal to seq_len stays finite, so longer evaluation scans.
    return point if isinstance(point, int) or point == math.inf else math.floor(point * seq_len + 0.5)


def _whole(fraction: float, seq_len: int) -> int | float:
    return math.inf if fraction == 1 else math.floor(fraction * seq_len + 0.5)


def _log_uniform(u: float, seq_len: int) -> int | float:
    # u in [0, 1) covers 0 .. seq_len, the last value being the whole sequence.
    tokens = math.floor(math.exp(u * math.log(seq_len + 2))) - 1
    return math.inf if tokens >= seq_len else tokens
