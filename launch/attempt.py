"""One attempt at a run: the true exit code that it left in the run folder, and whether it got further."""

import json
import os
from pathlib import Path
from typing import Any

from transmamba.errors import EXIT_HANG, EXIT_INTERNAL, EXIT_NO_PROGRESS, EXIT_RANK_DIED

RESTARTED = (EXIT_HANG, EXIT_RANK_DIED)  # a batch system also starts a run again that it stopped itself (10)
MAX_IDLE_RESTARTS = 3
DIED_BY_SIGNAL = 128  # and more, as shells count: 128 + the signal's number


class Attempt:
    """To be made before the ranks start: only what is written from then on speaks of this attempt."""

    def __init__(self, folder: Path):
        self._exit = folder / "exit.json"
        self._checkpoints = folder / "checkpoints"
        self._exit_before, self._newest_before = _seen(self._exit), self._newest()

    def code(self, started: int, *, is_told: bool) -> int:
        """The exit code of the run.

        Args:
            started: exit code of the process that started the ranks; 128 + n if signal n ended one of them.
            is_told: somebody asked the run to stop.
        """
        record = self.record()
        if record is None:
            # No rank came as far as to write it: the run refused to start, or died.
            return EXIT_RANK_DIED if started >= DIED_BY_SIGNAL and not is_told else started
        lost_a_peer = record["code"] == EXIT_INTERNAL and started >= DIED_BY_SIGNAL
        return EXIT_RANK_DIED if lost_a_peer else record["code"]

    def record(self) -> dict[str, Any] | None:
        """What exit.json says, or None unless this attempt wrote it."""
        if _seen(self._exit) == self._exit_before:
            return None
        try:
            record = json.loads(self._exit.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) and isinstance(record.get("code"), int) else None

    def has_new_checkpoint(self) -> bool:
        """Whether a checkpoint was published that was not there before."""
        return self._newest() not in ("", self._newest_before)

    def give_up(self, code: int) -> int:
        """Note in exit.json that restarts bring nothing; returns the code that says so."""
        record = self.record() or {"checkpoint": None, "resume": None}
        cause = f"{MAX_IDLE_RESTARTS} restarts brought no new checkpoint; the last one ended with code {code}"
        if "cause" in record:
            cause += f": {record['cause']}"
        if self._exit.parent.is_dir():
            draft = self._exit.with_name(f".exit-{os.getpid()}")
            draft.write_text(json.dumps({**record, "code": EXIT_NO_PROGRESS, "cause": cause}, indent=1) + "\n")
            draft.replace(self._exit)
        return EXIT_NO_PROGRESS

    def _newest(self) -> str:
        """Name of the newest complete checkpoint; the step is padded, so the last name is the newest."""
        return max((path.parent.name for path in self._checkpoints.glob("step-*/manifest.json")), default="")


def _seen(path: Path) -> tuple[int, int, int]:
    """Size and identity of a file; zeros if there is none."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0, 0
    return found.st_size, found.st_ino, found.st_mtime_ns
