"""Saving while training goes on: one copy to host memory, then a thread on every rank writes that rank's files.

No thread takes part in a collective. A rank that has written its files leaves a note beside them; rank 0's thread
publishes the checkpoint when every rank's note is there. At step boundaries the ranks add up who is still busy and who
failed, so that all of them learn the end of a save between the same two steps, and a failure anywhere calls it off.
"""

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from transmamba import disk
from transmamba.checkpoint import (
    TEMPORARY,
    Ranks,
    directory_of,
    merge,
    publish,
    published,
    temporary_of,
    write_part,
)
from transmamba.config import CheckpointConfig
from transmamba.errors import EXIT_STORAGE, RunError
from transmamba.metrics import Journal
from transmamba.slices import Piece
from transmamba.staging import Image, Memory, PlannedFile, Written, plan, write_image

RETRY_S = (0.5, 2.0, 8.0)  # waits between the attempts at a write that the file system refused
ROOM = 1.02  # of the tensors' bytes, for headers and manifest
_PATIENCE_S = 0.05
Result = TypeVar("Result")


@dataclass
class _Flight:
    """A save on its way. Its thread sets what follows `ended`; the others only read it."""

    step: int
    files: list[PlannedFile]
    record: dict[str, Any]
    n_bytes: int  # of all ranks
    started: float
    pause_s: float = 0.0
    thread: threading.Thread = field(default_factory=threading.Thread)
    called_off: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    written: list[str] = field(default_factory=list)  # this rank's files
    refusals: list[str] = field(default_factory=list)  # what was tried again
    problem: str | None = None
    bug: Exception | None = None
    pruned: list[str] = field(default_factory=list)


class Saver:
    """Saves a run's checkpoints, one at a time. All ranks call its methods between the same steps."""

    def __init__(
        self, folder: Path, config: CheckpointConfig, journal: Journal, ranks: Ranks, beat: Callable[[int], None]
    ):
        """Prepare the folder, without what saves that died have left in it.

        Args:
            beat: told the step now and then while this waits and bytes arrive on disk.

        Raises:
            RunError: the folder cannot be written (exit 40).
        """
        self._folder, self._config, self._journal, self._ranks, self._beat = folder, config, journal, ranks, beat
        self._memory = Memory()
        self._flight: _Flight | None = None
        self._n_failed, self._last_problem = 0, ""
        problem = self._on_first(self._clear)
        if problem is not None:
            raise RunError(EXIT_STORAGE, f"run.dir: {problem}. Fix: make room or another run.dir")

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, _type: object, error: BaseException | None, _traceback: object) -> None:
        """What is on its way is still finished, unless the other ranks are lost."""
        if error is None:
            self.finish()
        elif isinstance(error, RunError) or self._ranks.world_size == 1:
            with suppress(RunError):  # the first error is the one to tell
                self.finish()

    def begin(self, step: int, pieces: Iterable[Piece], record: dict[str, Any]) -> None:
        """Start the checkpoint of `step`; one that is still on its way is awaited first.

        Args:
            step: optimizer steps done.
            pieces: this rank's slices; copied before this returns, or written with `checkpoint.background=false`.
            record: JSON values for the manifest.

        Raises:
            RunError: `checkpoint.max_failures` saves in a row have failed (exit 40).
        """
        if self._flight is not None:
            before, since = self._flight.step, time.monotonic()
            self.finish()
            self._journal.event("save.waited", step=step, before=before, seconds=time.monotonic() - since)
        started = time.monotonic()
        files = list(plan(pieces, self._ranks.rank))
        n_own = torch.tensor(sum(file.n_bytes for file in files), dtype=torch.float64)
        flight = _Flight(step, files, record, int(self._ranks.sum_all(n_own)), started)
        problem = self._on_first(lambda: self._make_room(flight))
        if problem is not None:
            self._failed(flight, [problem])
            return
        in_place = ((file, file.views()) for file in files)
        images = self._memory.copy(files) if self._config.background else in_place
        flight.pause_s = time.monotonic() - started
        flight.thread = threading.Thread(
            target=self._write, args=(flight, images), name="checkpoint writer", daemon=True
        )
        self._flight = flight
        flight.thread.start()
        if not self._config.background:
            self.finish()

    def poll(self) -> None:
        """Tell the journal if a save has come to its end; costs one small sum over the ranks while there is one.

        Raises:
            RunError: as for `begin`.
        """
        self._look()

    def finish(self) -> None:
        """Wait until the save on its way is published or has failed.

        Raises:
            RunError: as for `begin`.
        """
        progress = -1
        while self._flight is not None:
            self._flight.ended.wait(_PATIENCE_S)
            n_written = self._look()
            if n_written is not None and n_written != progress:
                progress = n_written
                self._beat(self._flight.step)

    def finish_last(self) -> None:
        """Wait for the last save of a run, which must not fail.

        Raises:
            RunError: it did (exit 40).
        """
        self.finish()
        if self._n_failed:
            raise self._given_up()

    def _look(self) -> int | None:
        """How many files all ranks have written, or None once the save has come to its end."""
        flight = self._flight
        if flight is None:
            return None
        is_busy, is_lost = not flight.ended.is_set(), flight.problem is not None
        counts = torch.tensor([is_busy, is_lost, len(flight.written)], dtype=torch.float64)
        n_busy, n_lost, n_written = self._ranks.sum_all(counts).tolist()
        if flight.bug is not None:
            self._flight = None
            raise flight.bug
        if n_lost:
            flight.called_off.set()
        if n_busy:
            return int(n_written)
        flight.thread.join()  # its last steps free tensors, which must not happen while the interpreter ends
        self._flight = None
        if n_lost:
            self._failed(flight, [problem for problem in self._ranks.collect(flight.problem) if problem is not None])
        else:
            self._succeeded(flight)
        return None

    def _succeeded(self, flight: _Flight) -> None:
        self._n_failed = 0
        path = directory_of(self._folder, flight.step)
        facts = {"path": str(path), "seconds": time.monotonic() - flight.started, "pause_s": flight.pause_s}
        facts |= {"bytes": flight.n_bytes, "pruned": flight.pruned, "refusals": flight.refusals}
        self._journal.event("save", step=flight.step, **facts)

    def _failed(self, flight: _Flight, problems: list[str]) -> None:
        self._n_failed += 1
        free = self._ranks.share(shutil.disk_usage(self._folder).free if self._folder.exists() else 0)
        self._last_problem = f"step {flight.step} ({problems[0]}), {flight.n_bytes} bytes needed, {free} free"
        self._journal.event("save.failed", step=flight.step, problems=problems, need=flight.n_bytes, free=free)
        if self._ranks.rank == 0:
            with suppress(OSError):
                disk.remove(temporary_of(self._folder, flight.step))
        if self._n_failed >= self._config.max_failures:
            raise self._given_up()

    def _given_up(self) -> RunError:
        fix = "Fix: make room or mend the storage, then give the same command again"
        return RunError(EXIT_STORAGE, f"checkpoint: cannot save {self._last_problem}. {fix}")

    def _on_first(self, action: Callable[[], None]) -> str | None:
        """Do something on rank 0; what went wrong there is told everywhere."""
        problem = None
        if self._ranks.rank == 0:
            try:
                action()
            except OSError as error:
                problem = _words(error, self._folder)
        return self._ranks.share(problem)

    def _clear(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.glob(f"{TEMPORARY}*"):
            disk.remove(path)
        disk.sync_folder(self._folder)
        disk.sync_folder(self._folder.parent)
        with suppress(PermissionError):  # the place of the run folder need not be ours to read
            disk.sync_folder(self._folder.absolute().parent.parent)

    def _make_room(self, flight: _Flight) -> None:
        temporary = temporary_of(self._folder, flight.step)
        if shutil.disk_usage(self._folder).free < flight.n_bytes * ROOM:
            raise OSError(0, "no room for it", str(self._folder))
        disk.make_folder(temporary)

    def _write(self, flight: _Flight, images: Iterable[Image]) -> None:
        """The thread: this rank's files and its note; on rank 0 the rest."""
        temporary = temporary_of(self._folder, flight.step)
        try:
            part = write_part(temporary, images, lambda folder, image: self._write_file(flight, folder, image))
            note = temporary / _note(self._ranks.rank)
            self._patiently(flight, lambda: _leave(note, part))
            if self._ranks.rank == 0:
                self._commit(flight, temporary)
        except OSError as error:
            flight.problem = _words(error, temporary)
        except Exception as error:
            flight.bug = error
            flight.problem = repr(error)
        finally:
            flight.ended.set()

    def _write_file(self, flight: _Flight, folder: Path, image: Image) -> Written:
        written = self._patiently(flight, lambda: write_image(folder, image))
        flight.written.append(image[0].name)
        return written

    def _commit(self, flight: _Flight, temporary: Path) -> None:
        notes = [temporary / _note(rank) for rank in range(self._ranks.world_size)]
        while not all(note.exists() for note in notes):
            if flight.called_off.wait(_PATIENCE_S):
                raise OSError(0, "called off, as another rank failed", str(temporary))
        part = merge([json.loads(note.read_bytes()) for note in notes])
        for note in notes:
            self._patiently(flight, lambda note=note: disk.remove(note))
        target = directory_of(self._folder, flight.step)
        self._patiently(flight, lambda: publish(temporary, target, flight.step, flight.record, part))
        try:
            flight.pruned = [path.name for path in prune(self._folder, self._config.keep, self._config.keep_every)]
        except OSError as error:
            flight.refusals.append(_words(error, self._folder))  # the checkpoint itself is safe

    def _patiently(self, flight: _Flight, action: Callable[[], Result]) -> Result:
        """Do something on disk, again after a while when the file system refuses.

        Raises:
            OSError: it refused every time, or the save was called off.
        """
        for wait_s in RETRY_S:
            if flight.called_off.is_set():
                raise OSError(0, "called off, as another rank failed", str(self._folder))
            try:
                return action()
            except OSError as error:
                flight.refusals.append(_words(error, self._folder))
                if flight.called_off.wait(wait_s):
                    raise
        return action()


def prune(folder: Path, keep: int, keep_every: int | None = None) -> list[Path]:
    """Delete all but the newest `keep` checkpoints and those of every `keep_every`-th step; returns what went.

    Raises:
        OSError: the file system refused.
    """
    old = [path for path in published(folder)[keep:] if keep_every is None or _step(path) % keep_every]
    for path in old:
        # First out of sight: half a checkpoint under its own name would look like a damaged one.
        gone = path.with_name(f"{TEMPORARY}{path.name}-old")
        disk.rename(path, gone)
        disk.remove(gone)
    return old


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _note(rank: int) -> str:
    return f"rank{rank:05d}.json"


def _leave(note: Path, part: dict[str, Any]) -> None:
    draft = note.with_suffix(".draft")
    disk.write_file(draft, [json.dumps(part).encode()])
    disk.rename(draft, note)


def _words(error: OSError, place: Path) -> str:
    return f"{error.filename or place}: {error.strerror or error}"
