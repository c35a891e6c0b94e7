"""One picture of a sweep: curves with their spread over seeds, the final losses, and every schedule as a strip."""

import math
import statistics
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transmamba.launch.sweeps.report.leaderboard import Leaderboard, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = {"light": ("#1f2328", "#ffffff", "#d0d7de"), "dark": ("#e6edf3", "#0d1117", "#30363d")}
_ATTENTION, _SCAN = "#2f81c7", "#e0a63a"
_MAX_STRIPS_A_ROW = 12
_SMOOTHED = 0.8
_LINES = ("-", "--", ":", "-.")


def save_picture(board: Leaderboard, path: Path) -> None:
    """Write the picture as a PNG."""
    _figure(board, "light").savefig(path, dpi=130)


def picture_bytes(board: Leaderboard, theme: str) -> bytes:
    """The PNG for a page of the theme `light` or `dark`."""
    buffer = BytesIO()
    _figure(board, theme).savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _figure(board: Leaderboard, theme: str) -> "Figure":
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    ink, paper, lines = _INK[theme]
    colors: dict[Any, Any] = {"text.color": ink, "axes.labelcolor": ink, "xtick.color": ink, "ytick.color": ink}
    colors |= {"axes.edgecolor": lines, "grid.color": lines, "axes.facecolor": paper, "figure.facecolor": paper}
    strips = [(row, points) for row in board.rows for points in row.results[0].facts.points]
    n_strip_rows = -(-len(strips) // _MAX_STRIPS_A_ROW)
    with rc_context({**colors, "font.size": 9, "savefig.facecolor": paper}):
        figure = Figure(figsize=(12, 5.0 + 2.1 * n_strip_rows), layout="constrained")
        grid = figure.add_gridspec(2, 1, height_ratios=[5.0, 2.1 * n_strip_rows])
        above, below = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])
        curves, ends = above.subplots(1, 2, width_ratios=[3, 2])
        _draw_curves(board, curves)
        _draw_ends(board, ends)
        columns = min(len(strips), _MAX_STRIPS_A_ROW)
        places = below.subplots(n_strip_rows, columns, squeeze=False).flat
        for (row, (first, points)), place in zip(strips, places, strict=False):
            title = row.group if first == 0 else f"{row.group}\nfrom step {first}"
            _draw_strip(place, title, points, row.results[0].facts.seq_len, ink)
        for place in list(places):
            place.set_axis_off()
        key = "a row per layer, tokens from left to right; blue attention, orange scan"
        below.suptitle(f"TransPoints: {key}", fontsize=9)
    return figure


def _draw_curves(board: Leaderboard, axes: "Axes") -> None:
    from matplotlib.ticker import EngFormatter

    for number, row in enumerate(board.rows):
        steps, means, lows, highs = _band(row)
        if not steps:
            continue
        tokens = [step * row.results[0].facts.tokens_per_step for step in steps]
        color, style = _style(number)
        axes.plot(tokens, means, color=color, linestyle=style, linewidth=1.4, label=row.group)
        axes.fill_between(tokens, lows, highs, color=color, alpha=0.12, linewidth=0)
    axes.set(xlabel="tokens", ylabel="training loss, running mean (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_title("mean over seeds; band: lowest to highest seed", fontsize=9)
    axes.grid(alpha=0.5)
    if axes.lines:
        axes.legend(frameon=False, ncols=2, fontsize=8)


def _draw_ends(board: Leaderboard, axes: "Axes") -> None:
    names = [row.group for row in board.rows]
    for place, row in enumerate(board.rows):
        color, _ = _style(place)
        seeds = [result.final for result in row.results if result.final is not None]
        axes.plot(seeds, [place] * len(seeds), "o", color=color, markersize=3.5, alpha=0.55)
        if row.loss is not None:
            deviation = row.loss.deviation or 0.0
            axes.errorbar(row.loss.mean, place, xerr=deviation, color=color, capsize=4, fmt="|", markersize=11)
            axes.annotate(f"{row.loss.mean:.3f}", (row.loss.mean, place - 0.22), fontsize=7, ha="center", va="bottom")
        else:
            axes.annotate(row.states, (0.5, place), xycoords=("axes fraction", "data"), ha="center", va="center")
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.7)
    axes.set(xlabel="final validation loss (nats per token)")
    if not any(row.loss for row in board.rows):
        axes.set_xticks([])
    axes.set_title("a dot per seed, mean ± standard deviation", fontsize=9)
    axes.grid(alpha=0.5, axis="x")


def _draw_strip(axes: "Axes", title: str, points: Sequence[float], seq_len: int, ink: str) -> None:
    shares = [1.0 if point == math.inf else min(point / seq_len, 1.0) for point in points]
    layers = list(range(len(points)))
    axes.barh(layers, [1.0] * len(points), color=_SCAN, height=0.86)
    axes.barh(layers, shares, color=_ATTENTION, height=0.86)
    axes.set(xlim=(0, 1), ylim=(len(points) - 0.5, -0.5), xticks=[], yticks=[])
    axes.set_title(title, fontsize=8, color=ink)
    for side in axes.spines.values():
        side.set_visible(False)


def _band(row: Row) -> tuple[list[int], list[float], list[float], list[float]]:
    """Steps that all of a group's started trials have, and mean, lowest and highest smoothed loss there."""
    curves = [_running_mean(result.losses) for result in row.results if result.losses]
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    values = [[curve[step] for curve in curves] for step in steps]
    return steps, [statistics.fmean(v) for v in values], [min(v) for v in values], [max(v) for v in values]


def _running_mean(losses: dict[int, float]) -> dict[int, float]:
    """Exponential mean with the bias of its first values taken out."""
    mean, weight, smoothed = 0.0, 0.0, {}
    for step in sorted(losses):
        mean = _SMOOTHED * mean + (1 - _SMOOTHED) * losses[step]
        weight = _SMOOTHED * weight + (1 - _SMOOTHED)
        smoothed[step] = mean / weight
    return smoothed


def _style(number: int) -> tuple[Any, str]:
    return f"C{number % 10}", _LINES[number // 10 % len(_LINES)]
