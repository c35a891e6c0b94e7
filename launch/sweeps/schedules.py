"""TransPoint schedules as an axis of a sweep: the paper's, their controls, and random ones at a FLOP budget."""

import math
import random
import re
from collections.abc import Sequence

from transmamba.compose import load
from transmamba.config import Config
from transmamba.errors import ConfigError, Problem
from transmamba.launch.sweeps.trials import Choice
from transmamba.overrides import groups
from transmamba.plan import make_plan

CONTROLS = ("attention_only", "mamba_only", "layer_hybrid")
BUDGET_TOLERANCE = 0.01
_PAPER = re.compile(r"v(\d+)\.\.v(\d+)")
# Random schedules draw from so many TransPoints between 1 and seq_len, evenly spaced in their logarithm.
_LADDER = 48
_HIGHEST = 7 / 8  # of seq_len; what is above hardly scans, and infinity is drawn as such


def schedule_axis(schedules: str | None, *, controls: bool) -> list[Choice]:
    """Read `v1..v9`, lists of names and lists of points, such as `v1..v3,uniform,[0,0.5,inf]`.

    Raises:
        ConfigError: a name that is no schedule, or one that is there twice.
    """
    names = [name for part in _split(schedules or "") for name in _range(part)]
    names += [name for name in CONTROLS if controls and name not in names]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError([Problem("--schedules", "a schedule is there twice", name, "give every one once")])
    return [_choice(name) for name in names]


def random_axis(n: int, budget: str, base: Sequence[str], seed: int = 0) -> list[Choice]:
    """Random schedules whose training FLOPs per token are within 1 % of a budget; the same arguments, the same draws.

    Every layer's TransPoint is drawn from a logarithmic ladder; then layers in random order are set to what comes
    nearest to the budget, until it is met. Windows count as one document, as in `transmamba plan`.

    Args:
        n: how many.
        budget: a schedule's name, or FLOPs such as "4.5M".
        base: the sweep's overrides, for the model and data.seq_len.
        seed: draw i uses `seed + i`.

    Raises:
        ConfigError: the model has no TransPoints, the budget cannot be read or no schedule meets it.
    """
    config = load([text for text in base if not text.startswith("transpoint")])
    if config.model.kind != "transmamba":
        fix = "use model.kind=transmamba; the other kinds have no TransPoints"
        raise ConfigError([Problem("--random", "this model has no schedule to draw", config.model.kind, fix)])
    target = _budget(budget, base)
    rest, cost_of = _costs(config)
    choices = []
    for number in range(n):
        points = _draw(random.Random(seed + number), config.model.n_layers, target - rest, target, cost_of)
        if points is None:
            n_layers = config.model.n_layers
            lowest, highest = (rest + n_layers * end(cost_of.values()) for end in (min, max))
            fix = f"give a budget between {lowest:.4g} and {highest:.4g} training FLOPs per token"
            raise ConfigError([Problem("--flop-budget", "no schedule of this model is near it", budget, fix)])
        text = ",".join("inf" if point == math.inf else str(point) for point in points)
        choices.append(Choice(f"random-{seed + number}", (f"transpoint.points=[{text}]",)))
    return choices


def _draw(
    draw: random.Random, n_layers: int, target: float, tolerated: float, cost_of: dict[int | float, float]
) -> list[int | float] | None:
    """Points whose costs sum to `target`, within 1 % of `tolerated`; None when there are none."""
    ladder = list(cost_of)
    points = [draw.choice(ladder) for _ in range(n_layers)]
    for layer in draw.sample(range(n_layers), n_layers):
        others = math.fsum(cost_of[point] for number, point in enumerate(points) if number != layer)
        if abs(target - others - cost_of[points[layer]]) <= BUDGET_TOLERANCE * tolerated:
            return points
        points[layer] = min(ladder, key=lambda point: abs(cost_of[point] - (target - others)))
    is_near = abs(target - math.fsum(cost_of[point] for point in points)) <= BUDGET_TOLERANCE * tolerated
    return points if is_near else None


def _costs(config: Config) -> tuple[float, dict[int | float, float]]:
    """Training FLOPs per token outside the layers, and of one layer at every point of the ladder."""
    seq_len = config.data.seq_len
    steps = (math.exp(math.log(seq_len) * i / (_LADDER - 1)) for i in range(_LADDER))
    cost_of: dict[int | float, float] = {}
    rest = 0.0
    for point in [0, *sorted({round(step) for step in steps if step <= _HIGHEST * seq_len}), math.inf]:
        config.transpoint.points = [point]
        plan = make_plan(config)
        factor = plan.training_flops_per_token / plan.forward_flops_per_token
        cost_of[point] = factor * plan.layers[0].forward_flops_per_token
        rest = plan.training_flops_per_token - len(plan.layers) * cost_of[point]
    return rest, cost_of


def _budget(text: str, base: Sequence[str]) -> float:
    if text in groups()["transpoint"]:
        kept = [override for override in base if not override.startswith("transpoint")]
        return make_plan(load([*kept, f"transpoint={text}"])).training_flops_per_token
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMGT]?)", text)
    if match is None:
        fix = "give a schedule such as v9, or training FLOPs per token such as 14M"
        raise ConfigError([Problem("--flop-budget", "neither a schedule nor a number", text, fix)])
    return float(match[1]) * {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}[match[2]]


def _split(text: str) -> list[str]:
    """At the commas outside of brackets."""
    return [part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip()]


def _range(part: str) -> list[str]:
    match = _PAPER.fullmatch(part)
    if match is None:
        return [part]
    first, last = int(match[1]), int(match[2])
    if first > last:
        raise ConfigError([Problem("--schedules", "the range is empty", part, f"write v{last}..v{first}")])
    return [f"v{number}" for number in range(first, last + 1)]


def _choice(name: str) -> Choice:
    if name.startswith("["):
        return Choice(name, (f"transpoint.points={name}",))
    known = [known for known in groups()["transpoint"] if known != "explicit"]
    if name not in known:
        fix = f"choose among {', '.join(known)}, v1..v9, or a list of points in brackets"
        raise ConfigError([Problem("--schedules", "no such schedule", name, fix)])
    return Choice(name, (f"transpoint={name}",))
