"""`transmamba launch slurm` on a real Slurm of two nodes: preempted, timed out, cancelled, broken, and as an array."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.integration.conftest import final_state
from tests.integration.ranks import signal_rank
from tests.integration.slurm_cluster import Cluster, why_not
from tests.integration.test_launch_local import FAULTY, TWO_RANKS
from tests.integration.test_watchdog import ROOT
from transmamba.launch import slurm
from transmamba.launch.slurm import SlurmJob, submit
from transmamba.metrics import read_metrics

pytestmark = [pytest.mark.long, pytest.mark.timeout(900), pytest.mark.xdist_group("slurm")]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        running = Cluster(tmp_path_factory.mktemp("slurm"))
        patch.setenv("SLURM_CONF", running.environ["SLURM_CONF"])
        yield running
        running.stop()


def overrides(corpus: Path, folder: Path, *more: str) -> list[str]:
    given = {text.split("=")[0] for text in more}
    always = [text for text in TWO_RANKS if not text.startswith("checkpoint.")]
    always += [f"data.path={corpus}", f'run.dir="{folder}"', "train.steps=10000", "checkpoint.every=10000"]
    return [*(text for text in always if text.split("=")[0] not in given), *more]


def launch(*arguments: str) -> str:
    """Queue two ranks, one on each node; returns the job id."""
    command = [sys.executable, "-c", "from transmamba.cli import main; main()", "launch", "slurm", "--nodes", "2"]
    command += ["--gpus-per-node", "0", *arguments]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[1].rstrip(",")


def wait_for_steps(folder: Path, n_steps: int, patience_s: float = 240.0) -> None:
    deadline = time.monotonic() + patience_s
    while len(read_metrics(folder)) < n_steps:
        said = "".join(path.read_text() for path in folder.glob("logs/slurm-*.out"))
        assert time.monotonic() < deadline, said
        time.sleep(0.1)


def exit_code(folder: Path) -> int:
    return json.loads((folder / "exit.json").read_text())["code"]


@pytest.mark.parametrize("how", ["--batch", "--full"])
def test_a_preempted_job_saves_is_queued_again_and_ends_with_the_same_bits(
    how: str, cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    steps = "train.steps=40" if how == "--batch" else "train.steps=60"
    every = "checkpoint.every=15"
    whole, parts = tmp_path / "whole run", tmp_path / "parts of a run"
    job = launch("--", *overrides(corpus, whole, steps, every))
    assert cluster.wait_for(job, "COMPLETED", "FAILED")["ExitCode"] == "0:0"
    job = launch("--", *overrides(corpus, parts, steps, every))
    wait_for_steps(parts, 3)
    cluster.answer("scancel", "--signal=USR2", how, job)
    found = cluster.wait_for(job, "COMPLETED", "FAILED", "CANCELLED")
    assert (found["JobState"], found["ExitCode"], found["Restarts"]) == ("COMPLETED", "0:0", "1")
    events = [json.loads(line) for line in (parts / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events if event["event"] in ("stop", "resume")] == ["stop", "resume"]
    assert json.loads((parts / "restarts.json").read_text()) == {"job": job, "restarts": 1, "idle": 0}
    ours, theirs = final_state(parts), final_state(whole)
    assert ours.tensors.keys() == theirs.tensors.keys()
    assert all(torch.equal(value, ours.tensors[key]) for key, value in theirs.tensors.items())
    losses = [[(record["step"], record["loss"]) for record in read_metrics(folder)] for folder in (parts, whole)]
    assert losses[0] == losses[1]


def test_a_cancelled_job_saves_and_is_not_queued_again(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    job = launch("--", *overrides(corpus, folder))
    wait_for_steps(folder, 3)
    cluster.answer("scancel", job)
    found = cluster.wait_for(job, "CANCELLED", "COMPLETED", "FAILED")
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0")
    assert exit_code(folder) == 10 and final_state(folder).step == len(read_metrics(folder)) >= 3
    assert not (folder / "restarts.json").exists()


def test_a_job_saves_before_its_time_is_up_and_goes_on(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ("--time", "2", "--signal-lead", "20")  # Slurm sends it up to a minute earlier
    job = launch(*options, "--", *overrides(corpus, folder, "train.steps=1000000", "checkpoint.every=1000000"))
    deadline = time.monotonic() + 300
    while cluster.job(job)["Restarts"] == "0":
        assert time.monotonic() < deadline and cluster.state(job) not in ("CANCELLED", "FAILED", "TIMEOUT")
        time.sleep(0.5)
    assert exit_code(folder) == 10 and final_state(folder).step >= 1
    cluster.answer("scancel", job)
    cluster.wait_for(job, "CANCELLED")


def test_other_ends_keep_their_code_and_are_not_queued_again(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    job = launch("--", *overrides(corpus, folder))
    wait_for_steps(folder, 2)
    (folder / "STOP").touch()
    ended = cluster.wait_for(job, "COMPLETED", "FAILED")
    assert (ended["ExitCode"], ended["Restarts"], exit_code(folder)) == ("11:0", "0", 11)
    job = launch("--", *overrides(corpus, folder, "seed=9"))
    assert cluster.wait_for(job, "COMPLETED", "FAILED")["ExitCode"] == "23:0"
    for path in folder.glob("checkpoints/step-*/*.safetensors"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    job = launch("--", *overrides(corpus, folder))
    assert cluster.wait_for(job, "COMPLETED", "FAILED")["ExitCode"] == "21:0"


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, 31), (signal.SIGSTOP, 30)], ids=["a dead rank", "a stopped rank"]
)
def test_a_lost_rank_ends_the_job_with_its_code(
    number: signal.Signals, code: int, cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    job = launch("--no-requeue", "--", *overrides(corpus, folder, "watchdog.limit_s=8"))
    wait_for_steps(folder, 3)
    started = time.monotonic()
    signal_rank(folder, 1, number)
    ended = cluster.wait_for(job, "COMPLETED", "FAILED")
    print(f"code {code} after {time.monotonic() - started:.1f} s")
    assert (ended["ExitCode"], ended["Restarts"], exit_code(folder)) == (f"{code}:0", "0", code)


@pytest.mark.parametrize(("fault", "code"), [("nan", 20), ("full", 40), ("bug", 50)])
def test_faults_end_with_their_code(
    fault: str, code: int, cluster: Cluster, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    template = slurm.TEMPLATE.read_text().replace("-m transmamba.train", f"{tmp_path / 'faulty.py'} {fault}")
    (tmp_path / "template").write_text(template)
    monkeypatch.setattr(slurm, "TEMPLATE", tmp_path / "template")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder = tmp_path / "run"
    own = overrides(corpus, folder, "train.steps=6", "checkpoint.every=6")
    job = submit(SlurmJob(folder=folder, nodes=2, overrides=own))
    ended = cluster.wait_for(job, "COMPLETED", "FAILED", patience_s=400)
    assert (ended["ExitCode"], exit_code(folder)) == (f"{code}:0", code)
    assert ended["Restarts"] == ("3" if code == 50 else "0")


def test_an_array_runs_one_trial_per_task(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    for number in range(3):
        trial = tmp_path / "sweep" / "trials" / f"{number:04d}"
        trial.mkdir(parents=True)
        own = overrides(corpus, trial / "a run", "train.steps=4", "checkpoint.every=4", f"seed={number}")
        (trial / "overrides.txt").write_text("\n".join(own) + "\n")
    trials = tmp_path / "sweep" / "trials"
    job = submit(SlurmJob(folder=tmp_path / "sweep", array="0-2%2", trials=trials))
    deadline = time.monotonic() + 300
    while cluster.answer("squeue", "-h", "-j", job):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    runs = [trials / f"{number:04d}" / "a run" for number in range(3)]
    assert [exit_code(run) for run in runs] == [0, 0, 0]
    assert len({read_metrics(run)[0]["loss"] for run in runs}) == 3
    assert len(list((tmp_path / "sweep" / "logs").glob(f"slurm-{job}_?.out"))) == 3


def test_tasks_of_one_run_that_come_after_its_last_step_have_not_failed(
    cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    job = launch("--array", "0-2%1", "--", *overrides(corpus, folder, "train.steps=4", "checkpoint.every=4"))
    deadline = time.monotonic() + 300
    while cluster.answer("squeue", "-h", "-j", job):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    said = [(folder / "logs" / f"slurm-{job}_{task}.out").read_text() for task in range(3)]
    assert [text.count("ended with code 0;") for text in said] == [1, 1, 1]
    assert ["is complete at step 4" in text for text in said] == [False, True, True]
    assert len(read_metrics(folder)) == 4 and exit_code(folder) == 0


def test_a_sweep_is_queued_as_an_array_and_shown_when_it_is_done(
    cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    program = [sys.executable, "-c", "from transmamba.cli import main; main()", "sweep"]
    swept = [*program, "two", "--dir", str(tmp_path / "two"), "--grid", "transpoint=v1,v9", "--seeds", "2"]
    own = overrides(corpus, tmp_path, "train.steps=4", "checkpoint.every=4")
    own = [text for text in own if not text.startswith("run.dir")]
    queued = subprocess.run(
        [*swept, "--slurm", "--gpus-per-node", "0", "--concurrent", "2", "--", *own], capture_output=True, text=True
    )
    assert queued.returncode == 0, queued.stderr
    deadline = time.monotonic() + 400
    while cluster.answer("squeue", "-h"):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    shown = subprocess.run([*program, "show", "two", "--dir", str(tmp_path / "two")], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    record = json.loads((tmp_path / "two" / "leaderboard.json").read_text())
    assert {group["group"]: group["loss_seeds"] for group in record["groups"]} == {"v1": 2, "v9": 2}
    assert all(trial["state"] == "done" for trial in record["trials"])
