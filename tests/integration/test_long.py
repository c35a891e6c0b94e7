"""What takes minutes: the default run as a stranger starts it."""

import subprocess
import sys
from pathlib import Path

import pytest

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
    entropy = Held("validation", stream, packer=None, token_bytes=None).unigram_entropy()  # pyright: ignore[reportArgumentType]
    assert held["loss"] <= entropy - 0.5
