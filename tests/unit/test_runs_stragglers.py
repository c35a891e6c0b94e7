"""A rank that holds the others up is named, from what every rank notices of itself while it steps."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from transmamba import stragglers
from transmamba.heartbeat import Phase, Pulse, Word
from transmamba.stragglers import Pace, Recorder, read_paces, straggler_lines

ROOT = Path(__file__).parents[2]
# Steps of 0.2 s: the slow rank works all the time, the others wait for it half of the time.
RANK = """
import os, sys, time
from pathlib import Path
from transmamba import heartbeat as hearts
folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
others = {}
exec(compile("def all_reduce(sleep, s): sleep(s)", "/lib/torch/distributed/ops.py", "exec"), others)
heartbeat = hearts.start(folder, rank, int(os.environ["WORLD_SIZE"]), 100.0)
step, share = 0, 1.0 if str(rank) == sys.argv[2] else 0.5
while not (folder / "stop").exists():
    step += 1
    heartbeat.beat(step, hearts.Phase.STEP)
    time.sleep(0.2 * share)
    others["all_reduce"](time.sleep, 0.2 * (1 - share))
heartbeat.done()
"""


def paces(*own_s: float) -> list[Pace]:
    return [Pace(rank, "n1", 3.0, own, 100) for rank, own in enumerate(own_s)]


@pytest.mark.parametrize(
    ("own_s", "slow"),
    [((1, 1, 1, 1), []), ((1, 1, 1.6, 1), [2]), ((1, 1.4, 1, 1), []), ((1, 3, 2, 1, 1), [1, 2]), ((1, 2), [1]),
     ((0, 0), [])],
)  # fmt: skip
def test_a_rank_is_slow_beyond_one_and_a_half_times_the_median_of_the_others(
    own_s: tuple[float, ...], slow: list[int]
) -> None:
    assert [pace.rank for pace in stragglers.stragglers(paces(*own_s))] == slow
    lines = straggler_lines(paces(*own_s))
    assert lines == ["no rank is slow"] if not slow else [line.split()[1] for line in lines] == list(map(str, slow))


def test_what_counts_is_the_last_minute(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    page = memoryview(bytearray(8 * len(Word))).cast("q")
    rank = Pulse(0, page, -1)
    recorder = Recorder(tmp_path, 0)
    for window in range(40):
        page[Word.STEP], page[Word.PHASE], page[Word.BEAT] = window, Phase.STEP, 2 * window * 10**9
        page[Word.SAMPLES] += 25
        page[Word.WAITS] += 25 if window < 20 else 5  # it waited for others at first, now they wait for it
        rank.observe()
        recorder.note([rank], at_once=True)
        other = Pace(1, "n2", 2.0, 1.0, 25)
        (tmp_path / "logs" / "pace-rank00001.json").write_text(f"[{json.dumps(asdict(other))}]")
        if window == 19:
            assert read_paces(tmp_path)[0].own_s == 0.0
    assert asdict(read_paces(tmp_path)[0]) == pytest.approx(
        {"rank": 0, "host": socket.gethostname(), "step_s": 2.0, "own_s": 1.6, "samples": 300}
    )
    assert Recorder(tmp_path, 0) and read_paces(tmp_path) == [], "a new start knows nothing of the former one"


def test_torn_and_foreign_files_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for number, text in enumerate(('[{"rank": 0', '{"a": 1}', '[{"rank": 3}]', "[]")):
        (tmp_path / "logs" / f"pace-rank{number:05d}.json").write_text(text)
    assert read_paces(tmp_path) == []


def test_the_slow_one_of_three_processes_is_named(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path), "2"],
            cwd=ROOT,
            env=os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"},
        )
        for rank in reversed(range(3))
    ]
    try:
        deadline = time.monotonic() + 60
        while not read_paces(tmp_path):
            assert time.monotonic() < deadline and all(process.poll() is None for process in ranks)
            time.sleep(0.1)
        (tmp_path / "stop").touch()
        assert [process.wait(20) for process in ranks] == [0, 0, 0]
    finally:
        for process in ranks:
            process.kill()
    found = read_paces(tmp_path)
    assert [pace.rank for pace in found] == [0, 1, 2]
    assert [pace.rank for pace in stragglers.stragglers(found)] == [2], found
    assert 0.15 < found[2].own_s < 0.6 and found[0].own_s < 0.75 * found[2].own_s, found
