"""`launch local` around ranks played by a small program: exit codes, restarts, signals and logs."""

import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from transmamba.errors import ConfigError
from transmamba.launch import local
from transmamba.launch.attempt import Attempt

# `attempts` counts the starts; what a start does is a line of Python among ACTS.
RANK = """
import json, os, signal, sys, time
from pathlib import Path
folder, acts = Path(sys.argv[1]), sys.argv[2:]
(folder / "logs").mkdir(parents=True, exist_ok=True)
def say(code):
    (folder / "exit.json").write_text(json.dumps({"code": code, "cause": "because"}, indent=1))
def save(step):
    (folder / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    (folder / "checkpoints" / f"step-{step:08d}" / "manifest.json").touch()
def die():
    os.kill(os.getpid(), signal.SIGKILL)
starts = folder / "starts"
n = len(starts.read_text()) if starts.exists() else 0
starts.write_text("." * (n + 1))
exec(acts[min(n, len(acts) - 1)])
"""
Ranks = Callable[..., int]


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ranks:
    """Launch a run in tmp_path/run whose attempts do these things, the last one for ever."""

    def run(*acts: str, max_restarts: int = 0, quiet: bool = True, log: Path | None = None) -> int:
        words = [sys.executable, "-c", RANK, str(tmp_path / "run"), *acts]
        monkeypatch.setattr(local, "command", lambda overrides, nproc: words)
        return local.run_local([f"run.dir={tmp_path / 'run'}"], 1, max_restarts=max_restarts, quiet=quiet, log=log)

    return run


def starts(tmp_path: Path) -> int:
    return len((tmp_path / "run" / "starts").read_text())


@pytest.mark.parametrize(
    ("act", "code"),
    [
        *((f"say({code}); sys.exit(1)", code) for code in (10, 11, 20, 22, 30, 31, 40)),
        ("say(0)", 0),
        ("say(1); sys.exit(1)", 1),
        *((f"sys.exit({code})", code) for code in (1, 2, 21, 23)),
        ("die()", 31),
        ("say(1); die()", 31),
        ("sys.exit(139)", 31),
        ("(folder / 'exit.json').write_text('{'); sys.exit(3)", 3),
    ],
)
def test_the_exit_code_is_the_runs_own(act: str, code: int, ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(act) == code
    assert starts(tmp_path) == 1


def test_only_what_this_attempt_wrote_is_believed(ranks: Ranks) -> None:
    assert ranks("say(10); sys.exit(10)") == 10
    assert ranks("", "sys.exit(23)") == 23
    assert ranks("", "", "die()") == 31


def test_a_run_that_lost_a_rank_is_started_again(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks("die()", "say(30); sys.exit(30)", "say(0)", max_restarts=5) == 0
    assert starts(tmp_path) == 3


@pytest.mark.parametrize("code", [1, 10, 11, 20, 21, 22, 23, 40])
def test_nothing_else_is_started_again(code: int, ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(f"say({code}); sys.exit({code})", max_restarts=5) == code
    assert starts(tmp_path) == 1


def test_no_more_restarts_than_asked_for(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks("save(n); die()", max_restarts=2) == 31
    assert starts(tmp_path) == 3


def test_three_restarts_without_a_checkpoint_end_with_code_50(
    ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ranks("die()", "die()", "save(1); die()", "say(31); die()", max_restarts=100) == 50
    assert starts(tmp_path) == 6  # two restarts, the second saved; three more in vain
    record = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert record["code"] == 50 and record["cause"].endswith("the last one ended with code 31: because")
    error = capsys.readouterr().err
    assert "3 restarts brought no new checkpoint" in error and "Fix: " in error


def test_a_run_that_must_not_continue_is_not_started_with_restarts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"resume\.mode: a restarted run could not continue"):
        local.run_local([f"run.dir={tmp_path / 'run'}", "resume=never"], 1, max_restarts=1)
    assert not (tmp_path / "run").exists()


def test_a_run_with_all_its_steps_is_not_started_and_has_not_failed(
    ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ranks("save(90); say(0)") == 0
    (tmp_path / "run" / "checkpoints" / "step-00000090" / "manifest.json").write_text("{}")
    assert ranks("sys.exit(1)", max_restarts=1) == 0
    assert starts(tmp_path) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("run is complete at step 90; raise train.steps to train longer")
    (tmp_path / "run" / "exit.json").write_text('{"code": 31}')  # of an attempt that died after its last save
    assert ranks("", "sys.exit(20)") == 20


WAITS = """
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), say(10), sys.exit(10)))
signal.signal(signal.SIGINT, lambda *_: (time.sleep(0.3), say(10), sys.exit(10)))
signal.signal(signal.SIGUSR2, lambda *_: (time.sleep(0.3), say(10), sys.exit(10)))
(folder / 'ready').touch()
time.sleep(60)
"""


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ask_when_ready(ready: Path, *numbers: signal.Signals) -> threading.Thread:
    """Signal this process once the rank is ready."""

    def ask() -> None:
        wait_until(ready.exists)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.1)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP])
def test_a_request_to_stop_is_passed_on_once_and_not_restarted(
    number: signal.Signals, ranks: Ranks, tmp_path: Path
) -> None:
    before = signal.getsignal(number)
    asking = ask_when_ready(tmp_path / "run" / "ready", number, number)
    assert ranks(WAITS, max_restarts=5) == 10
    asking.join()
    assert starts(tmp_path) == 1 and signal.getsignal(number) == before


def test_a_run_that_was_stopped_before_it_could_save_is_not_one_that_died(ranks: Ranks, tmp_path: Path) -> None:
    asking = ask_when_ready(tmp_path / "run" / "ready", signal.SIGTERM)
    assert ranks("(folder / 'ready').touch(); time.sleep(60)", max_restarts=5) == 128 + signal.SIGTERM
    asking.join()
    assert starts(tmp_path) == 1


def test_ranks_whose_launcher_is_killed_save_and_stop(tmp_path: Path) -> None:
    words = [sys.executable, "-c", RANK, str(tmp_path / "run"), WAITS]
    program = (
        f"from transmamba.launch import local\nlocal.command = lambda *_: {words!r}\n"
        f"local.run_local(['run.dir={tmp_path / 'run'}'], 1)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", program])
    wait_until((tmp_path / "run" / "ready").exists)
    launcher.kill()
    launcher.wait()
    wait_until((tmp_path / "run" / "exit.json").exists)
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 10


def test_a_launcher_under_nohup_does_not_hear_the_terminal_go(ranks: Ranks, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        asking = ask_when_ready(tmp_path / "run" / "ready", signal.SIGHUP)
        assert ranks("(folder / 'ready').touch(); time.sleep(0.5); say(0)") == 0
        asking.join()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_rank_0_says_is_on_the_screen_and_in_its_log(
    ranks: Ranks, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    act = "print('to out'); print('to err', file=sys.stderr); say(0)"
    log = tmp_path / "more.txt"
    assert ranks(act, quiet=False, log=log) == 0
    out, error = capfdbinary.readouterr()
    assert (out, error) == (b"to out\n", b"to err\n")
    for path in (tmp_path / "run" / "logs" / "rank00000.log", log):
        assert sorted(path.read_text().splitlines()) == ["to err", "to out"]
    assert ranks(act) == 0  # the second attempt is appended, and nothing is shown
    assert capfdbinary.readouterr() == (b"", b"")
    assert len((tmp_path / "run" / "logs" / "rank00000.log").read_text().splitlines()) == 4


def test_a_run_that_refuses_to_start_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [sys.executable, "-c", "import sys; print('no', file=sys.stderr); sys.exit(2)"]
    monkeypatch.setattr(local, "command", lambda overrides, nproc: words)
    assert local.run_local([f"run.dir={tmp_path / 'run'}"], 1, quiet=True) == 2
    assert not (tmp_path / "run").exists()


def test_a_launcher_outside_the_main_thread_works(ranks: Ranks) -> None:
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(ranks("say(11); sys.exit(11)")))
    thread.start()
    thread.join(30)
    assert codes == [11]


def test_ranks_get_their_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert [local.settings(nproc)["OMP_NUM_THREADS"] for nproc in (1, 2, 3, 16)] == ["8", "4", "2", "1"]
    assert local.settings(2)["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert local.settings(8)["OMP_NUM_THREADS"] == "3"


def test_ranks_inherit_nothing_of_another_launcher(
    ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "7")
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert ranks("(folder / 'env').write_text(json.dumps(dict(os.environ))); say(0)") == 0
    found = json.loads((tmp_path / "run" / "env").read_text())
    assert not {"WORLD_SIZE", "RANK", "SLURM_PROCID"} & found.keys() and os.environ["WORLD_SIZE"] == "7"


def test_one_rank_is_plain_python_and_more_are_torchruns() -> None:
    assert local.command(["seed=1"], 1)[1:] == ["-m", "transmamba.train", "seed=1"]
    words = local.command(["seed=1"], 4)
    assert words[1:5] == ["-m", "transmamba.torchrun", "--standalone", "--nproc-per-node=4"]
    assert "--signals-to-handle=SIGTERM,SIGINT,SIGUSR2" in words and "--shutdown-timeout=600" in words
    assert words[-3:] == ["-m", "transmamba.train", "seed=1"]


def test_what_is_shown_is_what_would_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = ["sample.prompt='a \"b'", "transpoint.points=[0,inf]"]
    first, line = local.shown(overrides, 1).splitlines()
    folder = first.removeprefix("# run folder: ")
    words = shlex.split(line)
    variables = [f"{name}={text}" for name, text in local.settings(1).items()]
    assert words == [*variables, *local.command([*overrides, f"run.dir={folder}"], 1)]
    assert folder.startswith("runs/") and not list(tmp_path.iterdir())


def test_an_attempt_that_gets_further_is_told_from_one_that_does_not(tmp_path: Path) -> None:
    first = Attempt(tmp_path)
    assert not first.has_new_checkpoint()
    (tmp_path / "checkpoints" / "step-00000003").mkdir(parents=True)
    assert not first.has_new_checkpoint()  # without a manifest it is none
    (tmp_path / "checkpoints" / "step-00000003" / "manifest.json").touch()
    assert first.has_new_checkpoint() and not Attempt(tmp_path).has_new_checkpoint()


@pytest.mark.parametrize("place", ["local --nproc 2", "slurm --nodes 1 --gpus-per-node 0 --procs 2"])
def test_the_launcher_needs_no_torch(place: str, tmp_path: Path) -> None:
    program = "import sys\nfrom transmamba.cli import main\ntry:\n    main()\nfinally:\n    " + (
        "assert not {'torch', 'deepspeed', 'megatron', 'wandb', 'numpy'} & set(sys.modules), 'heavy'"
    )
    words = [sys.executable, "-c", program, "launch", *place.split(), "--print", "--", "parallel.tp=2"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "transmamba.train" in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "code", "limit_s"),
    [
        ("local --nproc 2 --print -- parallel.tp=2", 0, 1.0),
        ("slurm --nodes 2 --gpus-per-node 1 --print -- parallel.tp=2", 0, 1.0),
        ("local --nproc 2 -- parallel.tp=3", 2, 1.5),
        ("slurm --nodes 2 --gpus-per-node 1 -- optim.lr=2", 2, 1.5),
        ("slurm --nodes 2 --gpus-per-node 1 --time soon -- parallel.tp=2", 2, 1.5),
    ],
)
def test_the_answer_is_quick_and_creates_nothing(words: str, code: int, limit_s: float, tmp_path: Path) -> None:
    # Processor time of one child: it waits for nothing, and other work on this machine does not count.
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    program = "from transmamba.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "launch", *words.split()], cwd=tmp_path, capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime <= limit_s
    assert done.returncode == code and not list(tmp_path.iterdir())
    if code:
        assert done.stdout == "" and all(
            line.startswith("transmamba: error: ") and "Fix: " in line for line in done.stderr.splitlines()
        )
