"""Which rank holds the others up: the own work of every rank per step, kept beside the ranks' logs.

A step lasts equally long on all ranks, because they wait for the slowest; what differs is how long each of them waits.
So every rank looks five times a second whether it waits for others (`transmamba.heartbeat`), and the node's watchdog
turns these counts into seconds. No step pays for it, and no collective takes part.
"""

import json
import os
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from transmamba.heartbeat import Pulse, Word

SLOW = 1.5  # times the median own work of the other ranks
_EVERY_S, _WINDOWS, _LEAST_SAMPLES = 5.0, 13, 10  # what counts is the last minute
_FILES = "pace-rank*.json"


@dataclass(frozen=True)
class Pace:
    """One rank's steps of late."""

    rank: int
    host: str
    step_s: float  # median duration of a step
    own_s: float  # of it, what the rank did not spend waiting for others
    samples: int  # how often the rank looked; 10 to 300


class Recorder:
    """Keeps the paces of a node's ranks in `logs/pace-rankNNNNN.json`, named after the node's first rank."""

    def __init__(self, folder: Path, first_rank: int):
        self._path = folder / "logs" / f"pace-rank{first_rank:05d}.json"
        if first_rank == 0:  # of a former start, perhaps of more ranks
            for path in self._path.parent.glob(_FILES):
                path.unlink(missing_ok=True)
        self._counts: dict[int, deque[tuple[int, int]]] = {}
        self._noted_at = time.monotonic()
        self._thread = threading.Thread(target=self._write, args=("[]",), daemon=True)

    def note(self, ranks: Iterable[Pulse], *, at_once: bool = False) -> None:
        """Take the counts of the ranks and write them down; does so every few seconds, or `at_once`."""
        now = time.monotonic()
        if now - self._noted_at < _EVERY_S and not at_once:
            return
        self._noted_at = now
        paces = [pace for rank in ranks if (pace := self._pace(rank)) is not None]
        # A storage that is stuck must not keep the watchdog from looking.
        if paces and not self._thread.is_alive():
            text = json.dumps([asdict(pace) for pace in paces])
            self._thread = threading.Thread(target=self._write, args=(text,), daemon=True)
            self._thread.start()
            self._thread.join(1.0 if at_once else 0.0)

    def _pace(self, rank: Pulse) -> Pace | None:
        counts = self._counts.setdefault(rank.number, deque([(0, 0)], maxlen=_WINDOWS))
        counts.append((rank.page[Word.SAMPLES], rank.page[Word.WAITS]))
        samples, waits = (last - first for first, last in zip(counts[0], counts[-1], strict=True))
        if samples < _LEAST_SAMPLES or not rank.steps_s:
            return None
        step_s = statistics.median(rank.steps_s)
        return Pace(rank.number, socket.gethostname(), step_s, step_s * (1 - waits / samples), samples)

    def _write(self, text: str) -> None:
        with suppress(OSError):
            draft = self._path.with_name(f".{self._path.name}.{os.getpid()}")
            draft.write_text(text, encoding="utf-8")
            os.replace(draft, self._path)


def read_paces(folder: Path) -> list[Pace]:
    """The last known pace of every rank of a run, by rank; empty for a run on one rank or of less than two seconds."""
    paces: dict[int, Pace] = {}
    for path in sorted((folder / "logs").glob(_FILES)):
        with suppress(OSError, ValueError, TypeError):
            paces |= {pace.rank: pace for pace in (Pace(**row) for row in json.loads(path.read_text()))}
    return [paces[rank] for rank in sorted(paces)] if len(paces) > 1 else []


def stragglers(paces: Sequence[Pace]) -> list[Pace]:
    """Ranks whose own work in a step takes more than 1.5 times the median of the others', the slowest first."""
    slow = [pace for pace in paces if pace.own_s > SLOW * _of_others(pace, paces) and pace.own_s > 0]
    return sorted(slow, key=lambda pace: -pace.own_s)


def straggler_lines(paces: Sequence[Pace]) -> list[str]:
    """Who is slow, and by how much; one line that says so when nobody is."""
    return [
        f"rank {pace.rank} on {pace.host} is slow: {pace.own_s:.3f} s of own work in a step of {pace.step_s:.3f} s, "
        f"the others' median is {_of_others(pace, paces):.3f} s"
        for pace in stragglers(paces)
    ] or ["no rank is slow"]


def _of_others(pace: Pace, paces: Sequence[Pace]) -> float:
    return statistics.median([other.own_s for other in paces if other.rank != pace.rank] or [pace.own_s])
