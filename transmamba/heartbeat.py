"""What a rank does for the watchdog: a page of memory that says what it is at, and an ear for the verdict.

The page is a small memory-mapped file. Whoever reads it (`Pulse`) needs no lock, no GIL and no collective of the rank,
so nothing that blocks the rank blocks the reader.
"""

import atexit
import faulthandler
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from array import array
from collections import deque
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any

VERDICT = "verdict.json"
_TICK_S = 0.2
_MIN_STEP_LIMIT_S, _OTHER_LIMIT_S, _TIMES_MEDIAN = 60.0, 600.0, 10.0
# In the innermost frames of a rank that waits for others: it is rarely the one that hangs.
WAITING = ("torch/distributed/", "deepspeed/comm/", "p2p_communication")

# What a rank is doing; each phase has its own limit.
Phase = IntEnum("Phase", ["SETUP", "STEP", "SAVE", "VALIDATE", "DONE"], start=0)


class Word(IntEnum):
    """The words of 8 bytes that make a page. CREATED is ns of CLOCK_BOOTTIME, other times are ns of the monotonic."""

    PID = 0
    TICKS = 1  # start time of the process; with PID and BOOT it says who this is
    BOOT = 2
    CREATED = 3
    STEP = 4
    PHASE = 5
    BEAT = 6  # when the rank last gave a sign of life
    LEFT = 7  # when it gave up, or its interpreter began to end; 0 while it works
    ORDER = 8  # the exit code that the watchdog tells it to leave with
    SAMPLES = 9  # how often the rank looked at itself within steps
    WAITS = 10  # how often it then was waiting for others
    REASON = 11  # the exit code that it leaves with for a reason of its own, which is then the job's; else 0


# Those that `start` began here: one, except in tests.
_of_this_process: list["Heartbeat"] = []


class Heartbeat:
    """The signs of life of this process as one rank of a run, and its ear for the watchdog's verdict."""

    def __init__(self, folder: Path, rank: int):
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        self._pid = os.getpid()
        self._stacks = stacks_path(folder, rank).open("ab")
        if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
            # This is what `done` goes back to: a request for stacks that arrives late must not kill.
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        faulthandler.register(signal.SIGUSR1, file=self._stacks, all_threads=True)
        self._page = create_page(page_path(folder, rank))
        atexit.register(self.leave)
        self._closing = threading.Event()
        self._guard_thread = threading.Thread(target=self._guard, name="watchdog guard", daemon=True)
        self._guard_thread.start()

    def beat(self, step: int, phase: Phase) -> None:
        """Say that this rank is alive, at the start of `phase` in `step` or within it; costs a microsecond."""
        page = self._page
        page[Word.STEP], page[Word.PHASE], page[Word.BEAT] = step, phase, time.monotonic_ns()

    def again(self) -> None:
        """Say that this rank still is at what it last said."""
        if not self._closing.is_set() and os.getpid() == self._pid:
            self._page[Word.BEAT] = time.monotonic_ns()

    def leave(self, reason: int = 0) -> None:
        """Say that this rank gives up, before its peers can notice; the end of the interpreter says it, too.

        The first one to leave has the error; the others only lost their peer.

        Args:
            reason: exit code of an error that explains itself, such as damaged data; 0 for all others.
        """
        if not self._closing.is_set() and os.getpid() == self._pid and not self._page[Word.LEFT]:
            self._page[Word.REASON] = reason
            self._page[Word.LEFT] = time.monotonic_ns()

    def done(self) -> None:
        """Leave the watchdog's care: what this process does from now on ends no job. May be said twice."""
        if self._closing.is_set() or os.getpid() != self._pid:
            return
        self._closing.set()
        if self in _of_this_process:
            _of_this_process.remove(self)
        self.beat(self._page[Word.STEP], Phase.DONE)
        self._guard_thread.join()
        atexit.unregister(self.leave)
        faulthandler.unregister(signal.SIGUSR1)
        self._stacks.close()
        self._page.release()
        stacks = Path(self._stacks.name)
        with suppress(OSError):
            if stacks.stat().st_size == 0:
                stacks.unlink()

    def _guard(self) -> None:
        while not self._closing.wait(_TICK_S):
            if self._page[Word.ORDER]:
                os._exit(self._page[Word.ORDER])
            if self._page[Word.PHASE] == Phase.STEP:
                self._page[Word.SAMPLES] += 1
                self._page[Word.WAITS] += _waits_for_others()


def start(folder: Path, rank: int, world_size: int, limit_s: float | None = None) -> Heartbeat:
    """Begin this rank's heartbeat, and on local rank 0 the node's watchdog. To be called once the run folder exists.

    The ranks of a node are contiguous; LOCAL_RANK and LOCAL_WORLD_SIZE say which (0 and 1 without a launcher).

    Args:
        limit_s: seconds without a heartbeat that count as a hang; None for max(60, 10 x the median of recent steps)
            in steps, and 600 elsewhere and in the first steps.

    Raises:
        OSError: the run folder's logs cannot be written, or no process can be started.
    """
    if rank == 0:
        (folder / VERDICT).unlink(missing_ok=True)
    heartbeat = Heartbeat(folder, rank)
    _of_this_process.append(heartbeat)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        ranks = ",".join(str(rank + i) for i in range(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        since_ns = process_state(os.getpid())[1] * 10**9 // os.sysconf("SC_CLK_TCK")
        arguments = [str(folder), ranks, str(world_size), "auto" if limit_s is None else str(limit_s), str(since_ns)]
        process = subprocess.Popen(
            [sys.executable, "-m", "transmamba.watchdog", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # launchers and terminals signal the whole group
        )
        # If it ends before this process does, nobody else would collect it.
        threading.Thread(target=process.wait, name="watchdog reaper", daemon=True).start()
    return heartbeat


def sign_of_life() -> None:
    """Beat once more for this process, where it has a heartbeat: from what waits deep inside it and knows for what."""
    for heartbeat in _of_this_process:
        heartbeat.again()


class Pulse:
    """One rank as the watchdog sees it: its page, a pidfd (-1 once it ended), and when its beat last changed."""

    def __init__(self, number: int, page: memoryview, process: int):
        self.number, self.page, self.process = number, page, process
        self.beat = (-1, -1, -1)  # step, phase, ns
        self.steps_s: deque[float] = deque(maxlen=20)
        self.observe()

    def observe(self) -> None:
        """Read the heartbeat. Its age counts from when a change is seen here, so a torn read can only delay."""
        beat = (self.page[Word.STEP], self.page[Word.PHASE], self.page[Word.BEAT])
        if beat != self.beat:
            if beat[0] > self.beat[0] and self.beat[1] == beat[1] == Phase.STEP:
                self.steps_s.append((beat[2] - self.beat[2]) / (beat[0] - self.beat[0]) / 1e9)
            self.beat, self.changed_at = beat, time.monotonic()

    def limit_s(self, given_s: float | None) -> float:
        """Seconds without a heartbeat that this rank may take for what it does."""
        if given_s is not None:
            return given_s
        if self.beat[1] != Phase.STEP or len(self.steps_s) < 3:  # the first steps compile and tune kernels
            return _OTHER_LIMIT_S
        return max(_MIN_STEP_LIMIT_S, _TIMES_MEDIAN * sorted(self.steps_s)[len(self.steps_s) // 2])

    def send(self, number: int) -> None:
        """Signal this process, and no other that may have its pid by now."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.process, number)

    def summary(self, given_s: float | None) -> dict[str, Any]:
        """Last phase and step, the age of the last heartbeat and its limit, and when the interpreter began to end."""
        age_s, phase = (time.monotonic_ns() - self.beat[2]) / 1e9, Phase(self.beat[1]).name.lower()
        about = {"rank": self.number, "phase": phase, "step": self.beat[0], "age_s": round(age_s, 2)}
        about |= {"limit_s": round(self.limit_s(given_s), 2), "left_ns": self.page[Word.LEFT]}
        return about | {"reason": self.page[Word.REASON]}


def _waits_for_others() -> bool:
    """Whether a thread of this process is in an exchange between ranks, by its innermost three frames."""
    me = threading.get_ident()
    for thread, innermost in sys._current_frames().items():
        frame: FrameType | None = innermost
        for _ in range(3):
            if frame is None or thread == me:
                break
            if any(mark in frame.f_code.co_filename for mark in WAITING):
                return True
            frame = frame.f_back
    return False


def page_path(folder: Path, rank: int) -> Path:
    """The file of a rank's page."""
    return folder / "logs" / f"heartbeat-rank{rank:05d}"


def stacks_path(folder: Path, rank: int) -> Path:
    """Where a rank writes the stacks of its threads when it gets SIGUSR1."""
    return folder / "logs" / f"stacks-rank{rank:05d}.txt"


def create_page(path: Path) -> memoryview:
    """A new page of this process in the place of any former one, which others may still have mapped."""
    pid, created_ns = os.getpid(), time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    words = [pid, process_state(pid)[1], boot(), created_ns, 0, Phase.SETUP, time.monotonic_ns(), 0, 0, 0, 0, 0]
    temporary = path.with_name(f".{path.name}.{pid}")
    temporary.write_bytes(array("q", words).tobytes())
    page = open_page(temporary)
    os.replace(temporary, path)
    return page


def open_page(path: Path) -> memoryview:
    """The words of a page, as its rank sees and changes them.

    Raises:
        OSError: there is no such file.
        ValueError: it is too short.
    """
    with path.open("r+b") as file:
        return memoryview(mmap.mmap(file.fileno(), 8 * len(Word))).cast("q")


def open_process(page: memoryview) -> int:
    """A pidfd of the process that made a page, or -1 if it ended (a zombie, or its pid is another's by now)."""
    pid, process = page[Word.PID], -1
    if page[Word.BOOT] != boot():
        return -1
    with suppress(ProcessLookupError):
        process = os.pidfd_open(pid) if process_state(pid)[1] == page[Word.TICKS] else -1
    # The descriptor holds the process, not the number; so this second look settles whose it is.
    state, ticks = process_state(pid)
    if process >= 0 and (ticks != page[Word.TICKS] or state in "ZX"):
        os.close(process)
        process = -1
    return process


def boot() -> int:
    """Differs between machines and between boots of one, as do the clocks and pids that a page speaks of."""
    return int(Path("/proc/sys/kernel/random/boot_id").read_text()[:8], 16)


def process_state(pid: int) -> tuple[str, int]:
    """State and start time (clock ticks since boot) of a process; ("", 0) if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return "", 0
    return fields[0], int(fields[19])
