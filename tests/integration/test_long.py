"""What takes minutes: the default run as a stranger starts it, and a run that is killed again and again."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.integration.conftest import final_state
from tests.integration.test_processes import start
from transmamba.data_pipeline.manifest import load_manifest
from transmamba.data_pipeline.stream import Stream
from transmamba.data_pipeline.tokens import TokenStore
from transmamba.evaluate import Held
from transmamba.metrics import read_metrics


@pytest.mark.long
def test_the_default_run_learns_more_than_token_frequencies(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "transmamba.train", f"run.dir={tmp_path / 'run'}"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    held = read_metrics(tmp_path / "run")[-1]["validation"]["validation"]
    data = next(line.split()[1].rstrip(":") for line in done.stdout.splitlines() if line.startswith("data "))
    stream = Stream(TokenStore(load_manifest(Path(data)), "validation"), seq_len=256, seed=0, shuffle_shards="all")
    entropy = Held("validation", stream, batches=None, token_bytes=None).unigram_entropy()  # pyright: ignore[reportArgumentType]
    assert held["loss"] <= entropy - 0.5


@pytest.mark.long
def test_killed_again_and_again_it_ends_with_the_same_bits(corpus: Path, tmp_path: Path) -> None:
    overrides = ["train.steps=400", "checkpoint.every=5"]
    whole = start(corpus, tmp_path / "whole", *overrides)
    assert whole.wait(600) == 0
    draw, kills = random.Random(1), 0
    while kills < 40:
        process = start(corpus, tmp_path / "parts", *overrides)
        reached = len(read_metrics(tmp_path / "parts"))
        while process.poll() is None and len(read_metrics(tmp_path / "parts")) <= reached:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.5))
        if process.poll() is not None:
            break
        process.kill()
        process.communicate()
        kills += 1
    else:
        assert start(corpus, tmp_path / "parts", *overrides).wait(600) == 0
    assert json.loads((tmp_path / "parts" / "exit.json").read_text())["code"] == 0 and kills >= 5
    ours, theirs = final_state(tmp_path / "parts"), final_state(tmp_path / "whole")
    assert all(torch.equal(value, ours.tensors[key]) for key, value in theirs.tensors.items())
    losses = [[record["loss"] for record in read_metrics(tmp_path / name)] for name in ("parts", "whole")]
    assert losses[0] == losses[1] and len(losses[0]) == 400
