"""A run that goes on in longer windows reads on behind as many tokens, wherever it stops, and its audit agrees."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.integration.conftest import Trainer, final_state
from transmamba import checkpoint
from transmamba.cli import app
from transmamba.data_pipeline.manifest import load_manifest
from transmamba.data_pipeline.mixture import Sample
from transmamba.data_pipeline.stream import Stream
from transmamba.data_pipeline.tokens import TokenStore
from transmamba.ledger import read_ledger

ALWAYS = ("data.ledger=true", "checkpoint.every=2", "checkpoint.keep=9", "optim.schedule=constant", "optim.warmup=0")
SHORT, LONG, BATCH = 48, 192, 4


def longer(steps: int, seq_len: int = LONG) -> list[str]:
    return [*ALWAYS, f"train.steps={steps}", f"data.seq_len={seq_len}", "resume.allow=[seq_len]"]


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def lengths_at(folder: Path, step: int) -> list[list[int]] | None:
    return checkpoint.look(folder / "checkpoints" / f"step-{step:08d}").manifest["data"].get("lengths")


@pytest.fixture
def extended(train: Trainer, tmp_path: Path) -> Path:
    """Five steps of short windows, four of long ones, three of short ones."""
    folder = tmp_path / "whole"
    assert train(folder, *ALWAYS, "train.steps=5", f"data.seq_len={SHORT}") == 0
    assert train(folder, *longer(9)) == 0
    assert train(folder, *longer(12, SHORT)) == 0
    return folder


def test_the_windows_go_on_behind_as_many_tokens_and_the_audit_follows(extended: Path, corpus: Path) -> None:
    samples = {
        record["step"]: [Sample(*fields) for *fields, _ in record["samples"]] for record in read_ledger(extended)
    }
    # 20 windows of 48 are 5 of 192; 16 more of them make 21 of 192, which are 84 of 48.
    for seq_len, steps, position in ((SHORT, range(5), 0), (LONG, range(5, 9), 5), (SHORT, range(9, 12), 84)):
        stream = Stream(TokenStore(load_manifest(corpus), "train"), seq_len=seq_len, seed=1234, shuffle_shards="all")
        expected = stream.window_numbers(np.arange(position, position + BATCH * len(steps))).tolist()
        found = [sample for step in steps for sample in samples[step]]
        assert [sample.window for sample in found] == expected
        assert [sample.position for sample in found] == list(range(BATCH * steps[0], BATCH * (steps[-1] + 1)))
    done = CliRunner().invoke(app, ["data", "audit", str(extended)])
    assert (done.exit_code, done.stdout) == (0, "12 steps read exactly what their configuration says\n"), done.stderr
    # A checkpoint records the lengths once there are two of them.
    assert lengths_at(extended, 4) is None and lengths_at(extended, 5) is None
    assert lengths_at(extended, 6) == lengths_at(extended, 9) == [[0, SHORT], [5 * BATCH, LONG]]
    assert lengths_at(extended, 12) == [[0, SHORT], [5 * BATCH, LONG], [9 * BATCH, SHORT]]


def test_a_restart_after_the_change_goes_on_to_the_same_bits(extended: Path, train: Trainer, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    assert train(folder, *ALWAYS, "train.steps=5", f"data.seq_len={SHORT}") == 0
    # The second stop lies between two steps of the new length.
    for steps in (7, 9):
        assert train(folder, *longer(steps)) == 0
    for steps in (10, 12):
        assert train(folder, *longer(steps, SHORT)) == 0
    assert losses(folder) == losses(extended)
    one, other = final_state(folder), final_state(extended)
    assert one.manifest["data"] == other.manifest["data"]
    assert all(one.tensors[key].equal(other.tensors[key]) for key in other.tensors)


def test_a_run_of_so_many_tokens_reads_so_many(train: Trainer, tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    first = 5 * BATCH * SHORT
    assert train(folder, *ALWAYS, f"train.tokens={first}", f"data.seq_len={SHORT}") == 0
    wanted = first + 4 * BATCH * LONG
    # In windows of the new length alone these would be six steps, of which five are done.
    command = [*ALWAYS, f"train.tokens={wanted}", f"data.seq_len={LONG}", "resume.allow=[seq_len]"]
    assert train(folder, *command) == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert (rows[-1]["step"], rows[-1]["tokens"]) == (9, wanted)
    # The same command again has nothing left to do.
    assert train(folder, *command) == 2
