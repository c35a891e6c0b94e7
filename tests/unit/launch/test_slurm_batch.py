"""The batch script run from end to end, with srun and scontrol played by small programs: what it answers, and when."""

import json
import signal
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from transmamba.launch.slurm import SlurmJob, script

# $ACT is what the ranks do, in the run folder; the last argument names the environment of rank 1.
SRUN = """#!/usr/bin/env bash
env >"$FAKE/env"
printf '%s\\n' "$@" >"$FAKE/arguments"
say() { printf '{\\n "code": %d,\\n "cause": "because \\\\"it\\\\""\\n}\\n' "$1" >exit.json; }
save() { mkdir -p "checkpoints/step-$1"; touch "checkpoints/step-$1/manifest.json"; }
cd "$RUN" || exit 99
eval "$ACT"
"""
SCONTROL = """#!/usr/bin/env bash
case "$*" in
"show hostnames "*) printf 'n1\\nn2\\n' ;;
"-o show node "*) echo "NodeName=$4 Arch=x86_64 NodeAddr=10.1.2.3 NodeHostName=n1" ;;
"-o show job "*) echo "JobId=$4 $STATE Restarts=0" ;;
"requeue "*) echo "$2" >>"$FAKE/requeued" ;;
*) exit 98 ;;
esac
"""


@dataclass
class Desk:
    """Where a job runs and what it finds there."""

    folder: Path
    job: SlurmJob
    environ: dict[str, str]

    def start(self, act: str, state: str = "JobState=RUNNING Reason=None", **environ: str) -> subprocess.Popen[str]:
        """Begin one attempt."""
        (self.folder / "job.sh").write_text(script(self.job))
        return subprocess.Popen(
            ["bash", str(self.folder / "job.sh")],
            env=self.environ | {"ACT": act, "STATE": state} | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, act: str, state: str = "JobState=RUNNING Reason=None", **environ: str) -> tuple[int, bool]:
        """One attempt: its exit code, and whether it asked to be queued again."""
        before = self.requeued()
        process = self.start(act, state, **environ)
        self.said, _ = process.communicate(timeout=30)
        return process.returncode, len(self.requeued()) > len(before)

    def requeued(self) -> list[str]:
        """The jobs that were queued again."""
        path = self.folder / "requeued"
        return path.read_text().split() if path.exists() else []

    def record(self, name: str) -> dict[str, object]:
        """A JSON file of the run folder."""
        return json.loads((self.job.folder / name).read_text())


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    run = tmp_path / "a run"
    run.mkdir()
    environ = {"PATH": f"{folder}:/usr/bin:/bin", "FAKE": str(tmp_path), "RUN": str(run)}
    environ |= {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n[1-2]", "LC_ALL": "C"}
    job = SlurmJob(folder=run, nodes=2, gpus_per_node=4, overrides=["sample.prompt='a b'"])
    return Desk(tmp_path, job, environ)


@pytest.mark.parametrize("code", [0, 1, 11, 20, 40])
def test_a_run_that_ends_by_itself_is_not_queued_again(code: int, desk: Desk) -> None:
    assert desk.run(f"say {code}; exit {min(code, 1)}") == (code, False)
    assert f"job 77 ended with code {code}" in desk.said


@pytest.mark.parametrize("code", [2, 21, 22, 23])
def test_a_run_that_refuses_to_start_says_so_by_its_exit_code_alone(code: int, desk: Desk) -> None:
    assert desk.run(f"exit {code}") == (code, False)
    assert not (desk.job.folder / "restarts.json").exists()


@pytest.mark.parametrize("code", [10, 30, 31])
def test_what_can_go_on_is_queued_again_and_counted(code: int, desk: Desk) -> None:
    assert desk.run(f"say {code}; save 00000001; exit {code}") == (code, True)
    assert desk.requeued() == ["77"]
    assert desk.record("restarts.json") == {"job": "77", "restarts": 1, "idle": 0}
    assert desk.run(f"say {code}; save 00000002; exit {code}") == (code, True)
    assert desk.record("restarts.json") == {"job": "77", "restarts": 2, "idle": 0}


@pytest.mark.parametrize("act", ["exit 137", "say 1; exit 137", "exit 139"])
def test_ranks_that_die_without_a_word_count_as_dead(act: str, desk: Desk) -> None:
    assert desk.run(act) == (31, True)


def test_only_what_this_attempt_wrote_is_believed(desk: Desk) -> None:
    assert desk.run("say 0; exit 0") == (0, False)
    assert desk.run("exit 23") == (23, False)
    assert desk.run("exit 137") == (31, True)


@pytest.mark.parametrize("state", ["JobState=CANCELLED Reason=None", "JobState=COMPLETING Reason=None"])
def test_a_job_that_was_cancelled_is_not_queued_again(state: str, desk: Desk) -> None:
    assert desk.run("say 10; save 1; exit 10", state) == (10, False)


@pytest.mark.parametrize("state", ["JobState=COMPLETING Reason=TimeLimit", "JobState=SIGNALING Reason=None"])
def test_a_job_whose_time_is_up_is_queued_again(state: str, desk: Desk) -> None:
    assert desk.run("say 10; save 1; exit 10", state) == (10, True)


def test_no_requeue_means_no(desk: Desk) -> None:
    desk.job = replace(desk.job, requeue=False)
    assert desk.run("say 10; save 1; exit 10") == (10, False)


@pytest.mark.parametrize("act", ["exit 137", "say 30; exit 30"])
def test_three_restarts_without_a_checkpoint_end_with_code_50(act: str, desk: Desk) -> None:
    code = 30 if "say" in act else 31
    assert [desk.run(act) for _ in range(3)] == [(code, True)] * 3
    assert desk.run(act) == (50, False)
    record = desk.record("exit.json")
    assert record["code"] == 50 and f"3 restarts brought no new checkpoint; the last one ended with code {code}" in str(
        record["cause"]
    )
    assert "because" in str(record["cause"]) or "say" not in act
    assert "transmamba: error: 3 restarts brought no new checkpoint" in desk.said and "Fix: " in desk.said


def test_a_new_checkpoint_starts_the_count_anew(desk: Desk) -> None:
    acts = ["exit 137", "exit 137", "exit 137", "save 00000004; exit 137", "exit 137", "exit 137"]
    assert [desk.run(act) for act in acts] == [(31, True)] * 6
    assert desk.record("restarts.json") == {"job": "77", "restarts": 6, "idle": 2}
    assert desk.run("exit 137") == (50, False)


def test_another_job_in_the_folder_counts_from_the_beginning(desk: Desk) -> None:
    assert [desk.run("exit 137") for _ in range(3)] == [(31, True)] * 3
    assert desk.run("exit 137", SLURM_JOB_ID="78") == (31, True)
    assert desk.record("restarts.json") == {"job": "78", "restarts": 1, "idle": 0}


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_request_to_stop_reaches_the_ranks_which_may_take_their_time(number: int, desk: Desk) -> None:
    act = "trap 'sleep 0.3; say 10; save 1; exit 10' USR2; touch ready; while :; do sleep 0.05; done"
    process = desk.start(act)
    deadline = time.monotonic() + 20
    while not (desk.job.folder / "ready").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    time.sleep(0.1)
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == 10 and desk.requeued() == ["77"]


def test_ranks_learn_who_they_are(desk: Desk) -> None:
    desk.environ |= {"SLURM_CPUS_PER_TASK": "5", "SLURM_PROCID": "6", "SLURM_LOCALID": "2"}
    probe = (
        'while [ "$1" != bash ]; do shift; done; set -- "${@:1:4}" sh -c \'echo $RANK $LOCAL_RANK >who\'; "$@"; say 0'
    )
    assert desk.run(probe) == (0, False)
    assert (desk.job.folder / "who").read_text() == "6 2\n"
    environ = dict(line.split("=", 1) for line in (desk.folder / "env").read_text().splitlines() if "=" in line)
    wanted = {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "10.1.2.3", "MASTER_PORT": "10077"}
    wanted |= {"OMP_NUM_THREADS": "5", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
    wanted |= {"TRITON_CACHE_DIR": "/tmp/transmamba-triton-77"}
    assert wanted.items() <= environ.items()
    arguments = (desk.folder / "arguments").read_text().splitlines()
    assert arguments[-4:] == ["-m", "transmamba.train", "--unless-complete", "sample.prompt='a b'"]


START_ITS_COMMAND = 'while [ "$1" != bash ]; do shift; done; "$@"'


def test_a_task_that_comes_after_the_last_step_has_not_failed(desk: Desk) -> None:
    run = desk.job.folder
    (run / "checkpoints" / "step-00000020").mkdir(parents=True)
    (run / "checkpoints" / "step-00000020" / "manifest.json").write_text("{}")
    (run / "exit.json").write_text('{"code": 0}')
    before = sorted(run.rglob("*"))
    desk.environ |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    desk.job = replace(desk.job, overrides=[f"run.dir='{run}'", "train.steps=20"])
    assert desk.run(START_ITS_COMMAND) == (0, False)
    assert "is complete at step 20; raise train.steps to train longer\n" in desk.said and "error" not in desk.said
    assert sorted(run.rglob("*")) == before
    desk.job = replace(desk.job, overrides=[f"run.dir='{run}'", "train.steps=20", "seed=-1"])
    assert desk.run(START_ITS_COMMAND) == (2, False)
    assert "transmamba: error: seed: " in desk.said


def test_a_task_of_an_array_reads_its_trial_and_is_queued_again_alone(desk: Desk) -> None:
    trial = desk.folder / "trials" / "0007"
    trial.mkdir(parents=True)
    (trial / "overrides.txt").write_text(f'seed=3\nrun.dir="{desk.job.folder}"\n')
    run, desk.job = desk.job.folder, SlurmJob(folder=desk.folder, array="0-9", trials=trial.parent)
    task = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "7"}
    assert desk.run("say 30; exit 30", **task) == (30, True)
    assert desk.requeued() == ["70_7"]
    assert json.loads((run / "restarts.json").read_text())["job"] == "70_7"
    assert (desk.folder / "arguments").read_text().splitlines()[-2:] == ["seed=3", f'run.dir="{run}"']
