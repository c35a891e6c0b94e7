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
    """Adds finished units to the bar of a step."""

    def __call__(self, units: int, /) -> None: ...


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
        yield lambda units: None
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description:<28}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as bars:
            task = bars.add_task(title, total=total)
            yield lambda units: bars.advance(task, units)
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

    def advance(self, units: int) -> None:
        self._done += units
        now = time.monotonic()
        if self._total and now - self._shown_at >= _LINE_INTERVAL_S:
            self._shown_at = now
            share = min(self._done / self._total, 1.0)
            left_s = (now - self.started_at) * (1 - share) / max(share, 1e-9)
            self._console.print(f"{self._title}: {share:.0%}, about {left_s:.0f} s left", highlight=False)
