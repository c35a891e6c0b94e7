"""Workers do every task once, and what goes wrong in one of them is raised here."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.workers import Advance, WorkerDied, map_in_order, start_workers


def touch(number: int, folder: Path, advance: Advance) -> None:
    with (folder / f"{number}").open("x") as file:
        file.write(f"{os.environ['RAYON_NUM_THREADS']} {os.environ['TOKENIZERS_PARALLELISM']} {os.getpid()}")
    advance(10, number)


def fail(number: int, folder: Path, advance: Advance) -> None:
    if number == 2:
        raise DataError("x.txt", "is bad", "mend it")
    for _ in range(600):
        time.sleep(0.05)
        advance(1, 0)
    (folder / f"{number}").touch()


def die(number: int, folder: Path, advance: Advance) -> None:
    advance(1, 0)
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1)


def square(number: int) -> tuple[int, int]:
    if number < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return number**2, os.getpid()


def add_up(totals: list[int]) -> Advance:
    def advance(n_bytes: int, n_tokens: int) -> None:
        totals[0] += n_bytes
        totals[1] += n_tokens

    return advance


def test_every_task_is_done_once_by_other_processes(tmp_path: Path) -> None:
    totals = [0, 0]
    with start_workers(2, threads=3) as workers:
        workers.run(touch, [(i, tmp_path) for i in range(20)], add_up(totals))
        # They stay for more.
        workers.run(touch, [(i, tmp_path) for i in range(20, 23)], add_up(totals))
    said = [(tmp_path / f"{i}").read_text().split() for i in range(23)]
    assert {tuple(words[:2]) for words in said} == {("3", "true")}
    assert str(os.getpid()) not in {words[2] for words in said}
    assert totals == [230, sum(range(23))]


def test_a_failed_task_stops_the_others_and_is_raised_as_it_was(tmp_path: Path) -> None:
    started_at = time.monotonic()
    with pytest.raises(DataError, match=r"x.txt: is bad; mend it"), start_workers(3, threads=1) as workers:
        workers.run(fail, [(i, tmp_path) for i in range(8)], add_up([0, 0]))
    assert time.monotonic() - started_at < 25
    assert not list(tmp_path.iterdir())


def test_a_killed_worker_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(WorkerDied, match=r"a worker process died; parts \d"), start_workers(2, threads=1) as workers:
        workers.run(die, [(i, tmp_path) for i in range(4)], add_up([0, 0]))


def test_without_workers_the_tasks_are_done_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYON_NUM_THREADS", "5")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    totals = [0, 0]
    with start_workers(0, threads=1) as workers:
        workers.run(touch, [(i, tmp_path) for i in range(3)], add_up(totals))
    assert (tmp_path / "2").read_text() == f"5 true {os.getpid()}"
    assert totals == [30, 3]


@pytest.mark.parametrize("n_workers", [1, 3])
def test_answers_come_in_order_and_what_is_not_asked_for_is_left(n_workers: int) -> None:
    answers = map_in_order(square, range(1000), n_workers, chunk=7)
    found = [next(answers) for _ in range(100)]
    answers.close()
    assert [answer for answer, _ in found] == [number**2 for number in range(100)]
    assert (os.getpid() in {process for _, process in found}) == (n_workers == 1)


def test_a_worker_that_is_killed_ends_the_answers() -> None:
    with pytest.raises(WorkerDied, match="a worker process died"):
        list(map_in_order(square, [*range(50), -1, *range(50)], 2, chunk=4))
