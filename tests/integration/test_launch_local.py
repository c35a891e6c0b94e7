"""`transmamba launch local` with real ranks: every exit code provoked and returned true, and nothing left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.conftest import final_state
from tests.integration.ranks import living, signal_rank
from tests.integration.test_faults import SMALL
from tests.integration.test_watchdog import ROOT, how_slow, until
from transmamba.data_pipeline.manifest import load_manifest
from transmamba.launch import local
from transmamba.metrics import read_metrics

LIMIT_S = 8.0
TWO_RANKS = [text for text in SMALL if not text.startswith("parallel.")] + ["train.micro_batch=2", "checkpoint.every=2"]
# In place of `-m transmamba.train`, its first argument says which fault to plant in the fourth step or in every save.
FAULTY = """
import math, sys
from transmamba import train
train.wait_politely()
from transmamba import disk, loop, saving
fault, whole_step, whole_schedule = sys.argv.pop(1), loop.train_step, loop.run_schedule
at = 0
def train_step(run, step):
    global at
    at = step
    if fault == "bug" and step == 3:
        raise ValueError("a planted bug")
    return whole_step(run, step)
def run_schedule(*arguments, **options):
    reports = whole_schedule(*arguments, **options)
    return [report * math.nan for report in reports] if fault == "nan" and at == 3 else reports
def write_chunk(descriptor, chunk):
    raise OSError(28, "No space left on device")
loop.train_step, loop.run_schedule = train_step, run_schedule
if fault == "full":
    disk.write_chunk, saving.RETRY_S = write_chunk, (0.0,)
sys.exit(train.main())
"""


class Launched:
    """A launcher in a process of its own, and the run folder of its ranks."""

    def __init__(self, folder: Path, nproc: int, *arguments: str, options: tuple[str, ...] = ()):
        self.folder = folder
        command = [sys.executable, "-c", "from transmamba.cli import main; main()", "launch", "local"]
        command += ["--nproc", str(nproc), *options, "--", *arguments, f"run.dir={folder}"]
        environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Whoever runs the suite in the background ignores Ctrl-C, and so would all that it starts.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def wait_for_steps(self, n_steps: int) -> None:
        """Until the run has done so many."""
        deadline = time.monotonic() + 200
        while len(read_metrics(self.folder)) < n_steps:
            assert self.process.poll() is None and time.monotonic() < deadline, self.process.communicate()
            time.sleep(0.05)

    def end(self, patience_s: float = 250.0) -> tuple[int, float]:
        """The exit code, and the seconds from now until no process of the run is left."""
        started = time.monotonic()
        self.said, _ = self.process.communicate(timeout=patience_s)
        until(lambda: not living(self.folder), 30)
        return self.process.returncode, time.monotonic() - started


Launch = Callable[..., Launched]


@pytest.fixture
def launch(corpus: Path, tmp_path: Path) -> Iterator[Launch]:
    """Launch a small run in tmp_path/run; whatever a failed test leaves is killed."""
    launched: list[Launched] = []

    def begin(nproc: int, *overrides: str, options: tuple[str, ...] = ()) -> Launched:
        given = {text.split("=")[0] for text in overrides}
        always = [*TWO_RANKS, f"data.path={corpus}", "train.steps=10000"]
        arguments = [text for text in always if text.split("=")[0] not in given]
        launched.append(Launched(tmp_path / "run", nproc, *arguments, *overrides, options=options))
        return launched[-1]

    yield begin
    for job in launched:
        for pid in living(job.folder):
            os.kill(pid, signal.SIGKILL)
        job.process.wait()


def exit_code(folder: Path) -> int:
    return json.loads((folder / "exit.json").read_text())["code"]


def test_a_dead_rank_ends_the_launcher_with_code_31(launch: Launch) -> None:
    job = launch(2)
    job.wait_for_steps(3)
    slow = how_slow()
    signal_rank(job.folder, 1, signal.SIGKILL)
    code, seconds = job.end()
    print(f"gone {seconds:.1f} s after the death (machine {slow:.1f} times slower than idle)")
    assert (code, exit_code(job.folder)) == (31, 31), job.said
    assert seconds < 5 * slow
    assert job.said.count("watchdog: ") == 1 and "torch.distributed.elastic" not in job.said
    for rank in range(2):
        assert (job.folder / "logs" / f"rank{rank:05d}.log").exists()
    assert "step 1/10000" in (job.folder / "logs" / "rank00000.log").read_text()


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_dead_rank_is_survived_with_restarts(launch: Launch) -> None:
    job = launch(2, "train.steps=40", options=("--max-restarts", "3"))
    job.wait_for_steps(5)
    signal_rank(job.folder, 0, signal.SIGKILL)
    code, _ = job.end()
    assert code == 0 == exit_code(job.folder), job.said
    assert "restart 1 of at most 3" in job.said and "continues step-" in job.said
    assert [record["step"] for record in read_metrics(job.folder)] == list(range(1, 41))


@pytest.mark.long
def test_a_stopped_rank_is_found_and_its_stacks_are_on_disk(launch: Launch) -> None:
    job = launch(2, f"watchdog.limit_s={LIMIT_S}")
    job.wait_for_steps(3)
    slow = how_slow()
    signal_rank(job.folder, 1, signal.SIGSTOP)
    code, seconds = job.end()
    print(f"gone {seconds:.1f} s after the stop, limit {LIMIT_S} s (machine {slow:.1f} times slower than idle)")
    assert (code, exit_code(job.folder)) == (30, 30), job.said
    assert seconds < LIMIT_S + 10 * slow
    assert all('File "' in (job.folder / "logs" / f"stacks-rank{rank:05d}.txt").read_text() for rank in range(2))


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
@pytest.mark.parametrize("nproc", [1, 2])
def test_a_signal_to_the_launcher_saves_and_ends_with_code_10(
    nproc: int, number: signal.Signals, launch: Launch
) -> None:
    job = launch(nproc, "checkpoint.every=10000", options=("--max-restarts", "3"))
    job.wait_for_steps(3)
    job.process.send_signal(number)
    time.sleep(0.2)
    job.process.send_signal(number)
    code, _ = job.end()
    assert (code, exit_code(job.folder)) == (10, 10), job.said
    assert final_state(job.folder).step == len(read_metrics(job.folder)) >= 3
    assert "Traceback" not in job.said and "restart" not in job.said


@pytest.mark.long
@pytest.mark.timeout(900)  # seven runs, one after the other
def test_codes_of_runs_that_nobody_disturbs(launch: Launch, corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    job = launch(2, "train.steps=4")
    assert job.end()[0] == 0 == exit_code(folder)
    assert launch(2, "train.steps=4").end()[0] == 0 == exit_code(folder)  # complete: nothing is left to do
    assert launch(2, "train.steps=8", "seed=9").end()[0] == 23
    assert exit_code(folder) == 0  # a run that refuses to start changes nothing
    (folder / "STOP").touch()
    assert launch(2, "train.steps=8").end()[0] == 11 == exit_code(folder)
    for path in (folder / "checkpoints").glob("step-*"):
        for file in path.glob("*.safetensors"):
            if file.stat().st_size > 1000:
                data = bytearray(file.read_bytes())
                data[len(data) // 2] ^= 1
                file.write_bytes(data)
    assert launch(2, "train.steps=8").end()[0] == 21
    shutil.rmtree(folder)
    copy = tmp_path / "damaged"
    shutil.copytree(corpus, copy)
    shard = copy / load_manifest(copy).splits["train"].shards[0].name
    data = bytearray(shard.read_bytes())
    for offset in range(len(data) // 4, 3 * len(data) // 4, 500):
        data[offset] ^= 4
    shard.write_bytes(data)
    assert launch(2, "train.steps=200", f"data.path={copy}").end()[0] == 22 == exit_code(folder)


@pytest.mark.long
@pytest.mark.parametrize(("fault", "nproc", "code"), [("bug", 1, 1), ("bug", 2, 31), ("nan", 2, 20), ("full", 2, 40)])
def test_codes_of_faults(
    fault: str, nproc: int, code: int, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*TWO_RANKS, f"data.path={corpus}", "train.steps=6", f"run.dir={tmp_path / 'run'}"]
    plant(fault, tmp_path, monkeypatch)
    assert local.run_local(overrides, nproc, quiet=True) == code == exit_code(tmp_path / "run")


@pytest.mark.long
@pytest.mark.timeout(900)  # four attempts, one after the other
def test_a_run_that_dies_again_and_again_ends_with_code_50(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant("bug", tmp_path, monkeypatch)
    overrides = [*TWO_RANKS, f"data.path={corpus}", "train.steps=6", f"run.dir={tmp_path / 'run'}"]
    assert local.run_local(overrides, 2, max_restarts=9, quiet=True) == 50 == exit_code(tmp_path / "run")


def plant(fault: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the launcher start a trainer with a fault."""
    (folder / "faulty.py").write_text(FAULTY)
    whole = local.command

    def command(overrides: list[str], nproc: int) -> list[str]:
        words = whole(overrides, nproc)
        at = words.index("transmamba.train")
        return [*words[: at - 1], str(folder / "faulty.py"), fault, *words[at + 1 :]]

    monkeypatch.setattr(local, "command", command)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
