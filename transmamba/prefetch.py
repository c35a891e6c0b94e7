"""Reading the windows of the next steps in a process of its own, while the device computes."""
# B batch, T tokens.

import gc
import mmap
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from itertools import count
from multiprocessing.process import BaseProcess
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.mixture import Mixture
from transmamba.data_pipeline.remote_shards import RemoteFiles
from transmamba.data_pipeline.workers import die_with_parent
from transmamba.errors import EXIT_HANG, EXIT_RANK_DIED, RunError

# A launcher, a shell or Slurm sends these to every process of a job; they are meant for the trainer.
_NOT_FOR_READERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_USUALLY_AHEAD = 2
_LOOK_EVERY_S = 1.0  # how often a silent reader is looked at
_WAITS_S = 900.0  # how long a reader's word that it waits for a store holds: longer than a library may try at once
_SILENCE = "DataLoader timed out"  # how torch begins when nothing came for `_LOOK_EVERY_S`


class Rows(NamedTuple):
    """A rank's windows of one step as tensors; see `Windows`."""

    tokens_BT: Tensor
    starts: list[Tensor]
    weight_BT: Tensor

    def part(self, first: int, last: int) -> "Rows":
        """Rows `first` to `last` (exclusive)."""
        return Rows(self.tokens_BT[first:last], self.starts[first:last], self.weight_BT[first:last])


class RowReader:
    """Windows of one rank by data step: at once, or read ahead by another process into pinned memory.

    Args:
        mixture: the training stream.
        global_batch: windows per step.
        first_row, n_rows: this rank's part of every global batch.
        ahead: steps to read ahead; 0 reads when asked, but from a store always one ahead at least; None is 2 for pinned
            memory or a store, else 0.
        pin: whether tensors come in pinned memory.
        limit_s: seconds without an answer that count as a hang; 0 waits for ever.

    Attributes:
        is_remote: whether some of the windows come from a store, for which there may be long to wait.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        global_batch: int,
        first_row: int,
        n_rows: int,
        ahead: int | None = 0,
        pin: bool = False,
        limit_s: float = 0,
    ):
        self._steps = _Steps(mixture, global_batch, first_row, n_rows)
        self.is_remote = bool(self._steps.remote)
        if ahead is None:
            ahead = _USUALLY_AHEAD if pin or self.is_remote else 0
        self._ahead = max(ahead, 1) if self.is_remote else ahead
        self._pin, self._limit_s = pin, limit_s
        self._next: int | None = None
        self._source: Iterator[Rows | DataError] = iter(())
        self._process: BaseProcess | None = None

    def rows(self, data_step: int, following: int) -> Rows:
        """The windows of a step; `following` is the one that will be asked for next.

        Raises:
            DataError, DamagedData: as the mixture.
            RunError: the reading process died (exit 31) or gave no answer in time (exit 30); the line names it.
        """
        rows = None
        while rows is None:
            rows = self.poll(data_step, following)
        return rows

    def poll(self, data_step: int, following: int) -> Rows | None:
        """As `rows`, or None when a second has passed and the reading process waits for a store."""
        if not self._ahead:
            return _checked(self._steps[data_step])
        if self._next != data_step:
            self._start(data_step)
        rows = self._take(data_step)
        if rows is not None:
            self._next = data_step + 1 if following == data_step + 1 else None
        return rows

    @property
    def process_id(self) -> int | None:
        """Of the reading process, while there is one."""
        return None if self._process is None else self._process.pid

    def close(self) -> None:
        """End the reading process, whatever it is doing."""
        if self._process is not None:
            self._process.kill()  # it ignores what the loader would send
            self._process.join()
        self._process, self._next, self._source = None, None, iter(())

    def _start(self, data_step: int) -> None:
        self.close()
        loader = DataLoader(
            self._steps,
            batch_size=None,
            sampler=count(data_step),  # pyright: ignore[reportArgumentType], endless on purpose
            num_workers=1,
            prefetch_factor=self._ahead,
            pin_memory=self._pin,
            timeout=_LOOK_EVERY_S,
            worker_init_fn=self._steps.serve,
            multiprocessing_context="fork",
        )
        before = set(multiprocessing.active_children())
        handler = signal.getsignal(signal.SIGCHLD)
        # The reader must not finalise what is garbage here: memory of the GPU, process groups whose threads it has not.
        gc.freeze()
        self._source = iter(loader)
        gc.unfreeze()
        # Torch's handler would raise the reader's death in the midst of a step, far from who asks for rows.
        signal.signal(signal.SIGCHLD, handler)
        (self._process,) = set(multiprocessing.active_children()) - before
        self._next = data_step

    def _take(self, data_step: int) -> Rows | None:
        assert self._process is not None
        began = time.monotonic()
        while True:
            try:
                rows = next(self._source)
            except (RuntimeError, OSError, EOFError) as error:
                if not isinstance(error, RuntimeError):
                    self._process.join(_LOOK_EVERY_S)  # its pipe breaks before it is gone
                if not self._process.is_alive():
                    what = f"died with exit code {self._process.exitcode}"
                    fix = "look for an out-of-memory kill, and start again"
                    raise self._failure(EXIT_RANK_DIED, what, data_step, fix) from error
                if not str(error).startswith(_SILENCE):
                    raise  # of the reader itself, which has gone on to the next step by now
                if self._steps.waits():
                    return None
                if 0 < self._limit_s <= time.monotonic() - began:
                    what = f"gave no answer for {self._limit_s:g} s"
                    fix = "look at the storage of data.path, and start again; watchdog.limit_s sets the limit"
                    raise self._failure(EXIT_HANG, what, data_step, fix) from error
            else:
                return _checked(rows)

    def _failure(self, code: int, what: str, data_step: int, fix: str) -> RunError:
        who = f"the reader of rank {os.environ.get('RANK', '0')} (process {self.process_id})"
        self.close()
        return RunError(code, f"data.prefetch: {who} {what} at data step {data_step}. Fix: {fix}")


class _Steps(Dataset[Rows | DataError]):
    """What the reading process does, and its word to the trainer: when it last waited for a store, ns, 0 if it reads.

    The word is in memory that both processes share.
    """

    def __init__(self, mixture: Mixture, global_batch: int, first_row: int, n_rows: int):
        self._mixture, self._global_batch = mixture, global_batch
        self._first_row, self._n_rows = first_row, n_rows
        files = [stream.store.files for stream in mixture.streams.values()]
        self.remote = [each for each in files if isinstance(each, RemoteFiles)]
        self._waited = memoryview(mmap.mmap(-1, 8)).cast("q")

    def __getitem__(self, data_step: int) -> Rows | DataError:
        try:
            windows = self._mixture.rows(data_step * self._global_batch + self._first_row, self._n_rows)
        except DataError as error:
            # As a value: the loader would make another exception of it.
            return error
        finally:
            self._waited[0] = 0
        starts = [torch.from_numpy(np.ascontiguousarray(row)) for row in windows.starts]
        return Rows(torch.from_numpy(windows.tokens_BT), starts, torch.from_numpy(windows.weight_BT))

    def serve(self, _worker: int) -> None:
        """Be the reading process: ignore signals that are meant for the trainer, end with it, and tell it of waits."""
        for number in _NOT_FOR_READERS:
            signal.signal(number, signal.SIG_IGN)
        die_with_parent()
        for files in self.remote:
            files.call_on_wait(self._say_that_it_waits)

    def _say_that_it_waits(self) -> None:
        self._waited[0] = time.monotonic_ns()

    def waits(self) -> bool:
        """Whether the reading process waits for a store."""
        return self._waited[0] > 0 and time.monotonic_ns() - self._waited[0] < _WAITS_S * 1e9


def _checked(rows: Rows | DataError) -> Rows:
    if isinstance(rows, DataError):
        raise rows
    return rows
