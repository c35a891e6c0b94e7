"""Pictures of what runs recorded: loss.png of one run, and several runs in one picture."""

import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from transmamba.errors import ConfigError, Problem
from transmamba.metrics import read_metrics

_LABELS = {"loss": "loss (nats per token)", "validation": "validation loss (nats per token)",
           "bits_per_byte": "bits per byte", "grad_norm": "gradient norm", "lr": "learning rate",
           "tokens_per_s": "tokens per second", "step_s": "seconds per step", "mfu": "MFU"}  # fmt: skip


def plot_loss(folder: Path) -> Path | None:
    """Draw loss over tokens from metrics.jsonl into loss.png; None when no step is recorded."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    records = read_metrics(folder)
    if not records:
        return None
    tokens = [record["tokens"] for record in records]
    losses = [record["loss"] for record in records]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(tokens, losses, color="#9db8d2", linewidth=0.8, label="training, every step")
    axes.plot(tokens, _smooth(losses), color="#1f5a91", linewidth=1.8, label="training, running mean")
    names = sorted({name for record in records for name in record.get("validation", {})})
    for index, name in enumerate(names, start=1):  # C0 is the training curve's blue
        held = [(r["tokens"], r["validation"][name]["loss"]) for r in records if name in r.get("validation", {})]
        axes.plot(*zip(*held, strict=True), "o-", color=f"C{index}", markersize=4, label=name)
    axes.set(xlabel="tokens", ylabel="loss (nats per token)", title=run_title(folder))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path = folder / "loss.png"
    figure.savefig(path, dpi=130)
    return path


def run_title(folder: Path) -> str:
    """Name of a run for a picture that may be anywhere: its folder, and the one that this is in."""
    return "/".join(Path(os.path.abspath(folder)).parts[-2:])


def run_labels(folders: Sequence[Path]) -> list[str]:
    """Names of runs: as much of the end of each path as tells it from the others."""
    parts = [Path(os.path.abspath(folder)).parts for folder in folders]

    def shortest(own: tuple[str, ...]) -> str:
        for length in range(1, len(own)):
            if all(other == own or other[-length:] != own[-length:] for other in parts):
                return "/".join(own[-length:])
        return str(Path(*own))

    return [shortest(own) for own in parts]


def compare_losses(folders: Sequence[Path], out: Path) -> list[str]:
    """Draw the runs' training losses over each other, and below how far each is from the first.

    Returns:
        One line per run but the first: its largest and its last difference, in nats, over the steps both have, or
        that there is none.

    Raises:
        ConfigError: a folder has no recorded step, or no step in common with the first; `out` is no picture's name.
    """
    from matplotlib.figure import Figure

    _check_picture(out)
    runs = [{record["step"]: record["loss"] for record in read_metrics(folder)} for folder in folders]
    for folder, run in zip(folders, runs, strict=True):
        if not run.keys() & runs[0].keys():
            raise ConfigError([Problem("RUN_DIR", "no step in common with the first", folder, "give run folders")])
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    lines, labels = [], run_labels(folders)
    for number, (label, run) in enumerate(zip(labels, runs, strict=True)):
        steps = sorted(run.keys() & runs[0].keys())
        apart = [abs(run[step] - runs[0][step]) for step in steps]
        is_equal = number > 0 and not any(apart)
        width = 3.5 if number == 0 else 1.2  # the first shows through below the others
        shown = f"{label} (equal)" if is_equal else label
        above.plot(list(run), list(run.values()), f"C{number}", linewidth=width, alpha=0.8, label=shown)
        if is_equal:
            lines.append(f"{label}: equal to {labels[0]} in all {len(steps)} steps that both have")
        elif number:
            # The axis has no place for zero.
            below.semilogy(steps, [value or math.nan for value in apart], f"C{number}", linewidth=1)
            lines.append(
                f"{label}: at most {max(apart):.1e} nats from {labels[0]}, {apart[-1]:.1e} at step {steps[-1]}"
            )
    if not below.lines:
        below.text(0.5, 0.5, "no difference", transform=below.transAxes, ha="center", va="center", color="#888888")
        below.set_yticks([])
    above.set(ylabel="loss (nats per token)")
    above.legend(frameon=False)
    below.set(xlabel="step", ylabel="difference (nats)")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(out, dpi=130)
    return lines


def plot_runs(folders: Sequence[Path], x: Literal["step", "tokens", "time"], ys: Sequence[str], out: Path) -> None:
    """Draw members of metrics.jsonl, one diagram below the other, every run in its own colour.

    Args:
        x: optimizer steps, tokens, or hours of training, those of former attempts included.
        ys: members of a step's record; `validation` and `bits_per_byte` are of the first validation set.

    Raises:
        ConfigError: a run has none of the numbers of `ys`, or `out` is no picture's name.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    _check_picture(out)
    figure = Figure(figsize=(8, 3.2 * len(ys) + 0.8), layout="constrained")
    diagrams = figure.subplots(len(ys), 1, sharex=True, squeeze=False)[:, 0]
    for number, (folder, label) in enumerate(zip(folders, run_labels(folders), strict=True)):
        records = read_metrics(folder)
        places = _hours(records) if x == "time" else [record[x] for record in records]
        for axes, name in zip(diagrams, ys, strict=True):
            points = [(place, value) for place, record in zip(places, records, strict=True)
                      if (value := _value(record, name)) is not None]  # fmt: skip
            if not points:
                names = sorted(key for key in (records[-1] if records else {}) if _value(records[-1], key) is not None)
                fix = f"choose among {', '.join([*names, 'bits_per_byte'])}" if names else "name a run with a step"
                raise ConfigError([Problem("--y", f"{folder} has no such number", name, fix)])
            marker = "o-" if name in ("validation", "bits_per_byte") else "-"
            axes.plot(*zip(*points, strict=True), marker, color=f"C{number}", linewidth=1.2, markersize=4,
                      label=label)  # fmt: skip
    for axes, name in zip(diagrams, ys, strict=True):
        axes.set(ylabel=_LABELS.get(name, name))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    if x == "tokens":
        diagrams[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    diagrams[-1].set(xlabel={"time": "hours of training"}.get(x, x))
    figure.savefig(out, dpi=130)


def _value(record: dict[str, Any], name: str) -> float | None:
    if name in ("validation", "bits_per_byte"):
        held = next(iter((record.get("validation") or {}).values()), {})
        return held.get("loss" if name == "validation" else name)
    value = record.get(name)
    return value if isinstance(value, int | float) else None


def _hours(records: Sequence[dict[str, Any]]) -> list[float]:
    """Hours of training up to every step: a record's `time_s` counts from the start of its own process."""
    before_s = last_s = 0.0
    hours = []
    for record in records:
        if record["time_s"] < last_s:
            before_s += last_s
        last_s = record["time_s"]
        hours.append((before_s + last_s) / 3600)
    return hours


def _check_picture(out: Path) -> None:
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError([Problem("--out", "not the name of a picture", out, "end it in .png, .svg or .pdf")])


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean over the last tenth of the steps so far, of 50 at most: a wider one would lag where the loss falls fast."""
    return [statistics.fmean(values[end - max(1, min(end // 10, 50)) : end]) for end in range(1, len(values) + 1)]
