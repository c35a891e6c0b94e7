"""Training jobs to kill: ranks forked from a server that has imported everything, and named points to die at."""

import itertools
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tests.integration.conftest import SMALL, final_state
from transmamba import checkpoint, disk, loop, metrics, saving, session
from transmamba.ledger import read_ledger
from transmamba.metrics import read_metrics

PRELOAD = ["megatron.core.pipeline_parallel.schedules", "deepspeed", "transmamba.session", "tests.integration.kills"]
POINTS = [
    *("save.begin", "save.folder", "save.shard.first", "save.shard.mid", "save.shard.last", "save.note"),
    *("save.manifest.begun", "save.manifest.mid", "save.manifest.synced", "save.rename.before", "save.rename.after"),
    *("save.published", "latest.before", "latest.after", "retain.before", "retain.hidden", "retain.mid", "save.ended"),
    *("load.mid", "load.after", "step.before", "step.forward", "step.updated", "step.logged"),
]


class Job:
    """A rank per process that trains the small model in `folder`; `die_at` is a point and when it is reached."""

    def __init__(
        self,
        corpus: Path,
        folder: Path,
        overrides: list[str],
        n_ranks: int = 1,
        die_at: tuple[str, int] | None = None,
    ):
        given = {text.split("=")[0] for text in overrides}
        always = [*SMALL, f"data.path={corpus}", f"run.dir={folder}", "data.ledger=true", "sample.prompt=''"]
        arguments = [text for text in always if text.split("=")[0] not in given] + overrides
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.log, port = folder.with_suffix(".log"), _free_port()
        self.marker = folder.with_suffix(".died")
        self.marker.unlink(missing_ok=True)
        places = [(rank, n_ranks, port) for rank in range(n_ranks)]
        self.ranks = [
            context.Process(target=_train, args=(place, arguments, self.log, die_at, self.marker)) for place in places
        ]
        for process in self.ranks:
            process.start()

    def wait(self, seconds: float) -> bool:
        """Wait until all ranks have ended, at most so long; returns whether they have."""
        until = time.monotonic() + seconds
        while alive := [process.sentinel for process in self.ranks if process.is_alive()]:
            left = until - time.monotonic()
            if left <= 0:
                return False
            wait(alive, left)
        return True

    def kill(self, rank: int) -> None:
        """Kill one rank; the others are treated as launchers do it: asked to end, and killed when they do not."""
        self.ranks[rank].kill()
        for other in self.ranks:
            other.terminate()
        if not self.wait(15):
            for other in self.ranks:
                other.kill()
        assert self.wait(30), self.said()

    @property
    def codes(self) -> list[int | None]:
        """Of all ranks; -9 is killed."""
        return [process.exitcode for process in self.ranks]

    def said(self) -> str:
        """What came to the screen of all jobs in this folder."""
        return f"{self.codes}\n{self.log.read_text()}"


def assert_same_run(folder: Path, reference: Path) -> None:
    """Weights, masters, moments, everything logged of a step, and the windows it read are those of the reference."""
    ours, theirs = final_state(folder), final_state(reference)
    assert ours.step == theirs.step
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert [key for key, values in theirs.tensors.items() if not values.equal(ours.tensors[key])] == []
    for key in ("schedule", "tokens_seen", "data", "random"):
        assert ours.manifest[key] == theirs.manifest[key], key
    for name in ("step", "loss", "grad_norm", "lr", "tokens", "past_transpoint"):
        assert [r[name] for r in read_metrics(folder)] == [r[name] for r in read_metrics(reference)], name
    wanted = {(line["step"], line["rank"]): line for line in read_ledger(reference)}
    read = list(read_ledger(folder))
    assert {(line["step"], line["rank"]) for line in read} == wanted.keys()
    assert all(line == wanted[line["step"], line["rank"]] for line in read)


def _train(
    place: tuple[int, int, int], arguments: list[str], log: Path, die_at: tuple[str, int] | None, marker: Path
) -> None:
    rank, world_size, port = place
    local = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
    if world_size > 1:
        os.environ.update({name: str(value) for name, value in local.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with log.open("ab") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    if die_at is not None:
        _plant(*die_at, marker)
    from transmamba import train

    sys.exit(train.main(arguments))


class _Trap:
    """Kills this process when it comes to a point for the `nth` time, and says so in `marker`."""

    def __init__(self, point: str, nth: int, marker: Path):
        self._point, self._nth, self._marker, self._count = point, nth, marker, itertools.count(1)

    def here(self) -> None:
        """The process is at the point."""
        if next(self._count) == self._nth:
            self._marker.write_text(self._point)
            os.kill(os.getpid(), signal.SIGKILL)

    def before(self, place: Any, name: str, is_it: Callable[..., bool] = lambda *args: True) -> None:
        """Put the point before the calls of a function whose arguments fit."""
        whole = getattr(place, name)
        setattr(place, name, lambda *args, **kwargs: (is_it(*args) and self.here(), whole(*args, **kwargs))[1])

    def after(self, place: Any, name: str, is_it: Callable[..., bool] = lambda *args: True) -> None:
        """Put the point after them."""
        whole = getattr(place, name)
        setattr(place, name, lambda *args, **kwargs: (whole(*args, **kwargs), is_it(*args) and self.here())[0])

    def amid(self, name: str) -> None:
        """Put the point into the writing of files of this name."""

        def torn(descriptor: int, chunk: memoryview) -> None:
            if os.readlink(f"/proc/self/fd/{descriptor}").endswith(name):
                whole(descriptor, chunk[: len(chunk) // 2])
                self.here()
                chunk = chunk[len(chunk) // 2 :]
            whole(descriptor, chunk)

        whole, disk.write_chunk = disk.write_chunk, torn


def _named(suffix: str) -> Callable[..., bool]:
    return lambda *paths: str(paths[-1] if isinstance(paths[-1], Path) else paths[0]).endswith(suffix)


def _is_publishing(old: Path, new: Path) -> bool:
    return old.name.startswith(".tmp-step") and new.name.startswith("step-")


def _is_half_gone(path: Path) -> bool:
    if path.name.endswith("-old"):
        next(path.iterdir()).unlink()
    return path.name.endswith("-old")


def _plant(point: str, nth: int, marker: Path) -> None:
    trap = _Trap(point, nth, marker)
    plant: dict[str, Callable[[], None]] = {
        "save.begin": lambda: trap.before(saving.Saver, "begin"),
        "save.folder": lambda: trap.after(disk, "make_folder"),
        "save.shard.first": lambda: trap.before(disk, "write_file", _named(".safetensors")),
        "save.shard.mid": lambda: trap.amid(".safetensors"),
        "save.shard.last": lambda: trap.after(disk, "write_file", _named(".safetensors")),
        "save.note": lambda: trap.before(disk, "rename", _named(".json")),
        "save.manifest.begun": lambda: trap.before(disk, "write_file", _named("manifest.json")),
        "save.manifest.mid": lambda: trap.amid("manifest.json"),
        "save.manifest.synced": lambda: trap.after(disk, "write_file", _named("manifest.json")),
        "save.rename.before": lambda: trap.before(disk, "rename", _is_publishing),
        "save.rename.after": lambda: trap.after(disk, "rename", _is_publishing),
        "save.published": lambda: trap.after(saving, "publish"),
        "latest.before": lambda: trap.before(disk, "rename", _named("/LATEST")),
        "latest.after": lambda: trap.after(disk, "rename", _named("/LATEST")),
        "retain.before": lambda: trap.before(disk, "rename", _named("-old")),
        "retain.hidden": lambda: trap.before(disk, "remove", _named("-old")),
        "retain.mid": lambda: trap.before(disk, "remove", _is_half_gone),
        "save.ended": lambda: trap.before(saving.Saver, "_succeeded"),
        "load.mid": lambda: trap.before(checkpoint.Checkpoint, "_read"),
        "load.after": lambda: trap.before(session, "train_steps"),
        "step.before": lambda: trap.before(loop, "train_step"),
        "step.forward": lambda: trap.after(loop, "run_schedule"),
        "step.updated": lambda: trap.after(loop, "train_step"),
        "step.logged": lambda: trap.after(metrics.Journal, "metrics"),
    }
    plant[point]()


def run_whole(corpus: Path, folder: Path, overrides: list[str], n_ranks: int = 1) -> Path:
    """The run that nothing happens to."""
    job = Job(corpus, folder, overrides, n_ranks)
    assert job.wait(240) and job.codes == [0] * n_ranks, job.said()
    return folder


def kill_again_and_again(
    corpus: Path, folder: Path, overrides: list[str], n_ranks: int, draw: random.Random, most: int
) -> int:
    """Start the run until it is done, killing a random rank at random times, at most so often; returns how often."""
    n_kills = n_idle = 0
    while True:
        job = Job(corpus, folder, overrides, n_ranks)
        before = len(read_metrics(folder))
        patience_s = 240.0
        if n_kills < most:
            # Most die while they train or save, some while they start. From the third life without a step on, wait.
            patience_s = draw.choice((draw.uniform(0.1, 2.0), draw.uniform(1.5, 4.0))) + 2.0 * n_idle
        if job.wait(patience_s):
            assert job.codes == [0] * n_ranks, job.said()
            return n_kills
        job.kill(draw.randrange(n_ranks))
        n_kills += 1
        if _is_done(folder):  # it had said its last word
            return n_kills
        n_idle = 0 if len(read_metrics(folder)) > before else n_idle + 1


def _is_done(folder: Path) -> bool:
    try:
        return json.loads((folder / "exit.json").read_text())["code"] == 0
    except (OSError, ValueError):
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
