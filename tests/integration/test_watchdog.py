"""Ranks that die, hang, dawdle or finish, as real processes: who is left, with which code, and who is blamed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from transmamba import heartbeat, watchdog
from transmamba.heartbeat import Heartbeat, Phase, Pulse, Word

ROOT = Path(__file__).parents[2]
LIMIT_S = 2.0
# A rank beats ten times a second until the file `stop` appears, and finishes well. GUILTY does something at step 5.
RANK = """
import ctypes, os, sys, threading, time
from pathlib import Path
from transmamba import heartbeat as hearts
from transmamba.heartbeat import Phase
folder, rank, limit_s = Path(sys.argv[1]), int(os.environ["RANK"]), float(sys.argv[2])
def sleeps():
    time.sleep(1000)
def sleeps_holding_the_gil():
    ctypes.PyDLL(None).sleep(1000)
def locks():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
def raises():
    raise RuntimeError("a bug")
def exits():
    sys.exit(7)
def gives_up_and_stays():
    heartbeat.leave()
    sleeps()
def finds_damaged_data():
    heartbeat.leave(22)
    sys.exit(22)
def dawdles():
    time.sleep(0.9)
def nothing():
    pass
others = {}
exec(compile("def all_reduce(sleep): sleep(1000)", "/lib/torch/distributed/ops.py", "exec"), others)
def keeps_others_waiting():
    (folder / "waiting").touch()
    time.sleep(0.4)
    heartbeat.beat(step, Phase.STEP)
    sleeps()
heartbeat = hearts.start(folder, rank, int(os.environ["WORLD_SIZE"]), limit_s)
step = 0
while not (folder / "stop").exists():
    step += 1
    heartbeat.beat(step, Phase.STEP)
    if rank == int(sys.argv[3]) and (step == 5 or sys.argv[4] == "dawdles"):
        globals()[sys.argv[4]]()
    if (folder / "waiting").exists():
        others["all_reduce"](time.sleep)
    time.sleep(0.1)
heartbeat.done()
heartbeat.done()
"""


class Job:
    """Ranks of one node that beat in `folder`; nobody but the watchdog ends them early."""

    def __init__(self, folder: Path, n_ranks: int, guilty: int = -1, act: str = "nothing", limit_s: float = 100.0):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        (folder / "stop").unlink(missing_ok=True)
        self.errors = (folder / "stderr.txt").open("w+")
        # Local rank 0 starts last: the others must not need it.
        self.ranks = {
            rank: subprocess.Popen(
                [sys.executable, "-c", RANK, str(folder), str(limit_s), str(guilty), act],
                cwd=ROOT,
                stderr=self.errors,
                env=os.environ
                | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                | {"WORLD_SIZE": str(n_ranks), "LOCAL_WORLD_SIZE": str(n_ranks)},
            )
            for rank in reversed(range(n_ranks))
        }

    def wait_for_steps(self, n_steps: int = 3) -> None:
        """Until every rank has done so many."""
        for rank, process in self.ranks.items():
            until(lambda rank=rank, pid=process.pid: beat_of(self.folder, rank, pid)[0] >= n_steps)

    def codes(self, patience_s: float) -> dict[int, int]:
        """Exit codes of all ranks, which must come within the time that the machine needs for `patience_s`."""
        until(lambda: all(process.poll() is not None for process in self.ranks.values()), patience_s)
        return {rank: process.returncode for rank, process in self.ranks.items()}

    def verdict(self) -> dict[str, object]:
        """The watchdog's words, once it is gone."""
        until(lambda: not watchdogs_of(self.folder), 20)
        self.errors.seek(0)
        verdict = json.loads((self.folder / "verdict.json").read_text())
        record = json.loads((self.folder / "exit.json").read_text())
        event = json.loads((self.folder / "events.jsonl").read_text().splitlines()[-1])
        lines = [line for line in self.errors.read().splitlines() if line.startswith("transmamba: error: watchdog: ")]
        assert len(lines) == 1 and verdict["cause"] in lines[0] and ". Fix: " in lines[0]
        assert (record["code"], record["cause"]) == (verdict["code"], verdict["cause"])
        assert str(self.folder / "config.yaml") in record["resume"]
        assert event["event"] == "verdict" and event["rank"] == verdict["rank"]
        return verdict

    def stacks(self, rank: int) -> str:
        """What the rank wrote about its threads."""
        return (self.folder / "logs" / f"stacks-rank{rank:05d}.txt").read_text()


StartJob = Callable[..., Job]


@pytest.fixture
def job(tmp_path: Path) -> Iterator[StartJob]:
    """Start a job in a folder of its own; whatever a failed test leaves is killed."""
    jobs: list[Job] = []

    def begin(n_ranks: int, guilty: int = -1, act: str = "nothing", limit_s: float = 100.0) -> Job:
        jobs.append(Job(tmp_path / "run", n_ranks, guilty, act, limit_s))
        jobs[-1].wait_for_steps()
        return jobs[-1]

    yield begin
    for started in jobs:
        started.errors.close()
        for process in started.ranks.values():
            process.kill()
            process.wait()
    until(lambda: not watchdogs_of(tmp_path / "run"), 10.0)


@pytest.fixture(scope="module")
def slowness() -> float:
    return how_slow()


def how_slow() -> float:
    """How much longer than on an idle machine things take: the start of an interpreter against 0.1 s, at least 1."""
    started = time.monotonic()
    for _ in range(3):
        subprocess.run([sys.executable, "-c", "import transmamba.watchdog"], cwd=ROOT, check=True)
    return max(1.0, (time.monotonic() - started) / 0.3)


def until(holds: Callable[[], bool], patience_s: float = 60.0) -> None:
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def beat_of(folder: Path, rank: int, pid: int) -> tuple[int, int]:
    """Step and phase of a rank's last heartbeat; zeros while its file is missing or that of a former process."""
    path = folder / "logs" / f"heartbeat-rank{rank:05d}"
    words = array("q", path.read_bytes() if path.exists() else bytes(72))
    return (words[4], words[5]) if words[0] == pid else (0, 0)


def watchdogs_of(folder: Path) -> list[int]:
    """Pids of live watchdogs of a run."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:
            continue
        if b"transmamba.watchdog" in words and str(folder).encode() in words:
            found.append(int(entry.name))
    return found


@pytest.mark.parametrize("n_ranks", [1, 3])
def test_a_clean_end_leaves_no_process_and_no_verdict(n_ranks: int, job: StartJob, slowness: float) -> None:
    started = job(n_ranks)
    assert len(watchdogs_of(started.folder)) == 1
    (started.folder / "stop").touch()
    assert set(started.codes(5 * slowness).values()) == {0}
    until(lambda: not watchdogs_of(started.folder), 2 * slowness)
    assert not [path for path in started.folder.iterdir() if path.name in ("verdict.json", "exit.json")]
    assert (started.folder / "stderr.txt").read_text() == ""
    assert not list(started.folder.glob("logs/stacks-*"))


@pytest.mark.parametrize(("n_ranks", "victim"), [(1, 0), (2, 0), (4, 1), (4, 3)])
def test_a_killed_rank_ends_the_job_within_five_seconds(
    n_ranks: int, victim: int, job: StartJob, slowness: float
) -> None:
    started = job(n_ranks)
    (started.folder / "lock.json").touch()
    checkpoint = started.folder / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    (checkpoint.parent / "step-00000004").mkdir()
    started.ranks[victim].kill()
    codes = started.codes(5 * slowness)
    assert codes == {rank: -signal.SIGKILL if rank == victim else 31 for rank in range(n_ranks)}
    verdict = started.verdict()
    assert (verdict["code"], verdict["rank"], verdict["phase"]) == (31, victim, "step")
    assert isinstance(verdict["step"], int) and verdict["step"] >= 3
    assert json.loads((started.folder / "exit.json").read_text())["checkpoint"] == str(checkpoint)
    assert not (started.folder / "lock.json").exists()


@pytest.mark.parametrize(("act", "code"), [("raises", 1), ("exits", 7), ("gives_up_and_stays", 31)])
def test_a_rank_that_leaves_before_the_end_is_a_death(act: str, code: int, job: StartJob, slowness: float) -> None:
    started = job(3, guilty=1, act=act)
    assert started.codes(6 * slowness) == {0: 31, 1: code, 2: 31}
    verdict = started.verdict()
    assert (verdict["code"], verdict["rank"]) == (31, 1)
    assert "ended by itself" in str(verdict["cause"])


def test_a_rank_that_leaves_for_a_reason_of_its_own_ends_the_job_with_its_code(job: StartJob, slowness: float) -> None:
    started = job(3, guilty=1, act="finds_damaged_data")
    assert started.codes(6 * slowness) == {0: 22, 1: 22, 2: 22}
    verdict = started.verdict()
    assert (verdict["code"], verdict["rank"]) == (22, 1)
    assert "left with code 22" in str(verdict["cause"])


@pytest.mark.parametrize(
    ("act", "code"), [("sleeps", 30), ("sleeps_holding_the_gil", None), ("locks", 30), ("stopped", 30)]
)
def test_a_rank_that_hangs_ends_the_job_and_is_named(
    act: str, code: int | None, job: StartJob, slowness: float
) -> None:
    guilty = random.Random().randrange(3)
    started = job(3, guilty, "nothing" if act == "stopped" else act, LIMIT_S)
    if act == "stopped":
        started.ranks[guilty].send_signal(signal.SIGSTOP)
    codes = started.codes(LIMIT_S + 10 * slowness)
    # A thread that holds the GIL may be interrupted by the request for stacks and let the guard speak, or be killed.
    assert codes.pop(guilty) in ((30, -signal.SIGKILL) if code is None else (code,))
    assert set(codes.values()) == {30}
    verdict = started.verdict()
    assert (verdict["code"], verdict["rank"], verdict["phase"]) == (30, guilty, "step")
    assert isinstance(verdict["age_s"], float) and LIMIT_S <= verdict["age_s"] <= LIMIT_S + 4 * slowness
    assert isinstance(verdict["stacks"], list) and len(verdict["stacks"]) == 3
    assert all("<module>" in started.stacks(rank) for rank in range(3))
    assert act == "stopped" or f"in {act}" in started.stacks(guilty)


def test_the_rank_that_the_others_wait_for_is_named(job: StartJob, slowness: float) -> None:
    started = job(3, guilty=1, act="keeps_others_waiting", limit_s=2 * LIMIT_S)
    assert set(started.codes(2 * LIMIT_S + 10 * slowness).values()) == {30}
    verdict = started.verdict()
    assert verdict["rank"] == 1  # although its last heartbeat is the youngest
    assert "in all_reduce" in started.stacks(0) and "in sleeps" in started.stacks(1)


def test_a_slow_rank_that_beats_is_left_alone(job: StartJob, slowness: float) -> None:
    limit_s = LIMIT_S * min(slowness, 3)
    started = job(2, guilty=1, act="dawdles", limit_s=limit_s)
    time.sleep(limit_s + 0.5)
    assert all(process.poll() is None for process in started.ranks.values())
    (started.folder / "stop").touch()
    assert set(started.codes(5 * slowness).values()) == {0}


def test_what_a_former_run_left_is_no_reason_to_kill(job: StartJob, slowness: float) -> None:
    first = job(2)
    first.ranks[1].kill()
    first.codes(5 * slowness)
    assert first.verdict()["rank"] == 1
    again = job(2)
    assert not (again.folder / "verdict.json").exists()
    time.sleep(1)
    assert all(process.poll() is None for process in again.ranks.values())
    again.ranks[0].kill()
    assert again.codes(5 * slowness) == {0: -signal.SIGKILL, 1: 31}
    assert again.verdict()["rank"] == 0


def test_a_process_that_got_the_pid_of_a_rank_is_not_killed(tmp_path: Path) -> None:
    stranger = subprocess.Popen(["sleep", "100"])
    page = heartbeat.create_page(tmp_path / "heartbeat-rank00000")
    words = array("q", page)
    page.release()
    words[Word.PID] = stranger.pid  # with the start time of this process
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "heartbeat-rank00000").write_bytes(words.tobytes())
    arguments = [str(tmp_path), "0", "1", "1.0", "0"]
    done = subprocess.run([sys.executable, "-m", "transmamba.watchdog", *arguments], cwd=ROOT, timeout=60)
    assert done.returncode == 31
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


def test_a_verdict_of_another_node_ends_the_ranks_of_this_one(tmp_path: Path, slowness: float) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    old = json.dumps({"code": 31, "cause": "rank 0 died in a former run", "rank": 0})
    (folder / "verdict.json").write_text(old)
    place = {"RANK": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "2"}
    command = [sys.executable, "-c", RANK, str(folder), "100", "-1", "nothing"]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | place)
    until(lambda: beat_of(folder, 1, process.pid)[0] > 10 and bool(watchdogs_of(folder)))
    time.sleep(0.5 * slowness)
    assert process.poll() is None
    (tmp_path / "verdict.json").write_text(json.dumps({"code": 30, "cause": "rank 0 hangs", "rank": 0}))
    os.replace(tmp_path / "verdict.json", folder / "verdict.json")
    assert process.wait(5 * slowness) == 30
    until(lambda: not watchdogs_of(folder), 3 * slowness)
    assert json.loads((folder / "exit.json").read_text())["cause"] == "rank 0 hangs"


def test_of_two_nodes_with_a_verdict_the_first_is_believed(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    first, second = ({"code": 31, "cause": f"rank {rank} died", "rank": rank, "host": "here"} for rank in (0, 1))
    watchdogs = [watchdog.Watchdog(tmp_path, [rank], 2, None, 0) for rank in (0, 1)]
    watchdogs[0]._record(first)
    watchdogs[1]._record(second)
    assert second == first
    assert json.loads((tmp_path / "verdict.json").read_text()) == first
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 1


def test_the_limit_follows_recent_steps_and_leaves_other_phases_time() -> None:
    page = memoryview(bytearray(72)).cast("q")
    rank = Pulse(0, page, -1)
    assert rank.limit_s(None) == 600 and rank.limit_s(5.0) == 5
    for step, now_s in enumerate([0, 20, 40, 60, 80, 100]):
        page[Word.STEP], page[Word.PHASE], page[Word.BEAT] = step, Phase.STEP, now_s * 10**9
        rank.observe()
    assert rank.limit_s(None) == 200
    page[Word.PHASE] = Phase.SAVE
    rank.observe()
    assert rank.limit_s(None) == 600


def test_a_rank_that_never_appears_ends_the_job(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").mkdir()
    watching = watchdog.Watchdog(tmp_path, [4, 5], 2, None, 0)
    watching._started_at -= watchdog.APPEAR_S
    assert watching.run() == 31
    assert json.loads((tmp_path / "verdict.json").read_text())["rank"] == 4
    assert "rank 4" in capfd.readouterr().err


def test_time_in_which_the_whole_node_was_frozen_counts_for_nobody(tmp_path: Path) -> None:
    watching = watchdog.Watchdog(tmp_path, [0], 1, 5.0, 0)
    watching._ranks[0] = Pulse(0, memoryview(bytearray(72)).cast("q"), 9999)
    watching._ranks[0].changed_at -= 100
    assert watching._late()
    watching._looked_at -= 100
    watching._look(0)
    assert not watching._late()


def test_a_beat_costs_less_than_five_microseconds(tmp_path: Path) -> None:
    beating = Heartbeat(tmp_path, 0)
    best_s = 1.0
    for _ in range(5):
        started = time.perf_counter()
        for step in range(1000):
            beating.beat(step, Phase.STEP)
        best_s = min(best_s, (time.perf_counter() - started) / 1000)
    beating.done()
    assert beat_of(tmp_path, 0, os.getpid()) == (999, Phase.DONE)
    assert best_s < 5e-6
