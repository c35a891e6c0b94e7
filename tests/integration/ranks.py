"""The processes of a run on this machine: ranks by their heartbeat page, all by the run folder in their arguments."""

import os
import signal
from pathlib import Path

from transmamba.heartbeat import Word, open_page


def signal_rank(folder: Path, rank: int, number: signal.Signals) -> None:
    """Signal one rank alone."""
    os.kill(open_page(folder / "logs" / f"heartbeat-rank{rank:05d}")[Word.PID], number)


def living(folder: Path) -> list[int]:
    """Pids of all processes of a run: each has the run folder among its arguments."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(folder).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found
