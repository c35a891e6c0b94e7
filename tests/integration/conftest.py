"""A small real corpus and runs on it inside this process (two seconds each instead of twelve)."""

import pydoc_data.topics
from collections.abc import Callable
from pathlib import Path

import pytest

from transmamba import train as entry
from transmamba.checkpoint import Checkpoint, newest_valid
from transmamba.data_pipeline.prepare import prepare

SMALL = [
    "model.n_layers=3",
    "model.d_model=16",
    "model.n_heads=2",
    "model.d_ff=24",
    "model.ssm_head_dim=8",
    "model.ssm_state=8",
    "model.pattern=MA",
    "data.seq_len=48",
    "train.global_batch=4",
    "train.micro_batch=2",
    "train.threads=1",
    "validation.tokens=500",
    "checkpoint.every=4",
    "wandb.mode=disabled",
    "sample.tokens=4",
]
Trainer = Callable[..., int]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python's own help texts, prepared: about 200,000 tokens."""
    text = tmp_path_factory.mktemp("text")
    for number, topic in enumerate(sorted(pydoc_data.topics.topics)):
        (text / f"{number:03d}.txt").write_text(pydoc_data.topics.topics[topic], encoding="utf-8")
    out = tmp_path_factory.mktemp("corpus") / "tokens"
    prepare([str(text)], out, vocab_size=512, validation_share=0.05, progress=False)
    return out


@pytest.fixture
def train(corpus: Path, capsys: pytest.CaptureFixture[str]) -> Trainer:
    """Train the small model in `folder` with more overrides; returns the exit code."""

    def run(folder: Path, *overrides: str) -> int:
        given = {text.split("=")[0] for text in overrides}
        always = [*SMALL, f"data.path={corpus}", f"run.dir={folder}"]
        return entry.main([*(text for text in always if text.split("=")[0] not in given), *overrides])

    return run


def final_state(folder: Path) -> Checkpoint:
    checkpoint, rejected = newest_valid(folder / "checkpoints")
    assert checkpoint is not None and not rejected
    return checkpoint
