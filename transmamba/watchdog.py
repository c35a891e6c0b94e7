"""A process beside the ranks of a node that ends the job when one of them dies or hangs.

Every rank notes what it does in a small memory-mapped file, its heartbeat. A child of each node's local rank 0 reads
them; it needs no lock, no GIL and no collective of the ranks, so nothing that blocks them blocks it. Its verdict is
exit code 30 (hang) or 31 (a rank died), told in verdict.json, events.jsonl, exit.json and one line on stderr.
"""

import atexit
import faulthandler
import json
import mmap
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from array import array
from collections import deque
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from typing import Any

from transmamba.errors import EXIT_HANG, EXIT_RANK_DIED

VERDICT = "verdict.json"
APPEAR_S = 60.0  # how long a rank may take to its first heartbeat, from that of local rank 0
PATIENCE_S = 1.5  # how long ranks may take to leave by themselves once they are told to
STACKS_S = 2.0  # how long to wait for stacks; a rank in a system call that cannot be interrupted writes none
_GUARD_TICK_S, _TICK_S = 0.2, 0.5
_MIN_STEP_LIMIT_S, _OTHER_LIMIT_S, _TIMES_MEDIAN = 60.0, 600.0, 10.0

# A heartbeat file is these words of 8 bytes: who it is, the last beat, when the interpreter began to end, and the exit
# code it is told to leave with. Times are ns: _CREATED of CLOCK_BOOTTIME, like start times in /proc, others monotonic.
_PID, _TICKS, _BOOT, _CREATED, _STEP, _PHASE, _BEAT, _LEFT, _ORDER, _N_WORDS = range(10)
# In the innermost frames of a rank that waits for others: it is rarely the one that hangs.
_WAITING = ("torch/distributed/", "deepspeed/comm/", "p2p_communication")

# What a rank is doing; each phase has its own limit.
Phase = IntEnum("Phase", ["SETUP", "STEP", "SAVE", "VALIDATE", "DONE"], start=0)


class Heartbeat:
    """The signs of life of this process as one rank of a run, and its ear for the watchdog's verdict."""

    def __init__(self, folder: Path, rank: int):
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        self._pid = os.getpid()
        self._stacks = _log(folder, "stacks", rank).open("ab")
        if signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
            # This is what `done` goes back to: a request for stacks that arrives late must not kill.
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        faulthandler.register(signal.SIGUSR1, file=self._stacks, all_threads=True)
        self._page = _create_page(_log(folder, "heartbeat", rank))
        atexit.register(self._leave)
        self._closing = threading.Event()
        self._guard_thread = threading.Thread(target=self._guard, name="watchdog guard", daemon=True)
        self._guard_thread.start()

    def beat(self, step: int, phase: Phase) -> None:
        """Say that this rank is alive, at the start of `phase` in `step` or within it; costs a microsecond."""
        page = self._page
        page[_STEP], page[_PHASE], page[_BEAT] = step, phase, time.monotonic_ns()

    def done(self) -> None:
        """Leave the watchdog's care: what this process does from now on ends no job. May be said twice."""
        if self._closing.is_set() or os.getpid() != self._pid:
            return
        self._closing.set()
        self.beat(self._page[_STEP], Phase.DONE)
        self._guard_thread.join()
        atexit.unregister(self._leave)
        faulthandler.unregister(signal.SIGUSR1)
        self._stacks.close()
        self._page.release()

    def _leave(self) -> None:
        # The rank whose interpreter was first to end has the error; the others only lost their peer.
        if os.getpid() == self._pid:
            self._page[_LEFT] = time.monotonic_ns()

    def _guard(self) -> None:
        while not self._closing.wait(_GUARD_TICK_S):
            if self._page[_ORDER]:
                os._exit(self._page[_ORDER])


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
    if os.environ.get("LOCAL_RANK", "0") == "0":
        ranks = ",".join(str(rank + i) for i in range(int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        since_ns = _stat(os.getpid())[1] * 10**9 // os.sysconf("SC_CLK_TCK")
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


class _Rank:
    """What the watchdog knows about one rank: its page, a pidfd (-1 once it ended), and when its beat last changed."""

    def __init__(self, number: int, page: memoryview, process: int):
        self.number, self.page, self.process = number, page, process
        self.beat = (-1, -1, -1)  # step, phase, ns
        self.steps_s: deque[float] = deque(maxlen=20)
        self.observe()

    def observe(self) -> None:
        """Read the heartbeat. Its age counts from when a change is seen here, so a torn read can only delay."""
        beat = (self.page[_STEP], self.page[_PHASE], self.page[_BEAT])
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
        return about | {"limit_s": round(self.limit_s(given_s), 2), "left_ns": self.page[_LEFT]}


class Watchdog:
    """Watches the ranks of one node (`ranks`, their numbers) until all are done or the job has to end.

    A heartbeat begun before `since_ns` (CLOCK_BOOTTIME) by a process that has ended is that of a former run.
    """

    def __init__(self, folder: Path, ranks: list[int], world_size: int, limit_s: float | None, since_ns: int):
        self._folder, self._numbers, self._limit_s, self._since_ns = folder, ranks, limit_s, since_ns
        self._is_alone = world_size == len(ranks)
        self._ranks: dict[int, _Rank] = {}
        self._poll = select.poll()
        self._started_at = self._looked_at = time.monotonic()
        self._old_verdict = _seen(folder / VERDICT)

    def run(self) -> int:
        """Returns 0 once every rank is done, else the code that the job was ended with."""
        while True:
            self._look(_TICK_S)
            ranks, has_all = self._ranks.values(), len(self._ranks) == len(self._numbers)
            if ranks and all(rank.beat[1] == Phase.DONE and (has_all or rank.process < 0) for rank in ranks):
                return 0
            others = self._verdict_of_others()
            if others is not None:
                return self._end_job(others["code"], [], others)
            if not has_all and time.monotonic() - self._started_at > APPEAR_S:
                return self._end_job(EXIT_RANK_DIED, [])
            if dead := self._working(False):
                if all(rank.page[_LEFT] for rank in dead):
                    self._look(0.2)  # who only lost a peer may be seen first
                    dead = self._working(False)
                return self._end_job(EXIT_RANK_DIED, dead)
            if suspects := self._late():
                return self._end_job(EXIT_HANG, suspects)

    def _look(self, wait_s: float) -> None:
        """Read every heartbeat after `wait_s`, or as soon as a process ends."""
        for number in {*self._numbers} - {*self._ranks}:
            with suppress(OSError, ValueError):  # not there yet
                self._register(number)
        ended = {fd for fd, _ in self._poll.poll(wait_s * 1000)}
        now = time.monotonic()
        pause_s, self._looked_at = now - self._looked_at - wait_s, now
        for rank in self._ranks.values():
            rank.observe()
            if pause_s > 2:  # the node was frozen or very busy: nobody could beat
                rank.changed_at += pause_s
            if rank.process in ended:
                self._poll.unregister(rank.process)
                os.close(rank.process)
                rank.process = -1

    def _register(self, number: int) -> None:
        with _log(self._folder, "heartbeat", number).open("r+b") as file:
            page = memoryview(mmap.mmap(file.fileno(), 8 * _N_WORDS)).cast("q")
        process = _open_process(page[_PID], page[_TICKS]) if page[_BOOT] == _boot() else -1
        if process >= 0:
            self._poll.register(process, select.POLLIN)
        elif page[_BOOT] != _boot() or page[_CREATED] < self._since_ns:
            return
        self._ranks[number] = _Rank(number, page, process)

    def _working(self, is_alive: bool) -> list[_Rank]:
        """Ranks that have not said that they are done, and whose process lives or does not."""
        undone = [rank for rank in self._ranks.values() if rank.beat[1] != Phase.DONE]
        return [rank for rank in undone if (rank.process >= 0) == is_alive]

    def _late(self) -> list[_Rank]:
        """Suspects once a rank is beyond its limit: who waits for the one that hangs stops beating with it."""
        now = time.monotonic()
        ages = [(now - rank.changed_at, rank) for rank in self._working(True)]
        exceeded = [age for age, rank in ages if age > rank.limit_s(self._limit_s)]
        return [rank for age, rank in ages if exceeded and age > 0.75 * min(exceeded)]

    def _verdict_of_others(self) -> dict[str, Any] | None:
        is_new = not self._is_alone and _seen(self._folder / VERDICT) not in ((0, 0, 0), self._old_verdict)
        return json.loads((self._folder / VERDICT).read_text(encoding="utf-8")) if is_new else None

    def _end_job(self, code: int, suspects: list[_Rank], verdict: dict[str, Any] | None = None) -> int:
        """Stacks and records first, because a launcher may end this process together with the last rank."""
        stopped = {rank.number for rank in self._working(True) if _stat(rank.page[_PID])[0] == "T"}
        roll = [rank.summary(self._limit_s) for rank in self._ranks.values()]
        stacks, waiting = self._ask_for_stacks()
        if verdict is None:
            doubts = {n: (r not in suspects, n not in stopped, n in waiting) for n, r in self._ranks.items()}
            roll.sort(key=lambda about: (doubts[about["rank"]], about["left_ns"], about["step"], -about["age_s"]))
            verdict = self._describe(code, roll[0] if suspects else None) | {"stacks": stacks, "ranks": roll}
            if code == EXIT_HANG and verdict["rank"] in waiting and not self._is_alone:
                time.sleep(1)  # everybody here waits: the node of the rank that hangs shall speak first
        self._record_within(2.0, verdict)
        patient_until = time.monotonic() + PATIENCE_S
        while self._working(True) and time.monotonic() < patient_until + 2:
            for rank in self._working(True):
                rank.page[_ORDER] = verdict["code"]
                if time.monotonic() > patient_until:
                    rank.send(signal.SIGKILL)
            self._look(0.05)
        self._record_within(2.0, verdict)  # rank 0 may have written its own exit.json on its way out
        line = f"{verdict['cause']}. Fix: look at logs and {VERDICT} in {self._folder}, then {_again(self._folder)}"
        with suppress(OSError):
            print(f"transmamba: error: watchdog: {line}", file=sys.stderr, flush=True)
            if 0 in self._numbers:
                (self._folder / "lock.json").unlink(missing_ok=True)  # of rank 0, which is no more
        return verdict["code"]

    def _ask_for_stacks(self) -> tuple[list[str], set[int]]:
        """Have every living rank write the stacks of its threads; returns the files and who waits for others."""
        paths = {rank.number: _log(self._folder, "stacks", rank.number) for rank in self._working(True)}
        begun = {number: _seen(path)[0] for number, path in paths.items()}
        for rank in self._working(True):
            rank.send(signal.SIGCONT)  # a stopped process writes nothing
            rank.send(signal.SIGUSR1)
        until, sizes, is_whole = time.monotonic() + STACKS_S, begun, False
        while not is_whole and time.monotonic() < until:
            time.sleep(0.1)
            self._look(0)
            before, sizes = sizes, {number: _seen(path)[0] for number, path in paths.items()}
            missing = [rank for rank in self._working(True) if sizes.get(rank.number) == begun.get(rank.number, -1)]
            is_whole = sizes == before and not missing
        waiting = set()
        for number, path in paths.items():
            with suppress(OSError):
                # The main thread is the oldest and comes last, its innermost frame first.
                text = path.read_bytes()[begun[number] :].decode(errors="replace").rpartition("hread 0x")[2]
                if any(mark in line for line in text.splitlines()[1:4] for mark in _WAITING):
                    waiting.add(number)
        return [str(path) for number, path in paths.items() if sizes[number] > begun[number]], waiting

    def _describe(self, code: int, about: dict[str, Any] | None) -> dict[str, Any]:
        """The verdict in words and numbers; nothing is known about a rank that has not appeared."""
        host, what = socket.gethostname(), "died without a word (killed, out of memory or crashed)"
        if about is None:
            about = {"rank": min({*self._numbers} - {*self._ranks}), "phase": "setup", "step": 0, "age_s": APPEAR_S}
            what = "gave no sign of life"
        elif code == EXIT_HANG:
            what = f"hangs, without a heartbeat for {about['age_s']} s (limit {about['limit_s']} s)"
        elif about["left_ns"]:
            what = "ended by itself before the job was done"
        cause = f"rank {about['rank']} on {host} {what}, in phase {about['phase']} at step {about['step']}"
        return {"code": code, "cause": cause, **about, "host": host}

    def _record_within(self, patience_s: float, verdict: dict[str, Any]) -> None:
        # A stuck storage must not keep the job from ending.
        (thread := threading.Thread(target=self._record, args=(verdict,), daemon=True)).start()
        thread.join(patience_s)

    def _record(self, verdict: dict[str, Any]) -> None:
        """Write verdict.json unless another node was first (then repeat its words), and exit.json like rank 0."""
        path = self._folder / VERDICT
        with suppress(OSError, ValueError):
            draft = self._draft(verdict)
            if _seen(path) == self._old_verdict != (0, 0, 0):
                path.unlink(missing_ok=True)
            try:
                os.link(draft, path)
            except FileExistsError:
                verdict.update(json.loads(path.read_text(encoding="utf-8")))
            else:
                with (self._folder / "events.jsonl").open("ab", buffering=0) as events:
                    events.write(json.dumps({"time": time.time(), "event": "verdict", **verdict}).encode() + b"\n")
        with suppress(OSError):
            found = (path.parent for path in (self._folder / "checkpoints").glob("step-*/manifest.json"))
            newest = max((path for path in found if path.name.removeprefix("step-").isdigit()), default=None)
            record = {"code": verdict["code"], "cause": verdict["cause"], "checkpoint": newest and str(newest)}
            os.replace(self._draft(record | {"resume": _again(self._folder)}), self._folder / "exit.json")

    def _draft(self, record: dict[str, Any]) -> Path:
        path = self._folder / "logs" / f".watchdog-{socket.gethostname()}-{os.getpid()}"
        path.unlink(missing_ok=True)  # its former content may be a published file
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        return path


def _create_page(path: Path) -> memoryview:
    """A new heartbeat file in the place of any former one, which others may still have mapped."""
    pid, created_ns = os.getpid(), time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    words = [pid, _stat(pid)[1], _boot(), created_ns, 0, Phase.SETUP, time.monotonic_ns(), 0, 0]
    temporary = path.with_name(f".{path.name}.{pid}")
    temporary.write_bytes(array("q", words).tobytes())
    with temporary.open("r+b") as file:
        page = memoryview(mmap.mmap(file.fileno(), 8 * _N_WORDS)).cast("q")
    os.replace(temporary, path)
    return page


def _log(folder: Path, kind: str, rank: int) -> Path:
    return folder / "logs" / f"{kind}-rank{rank:05d}{'' if kind == 'heartbeat' else '.txt'}"


def _boot() -> int:
    """Differs between machines and between boots of one, as do the clocks and pids that a heartbeat speaks of."""
    return int(Path("/proc/sys/kernel/random/boot_id").read_text()[:8], 16)


def _stat(pid: int) -> tuple[str, int]:
    """State and start time (clock ticks since boot) of a process; ("", 0) if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return "", 0
    return fields[0], int(fields[19])


def _open_process(pid: int, ticks: int) -> int:
    """A pidfd of the process that started then, or -1 if it ended (a zombie, or its pid is another's by now)."""
    process = -1
    with suppress(ProcessLookupError):
        process = os.pidfd_open(pid) if _stat(pid)[1] == ticks else -1
    # The descriptor holds the process, not the number; so this second look settles whose it is.
    state, found = _stat(pid)
    if process >= 0 and (found != ticks or state in "ZX"):
        os.close(process)
        process = -1
    return process


def _seen(path: Path) -> tuple[int, int, int]:
    """Size and identity of a file; zeros if there is none."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0, 0
    return found.st_size, found.st_ino, found.st_mtime_ns


def _again(folder: Path) -> str:
    """The command that continues the run."""
    here = Path(sys.executable).parent
    tools = "" if shutil.which("transmamba") == str(here / "transmamba") else f"{os.path.relpath(here)}/"
    return f"{tools}python -m transmamba.train --config {folder / 'config.yaml'}"


def main(arguments: list[str]) -> int:
    """`FOLDER RANK,RANK,... WORLD_SIZE LIMIT_S|auto SINCE_NS`; see `Watchdog`."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # meant for the ranks; this process ends when they do
    folder, ranks, world_size, limit_s, since_ns = arguments
    numbers, given_s = [int(number) for number in ranks.split(",")], None if limit_s == "auto" else float(limit_s)
    return Watchdog(Path(folder), numbers, int(world_size), given_s, int(since_ns)).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
