"""Sweeps: which trials follow from a command, and what becomes of them on this machine."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from typer.testing import CliRunner

from transmamba.commands.sweep import sweep as app
from transmamba.compose import load
from transmamba.errors import ConfigError
from transmamba.launch.sweeps import files, local
from transmamba.launch.sweeps.files import Status, TrialFolder, read_status, read_trials
from transmamba.launch.sweeps.local import Listed, Slots
from transmamba.launch.sweeps.request import Request, twins
from transmamba.launch.sweeps.schedules import random_axis, schedule_axis
from transmamba.launch.sweeps.slurm import queue_trials, ranges
from transmamba.launch.sweeps.start import Here, run_here
from transmamba.launch.sweeps.trials import assignment, grid_axis
from transmamba.plan import make_plan

# Stands for a training run: writes what a run writes, slowly enough to be stopped, and ends as its label says.
FAKE = textwrap.dedent("""
    import json, os, pathlib, signal, sys, time
    run = pathlib.Path(sys.argv[1]); run.mkdir(exist_ok=True)
    (run / "threads").write_text(os.environ["OMP_NUM_THREADS"])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(10))
    first = len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").exists() else 0
    with (run / "metrics.jsonl").open("a", buffering=1) as file:
        for step in range(first + 1, 6):
            held = {"validation": {"loss": 4.0, "bits_per_byte": 2.0}}
            record = {"step": step, "loss": 5.0, "time_s": step, "validation": held}
            file.write(json.dumps(record) + chr(10))
            time.sleep(float(sys.argv[2]))
    sys.exit(int(sys.argv[3]))
""")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials run `FAKE`: group "bad" ends with 20, group "slow" takes seconds."""

    def command(trial: TrialFolder, n_ranks: int, threads: int) -> list[str]:
        group = trial.trial.group
        pause, code = ("0.5" if "slow" in group else "0.01"), ("20" if "bad" in group else "0")
        return [sys.executable, "-S", "-c", FAKE, str(trial.run), pause, code]

    monkeypatch.setattr(local, "command", command)
    monkeypatch.setattr(local, "POLL_S", 0.02)


def made(folder: Path, *groups: str) -> list[TrialFolder]:
    """A sweep on disk whose trials have these groups."""
    trials = Request(schedules=",".join(f"v{number + 1}" for number in range(len(groups)))).trials(folder)
    trials = [
        replace(trial, trial=replace(trial.trial, group=group)) for trial, group in zip(trials, groups, strict=True)
    ]
    files.create(folder, {}, trials)
    return trials


def unheard(_line: str) -> None:
    """Takes what `Slots` says."""


def problem_keys(error: pytest.ExceptionInfo[ConfigError]) -> list[str]:
    return [problem.key for problem in error.value.problems]


@pytest.mark.parametrize(
    ("text", "overrides"),
    [
        ("optim.lr=1e-3,2e-3", ["optim.lr=0.001", "optim.lr=0.002"]),
        ("transpoint.points=[0,4],[8,16]", ["transpoint.points=[0,4]", "transpoint.points=[8,16]"]),
        ("seed=range(1,4)", ["seed=1", "seed=2", "seed=3"]),
        ("sample.prompt='a, b','c'", ["sample.prompt='a, b'", "sample.prompt='c'"]),
        ("model=tiny", ["model=tiny"]),
        (
            "transpoint.changes=[],[{step: 50, schedule: mamba_only}]",
            ["transpoint.changes=[]", "transpoint.changes=[{step:50,schedule:mamba_only}]"],
        ),
    ],
)
def test_a_grid_reads_values_as_hydra_does(text: str, overrides: list[str]) -> None:
    assert [choice.overrides[0] for choice in grid_axis(text)] == overrides
    assert all(load([override]) for override in overrides)


@pytest.mark.parametrize(
    "text", ["optim.lr", "=1,2", "optim.lr=1,1", "run.dir=a,b", "a=glob(*)", "~optim.lr", "x=interval(1,2)", "a=[1"]
)
def test_a_grid_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        grid_axis(text)


@pytest.mark.parametrize("value", ["runs/a", "a b", "it's", "x\\", "x\\'y", "ü(1)", "a=b,c", ""])
def test_any_text_can_be_a_value(value: str) -> None:
    assert load([assignment("sample.prompt", value)]).sample.prompt == value


def test_trials_are_all_combinations_with_the_seeds_outermost(tmp_path: Path) -> None:
    request = Request(("optim.lr=1e-3,2e-3",), "v1..v2,[0,inf]", seeds=2, overrides=("optim.lr=9e-3", "seed=7"))
    trials = [trial.trial for trial in request.trials(tmp_path)]
    assert len(trials) == 12
    assert [trial.seed for trial in trials] == [7] * 6 + [8] * 6
    assert [trial.group for trial in trials[:3]] == ["v1 optim.lr=0.001", "v1 optim.lr=0.002", "v2 optim.lr=0.001"]
    configs = [load(list(trial.overrides)) for trial in trials]
    assert [config.optim.lr for config in configs[:2]] == [1e-3, 2e-3]
    assert configs[4].transpoint.points == [0, float("inf")] and configs[0].transpoint.schedule == "v1"
    assert [config.seed for config in configs] == [trial.seed for trial in trials]


def test_the_paper_s_schedules_and_controls_are_named_ranges() -> None:
    names = [choice.label for choice in schedule_axis("v1..v9", controls=True)]
    assert names == [*(f"v{number}" for number in range(1, 10)), "attention_only", "mamba_only", "layer_hybrid"]
    for wrong in ("v9..v1", "v10", "explicit", "v1,v1", "nope"):
        with pytest.raises(ConfigError):
            schedule_axis(wrong, controls=False)


@pytest.mark.parametrize("budget", ["v9", "attention_only", "14M"])
def test_random_schedules_meet_the_budget_within_a_percent(budget: str) -> None:
    base = ["data.seq_len=512", "transpoint=v3"]
    choices = random_axis(6, budget, base)
    assert choices == random_axis(6, budget, base)
    # Near the dearest schedule there is hardly another one.
    assert len({choice.overrides for choice in choices}) == 6 or budget == "attention_only"

    def cost(*overrides: str) -> float:
        return make_plan(load(["data.seq_len=512", *overrides])).training_flops_per_token

    target = 14e6 if budget == "14M" else cost(f"transpoint={budget}")
    for choice in choices:
        assert cost(*choice.overrides) == pytest.approx(target, rel=0.01)


@pytest.mark.parametrize(
    ("request_", "word"),
    [
        (Request(schedules="v1", overrides=("run.dir=x",)), "run.dir"),
        (Request(schedules="v1", overrides=("transpoint.points=[0]",)), "transpoint.points"),
        (Request(("transpoint=v1,v2",), "v3"), "--grid"),
        (Request(("seed=1,2",)), "--grid"),
        (Request(overrides=("--slots",)), "--slots"),
        (Request(), "--grid"),
        (Request(random=2, overrides=("model=tiny_mamba2",)), "--random"),
        (Request(random=2, flop_budget="1"), "--flop-budget"),
        (Request(tuple(f"optim.{k}=range(1,200)" for k in ("lr", "eps", "clip"))), "--grid"),
    ],
)
def test_what_a_sweep_cannot_do_is_refused_by_name(request_: Request, word: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        request_.trials(tmp_path)
    assert problem_keys(error) == [word]


@pytest.mark.parametrize(
    ("asked", "unheard"),
    [
        ("--slots 2 --time-limit 2h", ""),
        ("--nodes 2 --time 10", "--nodes --time"),
        ("--slurm --gpus-per-node 0", ""),
        ("--slurm --slots 2", "--slots"),
        ("--trials 4 --flop-budget v9", "--trials --flop-budget"),
        ("--random 2 --flop-budget v9", ""),
    ],
)
def test_an_option_that_nothing_would_hear_is_refused(asked: str, unheard: str, tmp_path: Path) -> None:
    command = ["s", "--schedules", "v1", *asked.split(), "--dir", str(tmp_path / "s"), "--dry-run"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == (2 if unheard else 0), done.output
    assert [line.split(": ")[2] for line in done.stderr.splitlines()] == unheard.split()


def test_one_run_under_two_names_is_noticed(tmp_path: Path) -> None:
    request = Request(schedules="v9,cycle,v1,[0,inf]", controls=True, seeds=2, overrides=("model.n_layers=4",))
    assert twins(request.trials(tmp_path)) == [("cycle", "v9"), ("layer_hybrid", "mamba_only")]
    assert twins(replace(request, overrides=()).trials(tmp_path)) == [("cycle", "v9")]
    assert not twins(Request(("transpoint.changes=[],[{step: 50, schedule: mamba_only}]",)).trials(tmp_path))
    equal = Request(("model=tiny,tiny_transformer",), "v1,v9").trials(tmp_path)
    assert twins(equal) == [("v9 model=tiny_transformer", "v1 model=tiny_transformer")]


def test_all_trials_are_checked_before_anything_exists(tmp_path: Path) -> None:
    folder = tmp_path / "s"
    trials = Request(("optim.lr=1e-3,7,8", "model.n_layers=2,3"), overrides=("train.steps=2",)).trials(folder)
    with pytest.raises(ConfigError) as error:
        files.check_trials(trials, 1)
    keys = problem_keys(error)
    assert len(keys) == 2 and all("optim.lr" in key and "1 more trials" in key for key in keys)
    assert not folder.exists()


def test_another_definition_under_the_same_name_is_refused(tmp_path: Path) -> None:
    first, second = Request(schedules="v1"), Request(schedules="v1,v2")
    files.create(tmp_path / "s", first.as_dict(), first.trials(tmp_path / "s"))
    files.check_definition(tmp_path / "s", first.as_dict())
    with pytest.raises(ConfigError, match="schedules was v1"):
        files.check_definition(tmp_path / "s", second.as_dict())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="not a sweep"):
        files.check_definition(tmp_path / "other", first.as_dict())


def test_a_failing_trial_stops_no_other_and_done_ones_are_not_repeated(tmp_path: Path, fake: None) -> None:
    folder, said = tmp_path / "s", []
    trials = made(folder, "good", "bad", "good2")
    assert Slots(1, say=said.append).run(Listed(trials)) == 20
    assert [(s.state, s.code) for s in map(read_status, trials)] == [("done", 0), ("failed", 20), ("done", 0)]
    assert any("good2" in line and "4.0000" in line for line in said) and any("exit code 20" in line for line in said)
    assert Listed(trials).left() == 0 and Listed(trials, retry=True).left() == 1
    assert Slots(1, say=said.append).run(Listed(trials, retry=True)) == 20
    assert [status.attempts for status in map(read_status, trials)] == [1, 2, 1]
    assert [trial.trial for trial in read_trials(folder)] == [trial.trial for trial in trials]


@pytest.mark.parametrize("way", ["signal", "time limit"])
def test_a_stop_saves_running_trials_and_the_same_call_goes_on(way: str, tmp_path: Path, fake: None) -> None:
    trials = made(tmp_path / "s", "slow", "slow2", "good")
    handler = signal.getsignal(signal.SIGTERM)
    if way == "signal":
        threading.Timer(0.7, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    assert Slots(2, time_limit_s=0.7 if way == "time limit" else None, say=unheard).run(Listed(trials)) == 10
    assert signal.getsignal(signal.SIGTERM) == handler
    assert [status.state for status in map(read_status, trials)] == ["interrupted", "interrupted", "waiting"]
    steps = len((trials[0].run / "metrics.jsonl").read_text().splitlines())
    assert 1 <= steps < 5
    assert Slots(3, say=unheard).run(Listed(trials)) == 0
    assert [status.state for status in map(read_status, trials)] == ["done"] * 3
    lines = [json.loads(line)["step"] for line in (trials[0].run / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4, 5]


def test_trials_share_the_cores_and_die_with_the_sweep(tmp_path: Path, fake: None) -> None:
    trials = made(tmp_path / "s", "slow", "slow2")
    program = (
        "import pathlib, sys; from tests.unit.launch import test_sweep as t; "
        "from transmamba.launch.sweeps import local; "
        "local.command = lambda trial, n, threads: "
        "[sys.executable, '-S', '-c', t.FAKE, str(trial.run), '0.5', '0'];"
        "local.Slots(2).run(local.Listed(t.read_trials(pathlib.Path(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "s")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 30
        while not all((trial.run / "metrics.jsonl").exists() for trial in trials) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.kill()
    time.sleep(1.0)
    counts = [len((trial.run / "metrics.jsonl").read_text().splitlines()) for trial in trials]
    time.sleep(1.2)
    assert counts == [len((trial.run / "metrics.jsonl").read_text().splitlines()) for trial in trials]
    assert max(counts) < 5
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert [(trial.run / "threads").read_text() for trial in trials] == [threads] * 2


def test_one_command_at_a_time_holds_a_sweep(tmp_path: Path) -> None:
    with files.held(tmp_path), pytest.raises(ConfigError, match="another command"), files.held(tmp_path):
        pass
    with files.held(tmp_path):
        pass
    request, folder = Request(schedules="v1,v9"), tmp_path / "s"
    files.create(folder, request.as_dict(), request.trials(folder))
    here = partial(run_here, request, folder, Here(), n_trials=1, retry=False, dry_run=True)
    assert here() == 0
    with files.held(folder), pytest.raises(ConfigError, match="another command"):
        here()


@pytest.mark.parametrize(
    ("code", "state"),
    [(0, "done"), (10, "interrupted"), (11, "stopped"), (20, "failed"), (30, "interrupted"), (31, "interrupted"),
     (40, "failed"), (2, "failed"), (50, "failed"), (-9, "interrupted"), (143, "interrupted")],
)  # fmt: skip
def test_an_exit_code_says_whether_a_trial_goes_on(code: int, state: str) -> None:
    assert files.state_of(code) == state


def test_an_array_holds_what_is_not_over_and_its_runs_tell_their_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transmamba.launch.slurm import SlurmJob

    trials = made(tmp_path / "s", "a", "b", "c", "d")
    files.write_status(trials[1], Status("done", 0, 1))
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 77\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    job = SlurmJob(tmp_path / "s", procs_per_node=1)
    assert queue_trials(trials, job, concurrent=2) == ("77", 3)
    script = (tmp_path / "s" / "slurm.sh").read_text()
    assert "#SBATCH --array=0,2-3%2" in script and str(tmp_path / "s" / "trials") in script
    assert read_status(trials[0]).state == "queued"
    assert f"run.dir={trials[0].run}" in (trials[0].path / "overrides.txt").read_text().splitlines()
    for trial, code in ((trials[0], 0), (trials[2], 20)):
        trial.run.mkdir()
        (trial.run / "exit.json").write_text(json.dumps({"code": code}))
    trials[3].run.mkdir()
    (trials[3].run / "lock.json").touch()
    assert [read_status(trial).state for trial in trials] == ["done", "done", "failed", "running"]


def test_numbers_are_written_as_slurm_ranges() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
