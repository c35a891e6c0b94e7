"""What a run shows on the screen: banner, plan, progress, validations, samples, where to go next."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from transmamba.evaluate import Held, HeldOut

LINE_EVERY_S = 5.0  # without a terminal


class Report:
    """Writes to standard output; a live bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self, console: Console | None = None, *, is_quiet: bool = False) -> None:
        self.console = console or Console(highlight=False, soft_wrap=not sys.stdout.isatty(), quiet=is_quiet)
        self._progress: Progress | None = None
        self._task: Any = None
        self._last_line_at = 0.0

    def facts(self, rows: dict[str, str | list[str]]) -> None:
        """Aligned name and value lines; a list of values goes on below the first."""
        width = max(len(name) for name in rows) + 2
        lines = [
            (name if index == 0 else "", value)
            for name, values in rows.items()
            for index, value in enumerate([values] if isinstance(values, str) else values)
        ]
        for name, value in lines:
            self.console.print(Text(f"{name:<{width}}", "bold") + Text(value))

    def say(self, text: str) -> None:
        """One line, above the bar."""
        self.console.print(Text(text))

    @contextmanager
    def steps(self, first: int, last: int) -> Iterator[None]:
        """Show progress from step `first` to `last` while the block runs."""
        if self.console.quiet or not self.console.is_terminal:
            yield
            return
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        with self._progress:
            self._task = self._progress.add_task("", total=last, completed=first)
            yield
        self._progress = None

    def step(self, record: dict[str, Any], n_steps: int, left_s: float) -> None:
        """One finished step."""
        text = f"loss {record['loss']:.3f}  {record['tokens_per_s']:,.0f} tok/s"
        if record.get("mfu") is not None:
            text += f"  MFU {record['mfu']:.1%}"
        if self._progress is not None:
            self._progress.update(self._task, completed=record["step"], description=text)
            return
        now = time.monotonic()
        if now - self._last_line_at >= LINE_EVERY_S or record["step"] in (1, n_steps):
            self._last_line_at = now
            self.console.print(f"step {record['step']}/{n_steps}  {text}  {left_s:.0f} s left")

    def validation(self, step: int, held: Held, result: HeldOut) -> None:
        """One validation set's result beside gzip's."""
        text = f"step {step}: {held.name} loss {result.loss:.4f}, {result.bits_per_byte:.4f} bits per byte"
        if held.gzip_bits_per_byte is not None:
            text += f" (gzip -9: {held.gzip_bits_per_byte:.4f})"
        self.say(text)

    def sample(self, label: str, prompt: str, continuation: str) -> None:
        """A prompt and what the model makes of it, on one line."""
        line = Text(f"{label:<9}", "bold") + Text(_one_line(prompt), "dim") + Text(_one_line(continuation))
        self.console.print(line)


def _one_line(text: str) -> str:
    return text.replace("\r", "").replace("\n", "\\n").replace("\t", "\\t")
