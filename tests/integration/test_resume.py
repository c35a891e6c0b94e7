"""Interrupted anywhere and continued, a run ends with the same bits."""

import json
import signal
from pathlib import Path

import pytest
import torch

from tests.integration.conftest import Trainer, final_state
from transmamba import loop
from transmamba.metrics import read_metrics

STEPS = 13


def assert_same_end(folder: Path, reference: Path) -> None:
    ours, theirs = final_state(folder), final_state(reference)
    assert ours.step == theirs.step == STEPS
    assert ours.tensors.keys() == theirs.tensors.keys()
    differing = [key for key, value in theirs.tensors.items() if not torch.equal(value, ours.tensors[key])]
    assert not differing
    for name in ("loss", "grad_norm", "lr", "tokens"):
        assert [r[name] for r in read_metrics(folder)] == [r[name] for r in read_metrics(reference)], name


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal in the middle of a step."""
    whole_step = loop.train_step

    def interrupted(run: loop.Run, at: int) -> loop.StepReport:
        if at == step:
            signal.raise_signal(number)
        return whole_step(run, at)

    monkeypatch.setattr(loop, "train_step", interrupted)


@pytest.mark.parametrize(
    ("overrides", "stops"),
    [
        (["zero.stage=0"], [4]),
        (["zero.stage=1"], [0, 6]),
        (["zero.stage=1", "train.recompute=full", "model.tied=false"], [2]),
        (["zero.stage=1", "precision=bf16"], [7]),
        (["zero.stage=2"], [9]),
        (["zero.stage=3", "sample.prompt=''"], [5]),
        (["zero.stage=3", "precision=bf16", "sample.prompt=''"], [3]),
        (["model.kind=transformer"], [1]),
        (["model.kind=mamba2"], [8]),
        (["model.kind=hybrid"], [11]),
        (["data.document_mask=false", "data.skip=[3:5]", "optim.z_loss=1e-4"], [2, 8]),
        (["transpoint.changes=[{step: 6, points: [0, 3, 9]}]", "optim.schedule=wsd"], [5]),
    ],
    ids=lambda value: "+".join(map(str, value)),
)
def test_interrupted_and_resumed_is_bit_identical(
    overrides: list[str], stops: list[int], train: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    always = [f"train.steps={STEPS}", *overrides]
    assert train(tmp_path / "whole", *always) == 0
    for stop in stops:
        with monkeypatch.context() as patch:
            interrupt_at(patch, stop)
            assert train(tmp_path / "parts", *always) == 10
        assert final_state(tmp_path / "parts").step == stop + 1
    assert train(tmp_path / "parts", *always) == 0
    assert_same_end(tmp_path / "parts", tmp_path / "whole")


def test_metrics_after_a_crash_are_written_once(
    train: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_step = loop.train_step

    def crash(run: loop.Run, at: int) -> loop.StepReport:
        if at == 6:
            raise RuntimeError("planted")
        return whole_step(run, at)

    assert train(tmp_path / "whole", f"train.steps={STEPS}") == 0
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", crash)
        assert train(tmp_path / "run", f"train.steps={STEPS}") == 1
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 1
    assert train(tmp_path / "run", f"train.steps={STEPS}") == 0  # from step 4, the last checkpoint
    assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_a_finished_run_says_so(train: Trainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "run", "train.steps=4") == 0
    capsys.readouterr()
    assert train(tmp_path / "run", "train.steps=4") == 2
    assert "complete at step 4" in capsys.readouterr().err


def test_a_run_killed_after_its_last_save_finishes_with_nothing_to_do(train: Trainer, tmp_path: Path) -> None:
    assert train(tmp_path / "run", "train.steps=4") == 0
    (tmp_path / "run" / "exit.json").unlink()
    before = final_state(tmp_path / "run")
    assert train(tmp_path / "run", "train.steps=4") == 0
    after = final_state(tmp_path / "run")
    assert all(torch.equal(value, after.tensors[key]) for key, value in before.tensors.items())


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(train: Trainer, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert train(folder, "train.steps=8") == 0
    damage(folder / "checkpoints" / "step-00000008")
    assert train(folder, f"train.steps={STEPS}") == 0
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    (rejected,) = [event for event in events if event["event"] == "checkpoint.rejected"]
    assert "step-00000008" in rejected["reason"] and "sha256" in rejected["reason"]
    (resumed,) = [event for event in events if event["event"] == "resume"]
    assert resumed["step"] == 4
    assert list((folder / "checkpoints" / "quarantine").iterdir())


def damage(checkpoint: Path) -> None:
    (file,) = checkpoint.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
