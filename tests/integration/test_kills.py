"""Killed at any moment, a run goes on to the bits of the run that nothing happened to.

Everything counts: weights, masters, moments, every logged loss, and which windows each step read. A few cases run every
day, other ones each day; all of them in the long suite.
"""

import datetime
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.kills import POINTS, Job, assert_same_run, kill_again_and_again, run_whole

STEPS = ["train.steps=40", "checkpoint.every=3", "validation.every=0", "watchdog.limit_s=60"]
LAYOUTS = {
    "dp2 zero1": ["zero.stage=1", "train.micro_batch=2"],
    "dp2 zero2": ["zero.stage=2", "train.micro_batch=2"],
    "dp2 zero3": ["zero.stage=3", "train.micro_batch=2"],
    "tp2": ["parallel.tp=2"],
    "pp2": ["parallel.pp=2"],
}
TODAY = datetime.date.today().toordinal()
Reference = Callable[[str], Path]


def some(cases: list[Any], n: int) -> list[Any]:
    """`n` cases for every day, others tomorrow, and the rest marked as long."""
    chosen = {(TODAY * n + i) % len(cases) for i in range(n)}
    return [pytest.param(case, marks=() if i in chosen else pytest.mark.long) for i, case in enumerate(cases)]


def overrides(layout: str) -> list[str]:
    return STEPS + (["zero.stage=1"] if layout == "one" else LAYOUTS[layout])


def n_ranks(layout: str) -> int:
    return 1 if layout == "one" else 2


@pytest.fixture(scope="module")
def reference(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The uninterrupted run of a layout, trained once."""
    done: dict[str, Path] = {}

    def of(layout: str) -> Path:
        if layout not in done:
            folder = tmp_path_factory.mktemp("whole") / "run"
            done[layout] = run_whole(corpus, folder, overrides(layout), n_ranks(layout))
        return done[layout]

    return of


def die_and_go_on(point: str, layout: str, corpus: Path, folder: Path) -> None:
    """Die at a point, and start the same command again."""
    nth = {"load.mid": 7, "load.after": 1}.get(point, 4)
    first = [("step.logged", 8)] if point.startswith("load.") else []
    for die_at in [*first, (point, nth)]:
        job = Job(corpus, folder, overrides(layout), n_ranks(layout), die_at)
        assert job.wait(120), job.said()
        assert -9 in job.codes and job.marker.read_text() == die_at[0], job.said()
    job = Job(corpus, folder, overrides(layout), n_ranks(layout))
    assert job.wait(240) and job.codes == [0] * n_ranks(layout), job.said()


@pytest.mark.parametrize("point", some(POINTS, 3))
def test_dead_at_a_named_point_it_goes_on(point: str, corpus: Path, reference: Reference, tmp_path: Path) -> None:
    die_and_go_on(point, "one", corpus, tmp_path / "run")
    assert_same_run(tmp_path / "run", reference("one"))
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp*"))


@pytest.mark.long
@pytest.mark.parametrize("point", [point for point in POINTS if not point.startswith("step.")])
def test_one_of_two_ranks_dead_at_a_named_point(point: str, corpus: Path, reference: Reference, tmp_path: Path) -> None:
    layout = list(LAYOUTS)[POINTS.index(point) % len(LAYOUTS)]
    die_and_go_on(point, layout, corpus, tmp_path / "run")
    assert_same_run(tmp_path / "run", reference(layout))


def storm(layout: str, n_kills: int, corpus: Path, whole: Path, folder: Path, seed: int) -> None:
    """Chains of restarts until so many kills; every chain ends with the bits of the reference."""
    draw, done, chains = random.Random(seed), 0, 0
    while done < n_kills:
        done += kill_again_and_again(corpus, folder, overrides(layout), n_ranks(layout), draw, min(12, n_kills - done))
        chains += 1
        assert_same_run(folder, whole)
        shutil.rmtree(folder)
    print(f"{layout}: {done} kills in {chains} runs")


def test_killed_a_few_times_at_random(corpus: Path, reference: Reference, tmp_path: Path) -> None:
    storm("one", 4, corpus, reference("one"), tmp_path / "run", seed=TODAY)


@pytest.mark.parametrize("layout", some(list(LAYOUTS), 1))
def test_two_ranks_killed_at_random(layout: str, corpus: Path, reference: Reference, tmp_path: Path) -> None:
    storm(layout, 2, corpus, reference(layout), tmp_path / "run", seed=TODAY)


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("part", range(3))
def test_one_process_killed_three_hundred_times(part: int, corpus: Path, reference: Reference, tmp_path: Path) -> None:
    storm("one", 100, corpus, reference("one"), tmp_path / "run", seed=part)


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_killed_sixty_times(layout: str, corpus: Path, reference: Reference, tmp_path: Path) -> None:
    storm(layout, 60 // len(LAYOUTS), corpus, reference(layout), tmp_path / "run", seed=1)
