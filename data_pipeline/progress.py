"""Progress of a long step: a bar with the time left on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_LINE_INTERVAL_S = 5.0


class Advance(Protocol):
    """Adds finished units to the bar of a step; a note, such as a rate, is shown beside it until the next one."""

    def __call__(self, units: int, note: str = "", /) -> None: ...


@contextmanager
def show_step(title: str, total: int | None, *, visible: bool) -> Iterator[Advance]:
    """Show the progress of one step on stderr while the block runs.

    Args:
        title: what is being done.
        total: units of work; None when it is not known, which shows the elapsed time only.
        visible: False shows nothing.
    """
    console = Console(stderr=True)
    if not visible:
        yield lambda units, note="": None
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
        )
        notes = TextColumn("{task.fields[note]}")
        with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), notes, console=console) as bars:
            task = bars.add_task(title, total=total, note="")
            yield lambda units, note="": bars.update(task, advance=units, note=note)
            bars.update(task, total=total or 1, completed=total or 1)
    else:
        lines = _Lines(console, title, total)
        yield lines.advance
        console.print(f"{title}: done in {time.monotonic() - lines.started_at:.1f} s", highlight=False)


class _Lines:
    def __init__(self, console: Console, title: str, total: int | None) -> None:
        self.started_at = self._shown_at = time.monotonic()
        self._console = console
        self._title = title
        self._total = total
        self._done = 0

    def advance(self, units: int, note: str = "") -> None:
        self._done += units
        now = time.monotonic()
        if self._total and now - self._shown_at >= _LINE_INTERVAL_S:
            self._shown_at = now
            share = min(self._done / self._total, 1.0)
            left_s = (now - self.started_at) * (1 - share) / max(share, 1e-9)
            line = f"{self._title}: {share:.0%}, about {left_s:.0f} s left{note and f', {note}'}"
            self._console.print(line, highlight=False)
