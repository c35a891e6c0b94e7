"""What `transmamba runs` says of a real job: the rank that holds the others up, and the one that died."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.integration.conftest import SMALL
from tests.integration.ranks import signal_rank
from transmamba.cli import app
from transmamba.stragglers import read_paces

ROOT = Path(__file__).parents[2]
# In place of `-m transmamba.train`: rank 1 computes longer than rank 0 in every step.
SLOW = """
import os, sys, time
from transmamba import train
train.wait_politely()
from transmamba import loop
whole = loop.run_schedule
def run_schedule(*args, **options):
    time.sleep(0.6 if os.environ["RANK"] == "1" else 0.05)
    return whole(*args, **options)
loop.run_schedule = run_schedule
sys.exit(train.main())
"""


def show(folder: Path) -> dict[str, Any]:
    return json.loads(CliRunner().invoke(app, ["runs", "show", str(folder), "--json"]).stdout)


@pytest.mark.long
def test_a_slow_rank_and_a_dead_rank_are_named(corpus: Path, tmp_path: Path) -> None:
    folder, program = tmp_path / "run", tmp_path / "slow.py"
    program.write_text(SLOW)
    command = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node=2", str(program)]
    overrides = [*SMALL, f"data.path={corpus}", f"run.dir={folder}", "train.steps=5000", "validation.every=0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (tmp_path / "output.txt").open("w") as output:
        job = subprocess.Popen([*command, *overrides], env=environment, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 240
        while not (paces := read_paces(folder)) or min(pace.samples for pace in paces) < 40:
            assert job.poll() is None and time.monotonic() < deadline, (tmp_path / "output.txt").read_text()
            time.sleep(0.5)
        about = show(folder)
        assert about["state"] == "running" and about["heartbeat_s"] < 60
        assert about["stragglers"] == [1], about["paces"]
        assert about["straggler_lines"][0].startswith("rank 1 on ")
        signal_rank(folder, 1, signal.SIGKILL)
        job.wait(120)
    finally:
        job.kill()
    about = show(folder)
    assert (about["state"], about["code"], about["verdict"]["rank"]) == ("failed", 31, 1)
    assert any("stacks-rank00000" in path for path in about["verdict"]["stacks"])
    text = CliRunner().invoke(app, ["runs", "show", str(folder)]).stdout
    assert "31: rank 1 on" in text and "stacks-rank00000" in text and "slow ranks" in text
    listed = json.loads(CliRunner().invoke(app, ["runs", "ls", str(tmp_path), "--json"]).stdout)
    assert [(row["name"], row["why"]) for row in listed] == [("run", "31: a rank died")]
