"""Which weights decay, and the learning rate as a pure function of the step."""

import math
from collections.abc import Mapping

from torch import nn

from transmamba.config import Config, total_steps
from transmamba.transpoint import effective_points


def decayed_names(names: Mapping[str, nn.Parameter], config: Config) -> set[str]:
    """Those of the parameters (by global name) that weight decay shrinks: the matrices.

    Not A_log, D, dt_bias, norms and biases (Mamba-2, Megatron), nor the scan's own projections z and dt of a layer
    whose TransPoint no token can pass: they get no gradient, and decay alone would wear them away.
    """
    starts = [0, *(change.step for change in config.transpoint.changes)]
    lowest = [min(per_layer) for per_layer in zip(*(effective_points(config, s) for s in starts), strict=True)]
    idle = {
        f"layers.{layer}.mixer.{name}.weight"
        for layer, point in enumerate(lowest)
        if point >= config.data.seq_len
        for name in ("z", "dt")
    }
    is_matrix = {
        name for name, parameter in names.items() if parameter.dim() > 1 and "norm" not in name and ".conv." not in name
    }
    return is_matrix - idle


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of the update that completes `step` (1 for the first): warm-up, then the schedule's shape.

    `optim.warmup` and `optim.decay` are in `optim.unit`; the run's length is always its number of steps.
    """
    optim, n_steps = config.optim, total_steps(config)
    per_step = config.train.global_batch * config.data.seq_len if optim.unit == "tokens" else 1
    here, end = step * per_step, n_steps * per_step
    if here < optim.warmup:
        return optim.lr * here / optim.warmup
    if optim.schedule == "constant":
        return optim.lr
    if optim.schedule == "cosine":
        done = (here - optim.warmup) / max(end - optim.warmup, 1)
        return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    decay = end / 10 if optim.decay is None else optim.decay
    left = max(end - here, 0)
    if left >= decay:
        return optim.lr
    return optim.min_lr + (optim.lr - optim.min_lr) * left / decay
