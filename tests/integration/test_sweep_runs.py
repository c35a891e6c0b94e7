"""Sweeps of real runs, by the command: grid, search, length extension, and Hydra's multirun."""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.integration.conftest import SMALL

COMMAND = [sys.executable, "-c", "from transmamba.cli import main; main()", "sweep"]
RUN = [*SMALL, "train.steps=12", "validation.every=4", "sample.prompt="]


def run(argv: list[str], folder: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    clean = {name: text for name, text in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        argv, cwd=folder, env=clean | {"PYTHONPATH": path} | environ, capture_output=True, text=True, timeout=280
    )


def states(folder: Path) -> list[str]:
    return [json.loads(file.read_text())["state"] for file in sorted(folder.glob("trials/*/status.json"))]


def test_a_sweep_runs_is_shown_and_is_not_run_twice(corpus: Path, tmp_path: Path) -> None:
    asked = ["s", "--grid", "optim.lr=1e-3,2e-3", "--slots", "2", "--", *RUN, f"data.path={corpus}"]
    done = run([*COMMAND, *asked], tmp_path)
    folder = tmp_path / "runs/sweeps/s"
    assert states(folder) == ["done", "done"] and done.returncode == 0, done.stderr + done.stdout
    assert (folder / "trials/0000/s-0000/exit.json").exists() and (folder / "trials/0000/log.txt").stat().st_size
    record = json.loads((folder / "trials/0000/s-0000/env.json").read_text())
    assert record["threads"] == 1
    shown = run([*COMMAND, "show", "s", "--out", "out"], tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        *("leaderboard.csv", "leaderboard.json", "sweep.png", "sweep.html")
    }
    trial = json.loads((tmp_path / "out/leaderboard.json").read_text())["trials"][0]
    last = json.loads((folder / "trials/0000/s-0000/metrics.jsonl").read_text().splitlines()[-1])
    assert trial["final_loss"] == last["validation"]["validation"]["loss"] and trial["tokens"] == last["tokens"]
    started = (folder / "trials/0000/s-0000/metrics.jsonl").stat().st_mtime_ns
    again = run([*COMMAND, *asked], tmp_path)
    assert "0 trials to run" in again.stdout
    assert (folder / "trials/0000/s-0000/metrics.jsonl").stat().st_mtime_ns == started
    other = run([*COMMAND, *asked, "optim.eps=1e-7"], tmp_path)
    assert other.returncode == 2 and "another sweep" in other.stderr and len(other.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        (["s", "--grid", "optim.lr=1,2", "--", "model=tiny"], "optim.lr"),
        (["s", "--schedules", "v1..v77"], "--schedules"),
        (["bad/name", "--schedules", "v1"], "NAME"),
        (["s", "--schedules", "v1", "--time-limit", "soon"], "--time-limit"),
        (["show", "nothing"], "NAME"),
        (["s", "--optuna", "optim.lr=log(2,1)"], "optuna"),
        (["s", "--schedules", "v1", "--slurm", "--gpus-per-node", "0", "--time", "x y"], "--time"),
    ],
)
def test_a_wrong_sweep_is_one_line_and_leaves_nothing(argv: list[str], word: str, tmp_path: Path) -> None:
    done = run([*COMMAND, *argv], tmp_path, PATH="/nowhere")
    assert done.returncode == 2 and word in done.stderr, done.stderr
    assert all(line.startswith("transmamba: error: ") for line in done.stderr.splitlines())
    assert not list(tmp_path.iterdir())


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.skipif(find_spec("optuna") is None, reason="optuna is not installed")
def test_a_search_is_continued_and_prunes(corpus: Path, tmp_path: Path) -> None:
    def search(n_trials: int) -> subprocess.CompletedProcess[str]:
        space = ["--optuna", "optim.lr=log(1e-6,1e-2)", "--optuna", "transpoint=choice(v1,v9)"]
        base = [*SMALL, "train.steps=200", "validation.every=2", "sample.prompt=", f"data.path={corpus}"]
        return run([*COMMAND, "o", *space, "--trials", str(n_trials), "--slots", "2", "--", *base], tmp_path)

    folder = tmp_path / "runs/sweeps/o"
    assert search(4).returncode == 0
    assert states(folder).count("done") + states(folder).count("pruned") == 4
    assert search(8).returncode == 0
    assert len(states(folder)) == 8 and "pruned" in states(folder)
    assert not list(folder.glob("trials/*/*/STOP"))


def test_without_optuna_one_line_says_how_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent" / "optuna.py").write_text("raise ModuleNotFoundError(name='optuna')")
    path = os.pathsep.join([str(tmp_path / "absent"), str(Path(__file__).parents[2])])
    command = [*COMMAND, "s", "--optuna", "optim.lr=log(1e-4,1e-2)"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "pip install 'optuna" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.long
def test_a_run_goes_on_at_four_times_the_length_with_another_schedule(corpus: Path, tmp_path: Path) -> None:
    script = str(Path(__file__).parents[2] / "benchmarks/length_extension.py")
    replaced = ("data.seq_len", "train.global_batch", "train.micro_batch", "model.n_layers", "validation.tokens")
    own = [text for text in SMALL if not text.startswith((*replaced, "checkpoint.every"))]
    steps = ["--steps", "3", "--more", "2"]
    rest = [f"data.path={corpus}", "sample.prompt=", "model.n_layers=8", "validation.tokens=2100"]
    done = run([sys.executable, script, str(tmp_path / "run"), *steps, *own, *rest], tmp_path)
    assert done.returncode == 0, done.stderr
    said = re.findall(r"step +(\d+), windows of +(\d+): validation loss ([\d.]+)", done.stdout)
    assert [(step, length) for step, length, _ in said] == [("3", "512"), ("5", "2048")]
    assert float(said[1][2]) < float(said[0][2]) + 0.2
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    changed = next(event["changed"] for event in events if event["event"] == "resume")
    assert {"data.seq_len", "transpoint.points"} <= set(changed)


@pytest.mark.long
def test_hydra_s_multirun_gives_every_job_a_process_and_a_folder(corpus: Path, tmp_path: Path) -> None:
    base = [*SMALL, "train.steps=4", "sample.prompt=", f"data.path={corpus}"]
    argv = ["-m", "transpoint=v1,v9", *base, "hydra.sweep.dir=jobs"]
    done = run([sys.executable, "-m", "transmamba.train", *argv], tmp_path)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "jobs/multirun.jsonl").read_text().splitlines()]
    assert [record["code"] for record in records] == [0, 0]
    assert [Path(record["run_dir"]).name for record in records] == ["jobs-0", "jobs-1"]
    assert all((Path(record["run_dir"]) / "exit.json").exists() for record in records)


@pytest.mark.parametrize(
    ("argument", "word"),
    [
        ("hydra/launcher=submitit_slurm", "pip install hydra-submitit-launcher"),
        ("hydra.callbacks.x._target_=os.system", "_target_"),
        ("+hydra.callbacks.x=1", "hydra.callbacks"),
        ("transpoint=v1,nope", "no such choice"),
        ("optim.lr=1e-3,5", "out of range"),
        ("run.dir=a,b", "run.dir"),
        ("--config=x.yaml", "--config"),
    ],
)
def test_a_wrong_multirun_is_one_line(argument: str, word: str, tmp_path: Path) -> None:
    if "submitit" in argument and find_spec("submitit") is not None:
        pytest.skip("submitit is installed")
    done = run([sys.executable, "-m", "transmamba.train", "-m", argument], tmp_path)
    assert done.returncode == 2 and word in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not list(tmp_path.iterdir())


def test_a_normal_start_does_not_load_the_sweeper() -> None:
    program = (
        "import sys; from transmamba.train import main; code = main(['optim.lr=5']); "
        "sys.exit(code != 2 or 'transmamba.multirun' in sys.modules or 'hydra.main' in sys.modules)"
    )
    assert run([sys.executable, "-c", program], Path(__file__).parents[2]).returncode == 0
