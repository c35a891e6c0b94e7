"""What a sweep found: every trial's curve, and the groups compared at their ends, at equal tokens and equal FLOPs."""

import csv
import json
import math
import statistics
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transmamba.errors import ConfigError, Problem
from transmamba.launch.sweeps.files import DONE, RUNNING, TrialFolder, read_status

# (first step, training FLOPs per token from it on); a schedule that changes during training has several.
Phases = Sequence[tuple[int, float]]
_SMOOTHED_OVER = 10  # steps
SORT_KEYS = ("loss", "at_equal_tokens", "at_equal_flops", "bits_per_byte", "flops", "seconds", "group")


@dataclass(frozen=True, slots=True)
class Facts:
    """What the configuration of a trial says: FLOPs, tokens of a step, and whether all validations take all tokens."""

    phases: Phases
    tokens_per_step: int
    seq_len: int
    points: tuple[tuple[int, tuple[float, ...]], ...]  # (first step, TransPoint of every layer)
    n_steps: int
    validates_all: bool

    def flops(self, step: int) -> float:
        """Training FLOPs of the first `step` steps."""
        ends = [first for first, _ in self.phases[1:]] + [step]
        spans = ((max(0, min(end, step) - first), cost) for (first, cost), end in zip(self.phases, ends, strict=True))
        return self.tokens_per_step * math.fsum(n_steps * cost for n_steps, cost in spans)


@dataclass(frozen=True, slots=True)
class Result:
    """One trial so far; losses in nats per token by step, `held` those of the first validation set."""

    number: int
    group: str
    seed: int
    state: str
    code: int | None
    seconds: float
    facts: Facts = field(repr=False)
    losses: dict[int, float] = field(repr=False)
    held: dict[int, float] = field(repr=False)
    bits_per_byte: float | None = None

    @property
    def step(self) -> int:
        """The last recorded step; 0 before the first."""
        return max(self.losses, default=0)

    @property
    def held_curve(self) -> dict[int, float]:
        """Validation losses that were measured on the same tokens: without the final one where only that takes all."""
        is_whole = self.facts.validates_all
        return {step: loss for step, loss in self.held.items() if is_whole or step < self.facts.n_steps}

    @property
    def final(self) -> float | None:
        """Validation loss of a run that is done, over all of its validation tokens."""
        return self.held.get(self.step) if self.state == DONE else None


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and sample standard deviation over seeds; the deviation is None for one seed."""

    mean: float
    deviation: float | None
    n: int

    def text(self, digits: int = 4) -> str:
        """`mean ± deviation`."""
        spread = "" if self.deviation is None else f" ± {self.deviation:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread}"


@dataclass(frozen=True, slots=True)
class Row:
    """One group: its trials differ in the seed only."""

    group: str
    results: tuple[Result, ...] = field(repr=False)
    loss: Spread | None
    bits_per_byte: Spread | None
    at_equal_tokens: Spread | None
    at_equal_flops: Spread | None
    tokens: int
    flops: float
    seconds: float

    @property
    def states(self) -> str:
        """`3 done` or `2 done, 1 failed (20)`."""
        names = [
            result.state if result.state != "failed" else f"failed ({result.code})"
            for result in sorted(self.results, key=lambda result: (result.state != DONE, result.state))
        ]
        return ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))


@dataclass(frozen=True, slots=True)
class Leaderboard:
    """The groups in order, and where they are compared."""

    name: str
    rows: tuple[Row, ...]
    equal_tokens: int | None
    equal_flops: float | None
    measure: str  # what is compared at equal tokens and FLOPs

    @property
    def results(self) -> list[Result]:
        """All trials by number."""
        return sorted((result for row in self.rows for result in row.results), key=lambda result: result.number)


def read_results(trials: Sequence[TrialFolder], facts_of: Callable[[TrialFolder], Facts]) -> list[Result]:
    """Read what every trial has written so far; lines that a kill tore are left out."""
    return [_read(trial, facts_of(trial)) for trial in trials]


def leaderboard(name: str, results: Sequence[Result], sort: str = "loss") -> Leaderboard:
    """Compare the groups.

    Args:
        name: of the sweep.
        results: of all trials, started or not.
        sort: one of `SORT_KEYS`; groups without a value come last.

    Raises:
        ConfigError: `sort` is none of them.
    """
    if sort not in SORT_KEYS:
        raise ConfigError([Problem("--sort", "not a column", sort, f"choose {', '.join(SORT_KEYS)}")])
    started = [result for result in results if len(result.losses) > 1]
    is_held = all(len(result.held_curve) > 1 for result in started)
    curves = {result.number: result.held_curve if is_held else _smooth(result.losses) for result in started}
    steps = {result.number: max(curves[result.number], default=0) for result in started}
    # Trials that ended early or still run do not pull the others back; before one is done all of them count.
    judges = [r for r in started if r.state == DONE and steps[r.number]] or [r for r in started if steps[r.number]]
    tokens = min((steps[r.number] * r.facts.tokens_per_step for r in judges), default=None)
    flops = min((r.facts.flops(steps[r.number]) for r in judges), default=None)

    def at_tokens(result: Result) -> float | None:
        curve = [(step * result.facts.tokens_per_step, loss) for step, loss in curves[result.number].items()]
        return None if tokens is None else interpolate(curve, tokens)

    def at_flops(result: Result) -> float | None:
        curve = [(result.facts.flops(step), loss) for step, loss in curves[result.number].items()]
        return None if flops is None else interpolate(curve, flops)

    rows = []
    for group in dict.fromkeys(result.group for result in results):
        own = tuple(result for result in results if result.group == group)
        running = [result for result in own if result in started]
        rows.append(
            Row(
                group,
                own,
                spread([result.final for result in own]),
                spread([result.bits_per_byte for result in own]),
                spread([at_tokens(result) for result in running]),
                spread([at_flops(result) for result in running]),
                max(result.step * result.facts.tokens_per_step for result in own),
                max(result.facts.flops(result.step) for result in own),
                statistics.fmean(result.seconds for result in own),
            )
        )
    measure = "validation loss" if is_held else f"training loss, mean of {_SMOOTHED_OVER} steps"
    return Leaderboard(name, tuple(sorted(rows, key=lambda row: _order(row, sort))), tokens, flops, measure)


def spread(values: Sequence[float | None]) -> Spread | None:
    """Mean and deviation of the values that are there."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def interpolate(curve: Sequence[tuple[float, float]], x: float) -> float | None:
    """The curve of (x, y) at `x`, linear in log(x) between its points; None outside of them."""
    ordered = sorted(curve)
    if not ordered or not ordered[0][0] <= x <= ordered[-1][0] * (1 + 1e-9):
        return None
    after = min(bisect_right(ordered, (x, math.inf)), len(ordered) - 1)
    (low, start), (high, end) = ordered[max(after - 1, 0)], ordered[after]
    share = math.log(x / low) / math.log(high / low) if high > low else 0.0
    return start + min(share, 1.0) * (end - start)


def verdict(board: Leaderboard) -> str:
    """Whether the seeds tell the first two groups apart, in one sentence."""
    known = [row for row in board.rows if row.loss is not None]
    ordered = sorted(known, key=lambda row: row.loss.mean if row.loss else math.inf)
    if len(ordered) < 2 or ordered[0].loss is None or ordered[1].loss is None:
        return "fewer than two groups have a run that is done"
    first, second = ordered[0].loss, ordered[1].loss
    lead = second.mean - first.mean
    text = f"{ordered[0].group} leads {ordered[1].group} by {lead:.4f} nats"
    if first.deviation is None or second.deviation is None:
        return f"{text}; one seed does not say whether that is more than chance"
    error = math.sqrt(first.deviation**2 / first.n + second.deviation**2 / second.n)
    word = "more" if lead > 2 * error else "no more"
    return f"{text}, {word} than twice the standard error of the difference ({error:.4f})"


def write_tables(board: Leaderboard, out: Path) -> list[Path]:
    """Write leaderboard.csv, a line per group, and leaderboard.json, with every trial."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [_flat(row) for row in board.rows]
    with (out / "leaderboard.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["group"])
        writer.writeheader()
        writer.writerows(rows)
    record = {
        "sweep": board.name,
        "compared_at": {"tokens": board.equal_tokens, "training_flops": board.equal_flops, "measure": board.measure},
        "verdict": verdict(board),
        "groups": rows,
        "trials": [_trial(result) for result in board.results],
    }
    (out / "leaderboard.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return [out / "leaderboard.csv", out / "leaderboard.json"]


def _read(trial: TrialFolder, facts: Facts) -> Result:
    status = read_status(trial)
    losses, held, bits, time_s = {}, {}, None, 0.0
    for record in _lines(trial.run / "metrics.jsonl"):
        losses[record["step"]] = record["loss"]
        time_s = record.get("time_s", 0.0)
        for measured in list(record.get("validation", {}).values())[:1]:
            held[record["step"]], bits = measured["loss"], measured["bits_per_byte"]
    is_done = status.state == DONE
    own = trial.trial
    return Result(
        own.number,
        own.group,
        own.seed,
        status.state,
        status.code,
        time_s if status.state == RUNNING or not status.seconds else status.seconds,
        facts,
        losses,
        held,
        bits if is_done else None,
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def _smooth(losses: dict[int, float]) -> dict[int, float]:
    """Mean of the last steps at every step that has as many before it."""
    steps = sorted(losses)
    window = min(_SMOOTHED_OVER, len(steps))
    means = {}
    for end in range(window, len(steps) + 1):
        means[steps[end - 1]] = statistics.fmean(losses[step] for step in steps[end - window : end])
    return means


def _order(row: Row, key: str) -> tuple[bool, Any]:
    value = getattr(row, key)
    if isinstance(value, Spread):
        value = value.mean
    return value is None, 0.0 if value is None else value


def _flat(row: Row) -> dict[str, Any]:
    record: dict[str, Any] = {"group": row.group, "states": row.states}
    for name in ("loss", "bits_per_byte", "at_equal_tokens", "at_equal_flops"):
        value: Spread | None = getattr(row, name)
        record[f"{name}_mean"] = None if value is None else value.mean
        record[f"{name}_deviation"] = None if value is None else value.deviation
        record[f"{name}_seeds"] = 0 if value is None else value.n
    return record | {"tokens": row.tokens, "training_flops": row.flops, "seconds_mean": row.seconds}


def _trial(result: Result) -> dict[str, Any]:
    facts = asdict(result.facts)
    facts["points"] = [[first, [None if p == math.inf else p for p in own]] for first, own in result.facts.points]
    return {
        **{name: getattr(result, name) for name in ("number", "group", "seed", "state", "code", "seconds", "step")},
        "final_loss": result.final,
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.step * result.facts.tokens_per_step,
        "training_flops": result.facts.flops(result.step),
        "held": result.held,
        **facts,
    }
