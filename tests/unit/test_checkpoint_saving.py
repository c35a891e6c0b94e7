"""Saving while training goes on: what is saved is what was there, one at a time, and a failure harms nothing older."""

import itertools
import json
import shutil
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from transmamba import checkpoint, disk, saving, staging
from transmamba.checkpoint import Alone, Ranks
from transmamba.config import CheckpointConfig
from transmamba.errors import EXIT_STORAGE, RunError
from transmamba.metrics import Journal
from transmamba.resume import put_aside
from transmamba.saving import Saver, prune
from transmamba.slices import Piece

N = 1000


def state(rank: int = 0, n_ranks: int = 1) -> tuple[Tensor, list[Piece]]:
    """Weights that training goes on to change, and this rank's slice of them."""
    weights = torch.arange(float(N))
    part = N // n_ranks
    return weights, [Piece("w", "master", (N,), rank * part, weights[rank * part : (rank + 1) * part])]


def saver(folder: Path, ranks: Ranks | None = None, **options: Any) -> Saver:
    ranks = ranks or Alone()
    folder.mkdir(exist_ok=True)
    journal = Journal(folder, 0, is_writer=ranks.rank == 0)
    return Saver(folder / "checkpoints", CheckpointConfig(**options), journal, ranks, lambda step: None)


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def steps(folder: Path) -> list[int]:
    """Of the checkpoints that verify, newest first; each must hold the weights of its step."""
    found = []
    for path in checkpoint.published(folder / "checkpoints"):
        loaded = checkpoint.read(path)
        assert torch.equal(loaded.tensors["w", "master"], torch.arange(float(N)) + loaded.manifest["added"])
        found.append(loaded.step)
    return found


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "RETRY_S", (0.0, 0.0, 0.0))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Closed, it holds up every file that is written."""
    opened, whole = threading.Event(), disk.write_file
    opened.set()
    monkeypatch.setattr(disk, "write_file", lambda path, parts: opened.wait(20) and whole(path, parts))
    yield opened
    opened.set()


def refuse(patch: pytest.MonkeyPatch, name: str, times: float = float("inf"), at: str = "write_file") -> list[str]:
    """Have the disk refuse paths with `name` in them so many times; returns what was refused."""
    whole, refused = getattr(disk, at), []

    def full(path: Path, *rest: Any) -> None:
        if name in str(path) and len(refused) < times:
            refused.append(str(path))
            raise OSError(28, "No space left on device", str(path))
        whole(path, *rest)

    patch.setattr(disk, at, full)
    return refused


def test_training_goes_on_while_a_copy_is_written(tmp_path: Path, gate: threading.Event) -> None:
    ours, (weights, pieces) = saver(tmp_path), state()
    gate.clear()
    ours.begin(1, pieces, {"added": 0})
    weights += 1
    ours.poll()
    assert steps(tmp_path) == [] and not events(tmp_path)
    gate.set()
    ours.finish()
    assert steps(tmp_path) == [1]
    (event,) = events(tmp_path)
    assert (event["event"], event["step"], event["refusals"]) == ("save", 1, []) and event["bytes"] > 4 * N
    assert 0 < event["pause_s"] <= event["seconds"]


def test_without_a_background_it_is_there_when_begin_returns(tmp_path: Path) -> None:
    ours, (weights, pieces) = saver(tmp_path, background=False), state()
    for step in range(1, 4):
        ours.begin(step, pieces, {"added": step - 1})
        assert steps(tmp_path)[0] == step
        weights += 1


def test_the_next_save_waits_and_says_so(tmp_path: Path, gate: threading.Event) -> None:
    ours, (weights, pieces) = saver(tmp_path), state()
    gate.clear()
    ours.begin(1, pieces, {"added": 0})
    weights += 1
    threading.Timer(0.2, gate.set).start()
    ours.begin(2, pieces, {"added": 1})
    weights += 1
    ours.finish_last()
    assert steps(tmp_path) == [2, 1]
    first, waited, second = events(tmp_path)
    assert (first["step"], second["step"]) == (1, 2)
    assert (waited["event"], waited["step"], waited["before"]) == ("save.waited", 2, 1) and waited["seconds"] > 0.1


@pytest.mark.parametrize("name", ["rank00000-00000.safetensors", "rank00000.draft", "manifest.json"])
def test_a_write_that_was_refused_is_tried_again(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = refuse(monkeypatch, name, times=2)
    ours = saver(tmp_path)
    ours.begin(1, state()[1], {"added": 0})
    ours.finish_last()
    assert steps(tmp_path) == [1] and len(refused) == 2
    (event,) = events(tmp_path)
    assert [name in text and "No space" in text for text in event["refusals"]] == [True, True]


def test_a_hint_that_cannot_be_written_fails_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = refuse(monkeypatch, "LATEST")
    ours = saver(tmp_path)
    ours.begin(1, state()[1], {"added": 0})
    ours.finish_last()
    assert steps(tmp_path) == [1] and len(refused) == 1


@pytest.mark.parametrize("at", ["write_file", "rename", "sync_folder"])
def test_a_save_that_fails_harms_nothing_and_ends_the_run_at_the_third(
    at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, (_, pieces) = saver(tmp_path), state()
    ours.begin(1, pieces, {"added": 0})
    ours.finish()
    with monkeypatch.context() as patch:
        refuse(patch, ".tmp-step", at=at)
        for step in (2, 3):
            ours.begin(step, pieces, {"added": 0})
            ours.finish()
    ours.begin(4, pieces, {"added": 0})  # it begins to count anew
    ours.finish_last()
    assert steps(tmp_path) == [4, 1] and not list((tmp_path / "checkpoints").glob(".tmp*"))
    refuse(monkeypatch, ".tmp-step", at=at)
    for step in (5, 6):
        ours.begin(step, pieces, {"added": 0})
        ours.finish()
    with pytest.raises(RunError, match="cannot save step 7") as found:
        ours.begin(7, pieces, {"added": 0})
        ours.finish()
    assert found.value.code == EXIT_STORAGE and steps(tmp_path) == [4, 1]
    for word in (str(tmp_path), "bytes needed", "free", "Fix: "):
        assert word in str(found.value)
    assert [event["event"] for event in events(tmp_path)] == [
        "save",
        *["save.failed"] * 2,
        "save",
        *["save.failed"] * 3,
    ]


def test_the_last_save_of_a_run_must_not_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = saver(tmp_path)
    refuse(monkeypatch, "manifest.json")
    ours.begin(1, state()[1], {})
    with pytest.raises(RunError, match=r"manifest.json: No space left on device"):
        ours.finish_last()


def test_a_folder_that_cannot_be_made_ends_the_run_at_its_start(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(RunError, match=r"run.dir: .*checkpoints: File exists") as found:
        saver(tmp_path)
    assert found.value.code == EXIT_STORAGE


def test_whoever_waits_beats_as_files_arrive_and_not_otherwise(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "FILE_BYTES", 400)
    beats: list[int] = []
    journal = Journal(tmp_path, 0)
    ours = Saver(tmp_path / "checkpoints", CheckpointConfig(), journal, Alone(), beats.append)
    pieces = [Piece(f"w{i}", "master", (100,), 0, torch.zeros(100)) for i in range(5)]
    gate.clear()
    ours.begin(7, pieces, {})
    waiting = threading.Thread(target=ours.finish)
    waiting.start()
    waiting.join(0.5)
    assert beats == [7]  # once, and then nothing arrives
    whole = disk.write_file
    monkeypatch.setattr(disk, "write_file", lambda path, parts: time.sleep(0.1) or whole(path, parts))
    gate.set()
    waiting.join(20)
    assert not waiting.is_alive() and 1 < len(beats) <= 6 and set(beats) == {7}


def test_without_room_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = saver(tmp_path)
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(4 * N))
    monkeypatch.setattr(saving.Memory, "copy", None)  # nothing is copied either
    ours.begin(1, state()[1], {})
    (event,) = events(tmp_path)
    assert event["event"] == "save.failed" and event["free"] == 4 * N < event["need"] and "no room" in str(event)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_the_newest_and_every_so_many_are_kept_and_leftovers_go_at_the_start(tmp_path: Path) -> None:
    for name in (".tmp-step-00000005", ".tmp-step-00000003-old", ".tmp-LATEST"):
        (tmp_path / "checkpoints" / name / "rank00000-00000.safetensors").mkdir(parents=True)
    ours, (_, pieces) = saver(tmp_path, keep=2, keep_every=4), state()
    assert not list((tmp_path / "checkpoints").iterdir())
    for step in range(1, 12):
        ours.begin(step, pieces, {"added": 0})
    ours.finish_last()
    assert steps(tmp_path) == [11, 10, 8, 4]
    assert {path.name for path in prune(tmp_path / "checkpoints", 2)} == {"step-00000004", "step-00000008"}


def test_a_prune_that_is_refused_does_not_undo_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, (_, pieces) = saver(tmp_path), state()
    refuse(monkeypatch, "-old", at="remove")
    for step in range(1, 4):
        ours.begin(step, pieces, {"added": 0})
    ours.finish_last()
    assert steps(tmp_path) == [3, 2]
    assert "-old: No space left" in str(events(tmp_path)[-1]["refusals"])


@pytest.mark.parametrize("error", [RunError(20, "not finite"), ValueError("a bug")])
def test_an_error_in_training_does_not_take_the_save_on_its_way_with_it(
    error: Exception, tmp_path: Path, gate: threading.Event
) -> None:
    gate.clear()
    with pytest.raises(type(error)), saver(tmp_path) as ours:
        ours.begin(1, state()[1], {"added": 0})
        threading.Timer(0.1, gate.set).start()
        raise error
    assert steps(tmp_path) == [1] and events(tmp_path)[-1]["event"] == "save"


def test_a_bug_in_the_thread_is_told_by_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = saver(tmp_path)
    monkeypatch.setattr(saving, "publish", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError), ours:
        ours.begin(1, state()[1], {"added": 0})
        ours.finish()


class ThreadRanks(Alone):
    """Ranks that are threads of one process; each exchange is one meeting of all of them."""

    def __init__(self, rank: int, world_size: int, slots: list[Any], meeting: threading.Barrier):
        self.rank, self.world_size = rank, world_size
        self._slots, self._meeting = slots, meeting

    def collect(self, value: Any) -> list[Any]:
        self._slots[self.rank] = value
        self._meeting.wait(20)
        found = list(self._slots)
        self._meeting.wait(20)
        return found

    def share(self, value: Any) -> Any:
        return self.collect(value)[0]

    def sum_all(self, values: Tensor) -> Tensor:
        return torch.stack(self.collect(values)).sum(0)


def on_ranks(world_size: int, job: Callable[[Ranks], Any]) -> list[Any]:
    slots: list[Any] = [None] * world_size
    meeting = threading.Barrier(world_size)
    with ThreadPoolExecutor(world_size) as pool:
        jobs = [pool.submit(job, ThreadRanks(rank, world_size, slots, meeting)) for rank in range(world_size)]
        return [job.result(60) for job in jobs]


def train(folder: Path, ranks: Ranks, n_steps: int, every: int) -> list[int]:
    """Steps that add 1 and look for the end of a save; returns at which steps this rank learned of one."""
    weights, pieces = state(ranks.rank, ranks.world_size)
    ours, ends = saver(folder, ranks), []
    for step in range(1, n_steps + 1):
        weights += 1
        was_busy = ours._flight is not None
        ours.poll()
        if was_busy and ours._flight is None:
            ends.append(step)
        if step % every == 0:
            ours.begin(step, pieces, {"added": step})
    ours.finish()
    return ends


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_save_together_and_learn_of_the_end_at_the_same_step(world_size: int, tmp_path: Path) -> None:
    ends = on_ranks(world_size, lambda ranks: train(tmp_path, ranks, n_steps=41, every=5))
    assert all(ends[0] == other for other in ends)
    assert steps(tmp_path) == [40, 35]
    assert sum(event["event"] == "save" for event in events(tmp_path)) == 8


@pytest.mark.parametrize(
    ("rank", "name"),
    [
        *itertools.product((0, 1, 3), ("-00000.safetensors", ".draft")),
        (None, "manifest.json"),
    ],
)
def test_a_rank_that_fails_calls_the_save_off_for_all_and_the_next_one_works(
    rank: int | None, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = name if rank is None else f"rank{rank:05d}{name}"
    refuse(monkeypatch, f".tmp-step-00000010/{where}")
    ends = on_ranks(4, lambda ranks: train(tmp_path, ranks, n_steps=21, every=5))
    assert all(ends[0] == other for other in ends)
    assert steps(tmp_path) == [20, 15]
    (failed,) = [event for event in events(tmp_path) if event["event"] == "save.failed"]
    assert failed["step"] == 10 and f"{where}: No space left" in str(failed["problems"])
    assert not list((tmp_path / "checkpoints").glob(".tmp*"))


def test_ranks_verify_together_and_fall_back_alike(tmp_path: Path) -> None:
    on_ranks(4, lambda ranks: train(tmp_path, ranks, n_steps=10, every=5))
    newest = checkpoint.directory_of(tmp_path / "checkpoints", 10)
    for file in sorted(newest.iterdir()):
        whole = file.read_bytes()
        file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        answers = on_ranks(4, lambda ranks: checkpoint.newest_valid(tmp_path / "checkpoints", ranks))
        for found, rejected in answers:
            assert found.step == 5 and rejected == answers[0][1] and file.name in rejected[newest]
        file.write_bytes(whole)
    assert [found.step for found, _ in on_ranks(4, lambda r: checkpoint.newest_valid(newest.parent, r))] == [10] * 4


def test_damaged_checkpoints_do_not_count_among_those_to_keep(tmp_path: Path) -> None:
    ours, (_, pieces) = saver(tmp_path, keep=2), state()
    for step in (1, 2, 3):
        ours.begin(step, pieces, {"added": 0})
    ours.finish_last()
    (tmp_path / "checkpoints" / "step-00000003" / "manifest.json").write_text("{")
    found, rejected = checkpoint.newest_valid(tmp_path / "checkpoints")
    assert found is not None and found.step == 2
    put_aside(rejected)
    ours.begin(4, pieces, {"added": 0})
    ours.finish_last()
    assert steps(tmp_path) == [4, 2]
