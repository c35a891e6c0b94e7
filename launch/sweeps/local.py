"""Trials on this machine, some at a time: every one is a process; a stop saves them all, and a failure stops none."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Protocol

from transmamba.errors import EXIT_DONE, EXIT_STOPPED
from transmamba.launch.sweeps.files import (
    DONE,
    FAILED,
    INTERRUPTED_STATE,
    OVER,
    RUNNING,
    Status,
    TrialFolder,
    read_status,
    state_of,
    write_status,
)
from transmamba.launch.sweeps.trials import key_of

POLL_S = 0.25
NEWS_EVERY_S = 60.0
_PR_SET_PDEATHSIG = 1


class Queue(Protocol):
    """Where trials come from."""

    def next(self) -> TrialFolder | None:
        """The trial to start next; None when there is none at the moment."""
        ...

    def watch(self, trial: TrialFolder) -> None:
        """Look at a running trial; may ask it to stop."""
        ...

    def ended(self, trial: TrialFolder, status: Status) -> Status:
        """Take note of an attempt that ended; returns the status to record."""
        ...

    def left(self) -> int:
        """Trials that are still to be started."""
        ...


class Listed:
    """The trials of a grid, in order, each once; those that are over already are left out."""

    def __init__(self, trials: Sequence[TrialFolder], *, retry: bool = False) -> None:
        over = tuple(state for state in OVER if not (retry and state == FAILED))
        self._waiting = deque(trial for trial in trials if read_status(trial).state not in over)

    def next(self) -> TrialFolder | None:
        return self._waiting.popleft() if self._waiting else None

    def watch(self, trial: TrialFolder) -> None:
        pass

    def ended(self, trial: TrialFolder, status: Status) -> Status:
        return status

    def left(self) -> int:
        return len(self._waiting)


@dataclass(slots=True)
class _Running:
    trial: TrialFolder
    process: subprocess.Popen[bytes]
    started: float
    before: Status


def command(trial: TrialFolder, n_ranks: int, threads: int) -> list[str]:
    """The command of one trial with so many ranks, each with so many threads."""
    overrides = list(trial.overrides)
    if "train.threads" not in map(key_of, overrides):
        overrides.append(f"train.threads={threads}")
    # `transmamba launch local` by the running Python, so that it needs no PATH.
    program = [sys.executable, "-c", "from transmamba.cli import main; main()"]
    return [*program, "launch", "local", "--nproc", str(n_ranks), "--", *overrides]


class Slots:
    """Runs trials, at most `n_slots` at a time."""

    def __init__(
        self, n_slots: int, *, n_ranks: int = 1, time_limit_s: float | None = None, say: Callable[[str], None] = print
    ) -> None:
        """Share the cores and GPUs among the slots; after `time_limit_s` all trials are stopped and saved."""
        self._n_slots, self._n_ranks, self._say = n_slots, n_ranks, say
        self._threads = max(1, len(os.sched_getaffinity(0)) // (n_slots * n_ranks))
        self._deadline = None if time_limit_s is None else time.monotonic() + time_limit_s
        self._running: dict[int, _Running] = {}
        self._ends: list[Status] = []
        self._asked: str | None = None  # who wants all to stop; a signal's handler does no more than set it
        self._is_stopping = False
        self._told_at = time.monotonic()

    def run(self, queue: Queue) -> int:
        """Run what the queue has to give.

        Returns:
            0 when every trial is over and none failed, 10 when trials are left, else the first failure's exit code.
        """
        with self._signals():
            while True:
                self._collect(queue)
                if self._asked is None and self._deadline is not None and time.monotonic() >= self._deadline:
                    self._asked = "the time limit"
                if self._asked is not None and not self._is_stopping:
                    self._stop_all(self._asked)
                if not self._is_stopping:
                    self._fill(queue)
                if not self._running and (self._is_stopping or not queue.left()):
                    break
                self._tell(queue)
                time.sleep(POLL_S)
        return self._code(queue)

    def _code(self, queue: Queue) -> int:
        failed = next((status.code for status in self._ends if status.state == FAILED and status.code), None)
        if queue.left() or any(status.state == INTERRUPTED_STATE for status in self._ends):
            return EXIT_STOPPED
        return failed or EXIT_DONE

    def _fill(self, queue: Queue) -> None:
        for slot in range(self._n_slots):
            if slot in self._running:
                continue
            trial = queue.next()
            if trial is None:
                return
            before = read_status(trial)
            status = replace(before, state=RUNNING, attempts=before.attempts + 1)
            write_status(trial, status)
            self._running[slot] = _Running(trial, self._start(trial, slot), time.monotonic(), status)
            goes_on = " goes on" if before.attempts else " starts"
            self._say(f"trial {trial.trial.name}{goes_on}; {queue.left()} wait")

    def _start(self, trial: TrialFolder, slot: int) -> subprocess.Popen[bytes]:
        environ = dict(os.environ) | {"OMP_NUM_THREADS": str(self._threads), "OMP_WAIT_POLICY": "PASSIVE"}
        gpus = _gpus()
        if gpus:
            own = [gpus[(slot * self._n_ranks + rank) % len(gpus)] for rank in range(min(self._n_ranks, len(gpus)))]
            environ["CUDA_VISIBLE_DEVICES"] = ",".join(own)
        with (trial.path / "log.txt").open("ab") as log:
            return subprocess.Popen(
                command(trial, self._n_ranks, self._threads),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environ,
                # A terminal's Ctrl-C is for this process, which asks the trials to save.
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def _collect(self, queue: Queue) -> None:
        for slot, running in list(self._running.items()):
            code = running.process.poll()
            if code is None:
                queue.watch(running.trial)
                continue
            del self._running[slot]
            seconds = time.monotonic() - running.started
            ended = replace(running.before, state=state_of(code), code=code, seconds=running.before.seconds + seconds)
            status = queue.ended(running.trial, ended)
            write_status(running.trial, status)
            self._ends.append(status)
            self._say(f"trial {running.trial.trial.name} {_verdict(running.trial, status)}, {seconds:.0f} s")

    def _stop_all(self, cause: str) -> None:
        self._is_stopping = True
        if self._running:
            self._say(f"{cause}: waiting for {len(self._running)} trials to save")
        for running in self._running.values():
            running.process.send_signal(signal.SIGTERM)

    def _tell(self, queue: Queue) -> None:
        if time.monotonic() - self._told_at < NEWS_EVERY_S:
            return
        self._told_at = time.monotonic()
        trials = [running.trial for running in self._running.values()]
        now = "; ".join(f"{trial.path.name} {progress(trial.run)}" for trial in trials)
        over = [status.seconds for status in self._ends if status.state == DONE]
        left = ""
        if over:
            n_left = queue.left() + len(self._running) / 2
            left = f", about {n_left * sum(over) / len(over) / self._n_slots / 60:.0f} min left"
        self._say(f"{len(self._ends)} ended, {queue.left()} wait{left}: {now}")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def note(number: int, _frame: FrameType | None) -> None:
            self._asked = signal.Signals(number).name

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
        previous = {number: signal.signal(number, note) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def progress(run: Path) -> str:
    """The last step of a run and its loss, in words."""
    record = last_record(run)
    return f"at step {record['step']}, loss {record['loss']:.3f}" if record else "not yet at a step"


def last_record(run: Path) -> dict[str, float] | None:
    """The last whole line of a run's metrics.jsonl, read from the file's end."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 65_536))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            return json.loads(line)
        except ValueError:
            continue
    return None


def _verdict(trial: TrialFolder, status: Status) -> str:
    record = last_record(trial.run)
    held = record.get("validation") if record else None
    if status.state == DONE and isinstance(held, dict) and held:
        return f"is done: validation loss {next(iter(held.values()))['loss']:.4f}"
    where = f", see {trial.path / 'log.txt'}" if status.state == FAILED else ""
    return f"is {status.state} (exit code {status.code}{where})"


def _gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name and name != "-1"]
    names = sorted(path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
    return sorted((name for name in names if name.isdecimal()), key=int)


def _die_with_parent() -> None:
    # A trial whose sweep was killed saves and ends, instead of going on beside the next command's.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
