"""The command as people start it: a process that is killed, interrupted, or followed by wandb."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.integration.conftest import SMALL, final_state
from transmamba.metrics import read_metrics


def start(corpus: Path, folder: Path, *overrides: str) -> subprocess.Popen[str]:
    given = {text.split("=")[0] for text in overrides}
    always = [*SMALL, f"data.path={corpus}", f"run.dir={folder}"]
    arguments = [text for text in always if text.split("=")[0] not in given]
    return subprocess.Popen(
        [sys.executable, "-m", "transmamba.train", *arguments, *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_steps(folder: Path, n_steps: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while len(read_metrics(folder)) < n_steps:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)


def test_killed_while_it_runs_it_resumes_to_the_same_bits(corpus: Path, tmp_path: Path) -> None:
    steps = "train.steps=60"
    whole = start(corpus, tmp_path / "whole", steps, "checkpoint.every=7")
    parts = start(corpus, tmp_path / "parts", steps, "checkpoint.every=7")
    wait_for_steps(tmp_path / "parts", random.Random(0).randrange(8, 50), parts)
    parts.kill()
    parts.communicate()
    assert whole.wait(120) == 0
    again = start(corpus, tmp_path / "parts", steps, "checkpoint.every=7")
    output, error = again.communicate(timeout=120)
    assert again.returncode == 0, error
    assert "continues step-" in output
    ours, theirs = final_state(tmp_path / "parts"), final_state(tmp_path / "whole")
    assert all(torch.equal(value, ours.tensors[key]) for key, value in theirs.tensors.items())
    losses = [[record["loss"] for record in read_metrics(tmp_path / name)] for name in ("parts", "whole")]
    assert losses[0] == losses[1] and len(losses[0]) == 60


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_ends_it_with_a_checkpoint_and_a_command(corpus: Path, tmp_path: Path, number: int) -> None:
    folder = tmp_path / "run"
    process = start(corpus, folder, "train.steps=100000", "checkpoint.every=100000")
    wait_for_steps(folder, 3, process)
    process.send_signal(number)
    process.send_signal(number)  # an impatient second one must not damage the save
    output, error = process.communicate(timeout=60)
    assert process.returncode == 10, error
    assert "python -m transmamba.train --config" in output and "Traceback" not in error
    steps = final_state(folder).step
    assert steps == len(read_metrics(folder)) >= 3


def test_wandb_runs_beside_the_training(corpus: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(corpus, folder, "train.steps=12", "wandb.mode=offline")
    _, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    deadline = time.monotonic() + 60
    while not list(folder.glob("wandb/offline-run-*/run-*.wandb")):
        assert time.monotonic() < deadline, (folder / "logs" / "wandb.log").read_text()
        time.sleep(0.1)


FAKE_WANDB = """
import json, os, types
api = types.SimpleNamespace(api_key=None)
def init(**settings):
    out = open(os.environ["FAKE_WANDB_OUT"], "w", buffering=1)
    out.write(json.dumps({"mode": settings["mode"], "name": settings["name"]}) + "\\n")
    log = lambda record, step: out.write(json.dumps({"step": step, "loss": record["loss"]}) + "\\n")
    return types.SimpleNamespace(log=log, finish=out.close, offline=True)
"""


def test_the_wandb_feed_logs_every_step_once_and_ends_with_its_trainer(tmp_path: Path) -> None:
    (tmp_path / "wandb.py").write_text(FAKE_WANDB)
    folder, out = tmp_path / "run-7", tmp_path / "out.jsonl"
    (folder / "logs").mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 1\n")
    metrics = (folder / "metrics.jsonl").open("w")
    lines = [json.dumps({"step": step, "loss": step / 7}) + "\n" for step in range(1, 9)]
    metrics.writelines(lines[:3])
    metrics.flush()
    feed = subprocess.Popen(
        [sys.executable, "-m", "transmamba.tracking.wandb_feed", str(folder), "offline", "project", ""],
        stdin=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.getcwd()}", "FAKE_WANDB_OUT": str(out)},
    )
    time.sleep(1)
    metrics.write(lines[3][:5])  # a line that is still being written
    metrics.flush()
    time.sleep(2.5)
    metrics.writelines([lines[3][5:], *lines[4:]])
    metrics.close()
    assert feed.stdin is not None
    feed.stdin.close()
    assert feed.wait(20) == 0
    told = [json.loads(line) for line in out.read_text().splitlines()]
    assert told[0] == {"mode": "offline", "name": "run-7"}
    assert told[1:] == [{"step": step, "loss": step / 7} for step in range(1, 9)]


def test_nothing_is_printed_that_is_not_the_projects(corpus: Path, tmp_path: Path) -> None:
    process = start(corpus, tmp_path / "run", "train.steps=4")
    output, error = process.communicate(timeout=120)
    assert process.returncode == 0
    assert error == ""
    for word in ("Warning", "WARNING", "deepspeed", "Apex"):
        assert word not in output
    assert not [name for name in os.listdir() if name.startswith("outputs")]
