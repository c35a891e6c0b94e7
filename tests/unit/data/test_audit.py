"""`data audit` compares what a run noted with what its configuration defines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from tests.unit.data.corpora import numbered_documents, write_corpus
from transmamba.cli import app
from transmamba.compose import load, to_yaml
from transmamba.corpus import open_corpus
from transmamba.ledger import Ledger

STEPS, BATCH, RANKS = 5, 4, 2


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of two ranks over two sources, one of which comes in at step 3."""
    for name, lengths in (("a", [40] * 30), ("b", [25, 60] * 9)):
        write_corpus(tmp_path / name, numbered_documents(lengths), shard_tokens=200, block_tokens=100)
    argv = [f"data.sources.a={tmp_path}/a", f"data.sources.b={tmp_path}/b", "data.blend={a:1,b:0}"]
    argv += ["data.stages=[{step:3,blend:{a:1,b:1}}]", "data.seq_len=16", f"train.global_batch={BATCH}"]
    config = load(argv)
    run_dir = tmp_path / "run"
    ledgers = [Ledger(run_dir, rank) for rank in range(RANKS)]
    (run_dir / "config.yaml").write_text(to_yaml(config))
    mixture = open_corpus(config).mixture(config)
    for step in range(STEPS):
        for rank, ledger in enumerate(ledgers):
            first = step * BATCH + rank * BATCH // RANKS
            tokens_BT = torch.from_numpy(mixture.rows(first, BATCH // RANKS).tokens_BT)
            ledger.write(step, step, mixture.samples(first, BATCH // RANKS), tokens_BT)
    for ledger in ledgers:
        ledger.close()
    return run_dir


def audit(run_dir: Path) -> Result:
    return CliRunner().invoke(app, ["data", "audit", str(run_dir)])


def test_a_run_that_read_what_it_should_passes(run_dir: Path) -> None:
    done = audit(run_dir)
    assert (done.exit_code, done.stdout) == (0, "5 steps read exactly what their configuration says\n"), done.stderr


def _edit(change: Callable[[list[dict[str, Any]]], object]) -> Callable[[Path], None]:
    def edit(run_dir: Path) -> None:
        path = run_dir / "ledger" / "rank00001.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        change(records)
        path.write_text("".join(json.dumps(record) + "\n" for record in records))

    return edit


def _again_with_other_tokens(records: list[dict[str, Any]]) -> None:
    records.append(json.loads(json.dumps(records[2])))
    records[-1]["samples"][0][-1] = "00000000"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (_edit(lambda records: records.pop(3)), "step 3: 2 windows instead of positions 12 to 16"),
        (_edit(lambda records: records[4]["samples"].pop()), "step 4: 3 windows instead of positions 16 to 20"),
        (_edit(lambda records: records[1]["samples"][0].__setitem__(3, 0)), "is not what position 6 holds"),
        (_edit(_again_with_other_tokens), "step 2: the tokens of position 10 changed"),
        (_edit(lambda records: records[0].update(data_step=7)), "step 0: run again with data step 7 after 0"),
    ],
    ids=["step-lost", "window-lost", "other-window", "other-tokens", "other-step"],
)
def test_a_planted_fault_ends_with_22_and_is_named(run_dir: Path, fault: Callable[[Path], None], message: str) -> None:
    fault(run_dir)
    done = audit(run_dir)
    assert done.exit_code == 22
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert any(message in line for line in lines), lines
    assert all(line.startswith("transmamba: error: ") for line in lines)


def test_a_folder_without_a_ledger_is_refused(tmp_path: Path) -> None:
    done = audit(tmp_path)
    assert done.exit_code == 2
    assert "data.ledger=true" in done.stderr
