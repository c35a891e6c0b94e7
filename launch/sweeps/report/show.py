"""`transmamba sweep show`: tables on the screen and on disk, the picture and the page, also while trials run."""

import json
import math
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from transmamba.config import Config, tokens_per_step, total_steps
from transmamba.launch.sweeps.files import TrialFolder, read_trials
from transmamba.launch.sweeps.report.leaderboard import (
    Facts,
    Leaderboard,
    Phases,
    Row,
    Spread,
    leaderboard,
    read_results,
    verdict,
    write_tables,
)
from transmamba.launch.sweeps.report.page import comparison, write_page
from transmamba.launch.sweeps.report.picture import save_picture
from transmamba.transpoint import effective_points


def show(folder: Path, out: Path, facts_of: Callable[[TrialFolder], Facts], sort: str, console: Console) -> None:
    """Print the leaderboard of the sweep in `folder` and write it in every form to `out`.

    Raises:
        ConfigError: no sweep is there, or `sort` is no column.
    """
    trials = read_trials(folder)
    board = leaderboard(folder.name, read_results(trials, facts_of), sort)
    definition = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))["definition"]
    console.print(table(board))
    console.print(Text(verdict(board)), soft_wrap=True)
    console.print(Text(comparison(board), style="dim"), soft_wrap=True)
    written = write_tables(board, out)
    save_picture(board, out / "sweep.png")
    write_page(board, definition, out / "sweep.html")
    names = ", ".join(map(str, [*written, out / "sweep.png", out / "sweep.html"]))
    console.print(Text(f"written to {names}"), soft_wrap=True)


def table(board: Leaderboard) -> Table:
    """A row per group; in a narrow terminal long names wrap, numbers do not."""
    made = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    for name in ("group", "loss", "bits/byte", "=tokens", "=FLOPs", "FLOPs", "s", "state"):
        if name in ("group", "state"):
            made.add_column(name, min_width=len("3 done"), overflow="fold")
        else:
            made.add_column(name, justify="right", no_wrap=True)
    for row in board.rows:
        made.add_row(*_cells(row))
    return made


def facts(config: Config, phases: Phases) -> Facts:
    """What the leaderboard needs of a configuration.

    Args:
        phases: (first step, training FLOPs per token) of every schedule that it uses.
    """
    steps = [first for first, _ in phases]
    return Facts(
        tuple(phases),
        tokens_per_step(config),
        config.data.seq_len,
        tuple((step, tuple(effective_points(config, step))) for step in steps),
        total_steps(config),
        config.validation.tokens == 0,
    )


def _cells(row: Row) -> list[str | Text]:
    loss = Text("" if row.loss is None else row.loss.text(), style="bold")
    others = [row.bits_per_byte, row.at_equal_tokens, row.at_equal_flops]
    numbers = [f"{row.flops:.3g}" if row.flops else "", f"{row.seconds:.0f}"]
    is_bad = any(result.state == "failed" for result in row.results)
    return [row.group, loss, *map(_short, others), *numbers, Text(row.states, style="red" if is_bad else "")]


def _short(value: Spread | None) -> str:
    return "" if value is None or math.isnan(value.mean) else f"{value.mean:.4f}"
