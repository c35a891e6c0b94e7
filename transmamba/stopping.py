"""Asking a run to stop: signals and the stop file."""

import signal
from pathlib import Path
from types import FrameType

from transmamba.errors import EXIT_STOP_FILE, EXIT_STOPPED

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
STOP_FILE = "STOP"


class StopRequest:
    """Notes that somebody wants the run to end; the loop asks at step boundaries. A second signal changes nothing."""

    def __init__(self, folder: Path):
        self._file = folder / STOP_FILE
        self._signal: int | None = None
        self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number

    @property
    def code(self) -> int | None:
        """Exit code to end with after saving, or None to go on."""
        if self._signal is not None:
            return EXIT_STOPPED
        return EXIT_STOP_FILE if self._file.exists() else None

    @property
    def cause(self) -> str:
        """In words."""
        return signal.Signals(self._signal).name if self._signal is not None else f"{self._file} exists"

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
