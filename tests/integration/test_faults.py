"""Faults in real jobs under torchrun: ranks that are killed, stopped, asked to stop or run into a bug.

Whatever happens to one of four ranks (tp 2 x pp 2), all of them end soon, and the run folder says who, where and why.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import final_state
from tests.integration.ranks import living, signal_rank
from tests.integration.test_watchdog import ROOT, how_slow, until
from transmamba.metrics import read_metrics

N_RANKS = 4
LIMIT_S = 8.0  # no setup or step of these jobs takes as long, even on a busy machine
SMALL = [
    *("model.n_layers=4", "model.d_model=32", "model.n_heads=4", "model.d_ff=64", "data.seq_len=64"),
    *("train.global_batch=8", "train.threads=1", "validation.every=0", "sample.prompt=''", "wandb.mode=disabled"),
    *("parallel.tp=2", "parallel.pp=2"),
]
# In place of `-m transmamba.train`: a bug that shows on rank 2 only, in the fifth step.
BUG = """
import os, sys
from transmamba import train
train.wait_politely()
from transmamba import loop
whole = loop.train_step
def train_step(run, step):
    if step == 4 and os.environ["RANK"] == "2":
        raise ValueError("a planted bug")
    return whole(run, step)
loop.train_step = train_step
sys.exit(train.main())
"""


class TorchrunJob:
    """Four ranks that train in `folder`, their watchdog and torchrun."""

    def __init__(self, folder: Path, corpus: Path, overrides: tuple[str, ...], program: tuple[str, ...]):
        self.folder = folder
        self.output = folder.with_suffix(".txt")
        command = [str(Path(sys.executable).parent / "torchrun"), "--standalone", f"--nproc-per-node={N_RANKS}"]
        command += [*program, *SMALL, f"data.path={corpus}", f"run.dir={folder}", *overrides]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with self.output.open("w") as output:
            self.torchrun = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)

    def wait_for_steps(self, n_steps: int) -> None:
        """Until this job, or a former one in the folder, has done so many."""
        deadline = time.monotonic() + 200
        while len(read_metrics(self.folder)) < n_steps:
            assert self.torchrun.poll() is None and time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def seconds_to_the_end(self, patience_s: float = 120.0) -> float:
        """From now until no process of the job is left."""
        started = time.monotonic()
        until(lambda: self.torchrun.poll() is not None and not living(self.folder), patience_s)
        return time.monotonic() - started

    def record(self, name: str) -> dict[str, Any]:
        """A JSON file of the run folder."""
        return json.loads((self.folder / name).read_text())

    def said(self) -> str:
        """What came to the screen."""
        return self.output.read_text()


Launch = Callable[..., TorchrunJob]
PROGRAM = ("-m", "transmamba.train")


@pytest.fixture
def launch(corpus: Path, tmp_path: Path) -> Iterator[Launch]:
    """Start a job in the run folder of this test; whatever a failed test leaves is killed."""
    jobs: list[TorchrunJob] = []

    def begin(*overrides: str, program: tuple[str, ...] = PROGRAM) -> TorchrunJob:
        jobs.append(TorchrunJob(tmp_path / "run", corpus, overrides, program))
        return jobs[-1]

    yield begin
    for job in jobs:
        for pid in living(job.folder):
            os.kill(pid, signal.SIGKILL)
        job.torchrun.wait()


def assert_verdict(job: TorchrunJob, code: int, rank: int) -> dict[str, Any]:
    """The verdict, of which every record of the job has to tell alike."""
    verdict, record = job.record("verdict.json"), job.record("exit.json")
    assert (verdict["code"], verdict["rank"]) == (code, rank), verdict
    assert (record["code"], record["cause"]) == (code, verdict["cause"])
    assert f"rank {rank} on " in record["cause"] and job.said().count(f"watchdog: {record['cause']}") == 1
    assert job.torchrun.returncode != 0
    assert not (job.folder / "lock.json").exists()
    return verdict


def kill_one(job: TorchrunJob, n_steps: int) -> None:
    """Kill a random rank after so many steps; the others must be gone within five seconds."""
    job.wait_for_steps(n_steps)
    victim, slow = random.Random().randrange(N_RANKS), how_slow()
    signal_rank(job.folder, victim, signal.SIGKILL)
    seconds = job.seconds_to_the_end()
    print(f"gone {seconds:.1f} s after the death of rank {victim} (machine {slow:.1f} times slower than idle)")
    assert seconds < 5 * slow, f"gone after {seconds:.1f} s, on a machine {slow:.1f} times slower than idle"
    verdict = assert_verdict(job, 31, victim)
    assert "without a word" in verdict["cause"] and isinstance(verdict["stacks"], list)


def test_a_killed_rank_takes_the_whole_job_with_it(launch: Launch) -> None:
    kill_one(launch("train.steps=10000"), 2)


@pytest.mark.long
@pytest.mark.timeout(900)  # two jobs, one after the other
def test_after_a_death_the_same_command_goes_on_to_the_end(launch: Launch) -> None:
    overrides = ("train.steps=20", "checkpoint.every=5")
    kill_one(launch(*overrides), 7)
    job = launch(*overrides)
    assert job.torchrun.wait(250) == 0, job.said()
    assert "continues step-" in job.said()
    assert [record["step"] for record in read_metrics(job.folder)] == list(range(1, 21))
    assert job.record("exit.json")["code"] == 0 and final_state(job.folder).step == 20
    until(lambda: not living(job.folder), 10)
    assert not (job.folder / "verdict.json").exists()


@pytest.mark.long
def test_a_stopped_rank_is_found_by_its_silence(launch: Launch) -> None:
    job = launch("train.steps=10000", f"watchdog.limit_s={LIMIT_S}")
    job.wait_for_steps(2)
    victim, slow = random.Random().randrange(N_RANKS), how_slow()
    signal_rank(job.folder, victim, signal.SIGSTOP)
    seconds = job.seconds_to_the_end()
    print(f"gone {seconds:.1f} s after rank {victim} stopped (machine {slow:.1f} times slower than idle)")
    assert seconds < LIMIT_S + 10 * slow, f"gone after {seconds:.1f} s, on a machine {slow:.1f} times slower than idle"
    verdict = assert_verdict(job, 30, victim)
    stacks = [job.folder / "logs" / f"stacks-rank{rank:05d}.txt" for rank in range(N_RANKS)]
    assert sorted(verdict["stacks"]) == [str(path) for path in stacks]
    assert all('File "' in path.read_text() for path in stacks)


@pytest.mark.long
def test_a_bug_on_one_rank_is_told_in_its_log_and_ends_the_job(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(BUG)
    job = launch("train.steps=10000", program=(str(tmp_path / "faulty.py"),))
    job.wait_for_steps(4)
    slow, seconds = how_slow(), job.seconds_to_the_end()
    print(f"gone at most {seconds + 0.3 * slow:.1f} s after the bug (machine {slow:.1f} times slower than idle)")
    assert seconds < 7 * slow, f"gone after {seconds:.1f} s, on a machine {slow:.1f} times slower than idle"
    verdict = assert_verdict(job, 31, 2)
    assert "ended by itself" in verdict["cause"] and verdict["step"] == 5
    log = (job.folder / "logs" / "rank00002.log").read_text()
    assert "Traceback" in log and "ValueError: a planted bug" in log


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 3])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(rank: int, launch: Launch) -> None:
    job = launch("train.steps=10000", "checkpoint.every=10000")
    job.wait_for_steps(3)
    signal_rank(job.folder, rank, signal.SIGTERM)
    seconds = job.seconds_to_the_end()
    print(f"gone {seconds:.1f} s after SIGTERM to rank {rank}")
    record = job.record("exit.json")
    assert record["code"] == 10, record
    steps = final_state(job.folder).step
    assert steps == len(read_metrics(job.folder)) >= 3
    events = [json.loads(line) for line in (job.folder / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["save", "stop", "exit"]
    assert events[1]["cause"] == ("SIGTERM" if rank == 0 else "asked of another rank")
    assert not (job.folder / "verdict.json").exists() and not (job.folder / "lock.json").exists()
    assert not list(job.folder.glob("logs/stacks-*"))
    assert job.torchrun.returncode != 0  # torchrun makes 1 of every code; exit.json has the true one
    assert all("Traceback" not in path.read_text() for path in (job.folder / "logs").glob("rank*.log"))
