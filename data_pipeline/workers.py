"""Processes that do numbered tasks, report how far they are, and end when they should."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from typing import Any, TypeVar

# Told the source bytes and the tokens that were done since it was last called.
Advance = Callable[[int, int], None]
# Does one task: its number, its arguments, and whom to tell about progress.
Task = Callable[..., None]

Item = TypeVar("Item")
Answer = TypeVar("Answer")

# A fork would copy locks that other threads hold, and garbage whose finalisers wait for threads that it does not copy.
_CONTEXT = multiprocessing.get_context("spawn")
_PR_SET_PDEATHSIG = 1
_POLL_S = 0.2


class WorkerDied(RuntimeError):  # noqa: N818, named after what happened
    """A worker ended without an answer."""


class _Stopped(Exception):  # noqa: N818, no error
    """Another task failed."""


@dataclass(frozen=True)
class Workers:
    """Do tasks in processes of their own, or in this process where there are none."""

    pool: ProcessPoolExecutor | None
    n_workers: int
    counts: Any
    stop: Event | None

    def run(self, task: Task, calls: Sequence[tuple[Any, ...]], advance: Advance) -> None:
        """Call `task(*call, advance)` for all calls, in any order.

        Raises:
            WorkerDied: a worker process ended, for example killed because memory was short.
            Exception: whatever a task raises first; the others are stopped.
        """
        if self.pool is None:
            for call in calls:
                task(*call, advance)
            return
        waiting = deque(calls)
        running: dict[Future[None], tuple[Any, ...]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < 2 * self.n_workers:
                    call = waiting.popleft()
                    running[self.pool.submit(_do, task, call)] = call
                done, _ = wait(running, timeout=_POLL_S, return_when=FIRST_COMPLETED)
                self._report(advance)
                for future in done:
                    future.result()
                    del running[future]
        except BrokenProcessPool as error:
            numbers = ", ".join(str(call[0]) for call in list(running.values())[: self.n_workers])
            raise WorkerDied(f"a worker process died; parts {numbers} were being worked on") from error

    def _report(self, advance: Advance) -> None:
        with self.counts.get_lock():
            n_bytes, n_tokens = self.counts[:]
            self.counts[:] = [0, 0]
        advance(n_bytes, n_tokens)


@contextmanager
def start_workers(n_workers: int, *, threads: int) -> Iterator[Workers]:
    """Start workers for the block.

    They end with this process, however it ends, and with Ctrl-C.

    Args:
        n_workers: processes; 0 does the tasks here, with the threads that `tokenizers` takes.
        threads: of `tokenizers` in each worker.
    """
    # A daemonic process may not have children.
    if n_workers == 0 or multiprocessing.current_process().daemon:
        yield Workers(None, 0, None, None)
        return
    counts, stop = _CONTEXT.Array("q", 2), _CONTEXT.Event()
    arguments = (os.getpid(), threads, counts, stop)
    with ProcessPoolExecutor(n_workers, _CONTEXT, initializer=_start_worker, initargs=arguments) as pool:
        try:
            yield Workers(pool, n_workers, counts, stop)
        except BaseException:
            stop.set()
            # The interpreter waits for it at exit in any case, and may then find its pipe closed under its hands.
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def map_in_order(
    function: Callable[[Item], Answer], items: Sequence[Item], n_workers: int, *, chunk: int
) -> Generator[Answer, None, None]:
    """Answers of `function` for all items, in their order, by processes that end when the iterator does.

    Args:
        n_workers: processes; with 1 the work is done here.
        chunk: items that a process is given at once.

    Raises:
        WorkerDied: a worker process ended, for example killed because memory was short.
    """
    if n_workers == 1 or multiprocessing.current_process().daemon:
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(n_workers, _CONTEXT, initializer=_belong_to, initargs=(os.getpid(),))
    try:
        yield from pool.map(function, items, chunksize=chunk)
    except BrokenProcessPool as error:
        raise WorkerDied("a worker process died") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends, however it ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _belong_to(parent: int) -> None:
    die_with_parent()
    if os.getppid() != parent:
        # It died before it could be watched.
        os._exit(1)
    # Ends it without a traceback; what is half done is done again.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _start_worker(parent: int, threads: int, counts: Any, stop: Event) -> None:
    _belong_to(parent)
    # The library offers no other way to say this.
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(threads)

    _shared[:] = [counts, stop]


# What a worker was given by its parent: the counts and the event of `Workers`.
_shared: list[Any] = []


def _do(task: Task, call: tuple[Any, ...]) -> None:
    counts, stop = _shared

    def advance(n_bytes: int, n_tokens: int) -> None:
        if stop.is_set():
            raise _Stopped
        with counts.get_lock():
            counts[0] += n_bytes
            counts[1] += n_tokens

    task(*call, advance)
