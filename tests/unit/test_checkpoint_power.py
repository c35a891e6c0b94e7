"""The power goes at any moment of a save: what was saved is still there, and nothing else is ever loaded."""

import random
import shutil
from pathlib import Path

import pytest
import torch

from tests.unit.power_cut import Recorder
from transmamba import checkpoint, disk, staging
from transmamba.checkpoint import Alone
from transmamba.config import CheckpointConfig
from transmamba.metrics import Journal
from transmamba.saving import Saver
from transmamba.slices import Piece

N = 300


def weights_of(step: int) -> torch.Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(step))


def save_steps(folder: Path, first: int, last: int, recorder: Recorder | None = None) -> None:
    journal = Journal(folder.parent, 0)
    with Saver(folder, CheckpointConfig(keep=2), journal, Alone(), lambda step: None) as saver:
        for step in range(first, last):
            values = weights_of(step)
            pieces = [Piece(name, "master", (N,), 0, values) for name in ("a", "b", "c")]
            saver.begin(step, pieces, {})
            saver.finish_last()
            if recorder is not None:
                recorder.say("saved", step)


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Six saves in files of two tensors, in chunks of 500 bytes."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(disk, "CHUNK_BYTES", 500)
        patch.setattr(staging, "FILE_BYTES", 8 * N)
        recorder = Recorder(tmp_path / "run" / "checkpoints", patch)
        save_steps(tmp_path / "run" / "checkpoints", 1, 7, recorder)
    return recorder


def lost(recorder: Recorder, n_cases: int, seed: int, folder: Path, *, goes_on: bool = False) -> int:
    """How often a save that had ended is not there after a cut. Anything wrong that is loaded fails at once."""
    draw, n_lost = random.Random(seed), 0
    for _ in range(n_cases):
        place = folder / "checkpoints"
        remarks = recorder.cut(draw.randrange(len(recorder.log) + 1), draw, place)
        found, _ = checkpoint.newest_valid(place)
        step = 0 if found is None else found.step
        if found is not None:
            assert set(found.tensors) == {(name, "master") for name in ("a", "b", "c")}
            assert all(torch.equal(values, weights_of(step)) for values in found.tensors.values())
        n_lost += step < remarks.get("saved", 0)
        if goes_on:
            save_steps(place, step + 1, step + 2)
            after, _ = checkpoint.newest_valid(place)
            assert after is not None and after.step == step + 1 and not list(place.glob(".tmp*"))
        shutil.rmtree(folder)
    return n_lost


def test_after_a_power_cut_the_last_save_that_had_ended_is_there(recorded: Recorder, tmp_path: Path) -> None:
    assert len(recorded.log) > 150
    assert lost(recorded, 100, seed=1, folder=tmp_path / "cut", goes_on=True) == 0


@pytest.mark.parametrize("left_out", ["sync", "sync_folder"])
def test_a_sync_that_is_left_out_is_noticed(left_out: str, recorded: Recorder, tmp_path: Path) -> None:
    recorded.log = [change for change in recorded.log if change[0] != left_out]
    assert lost(recorded, 100, seed=1, folder=tmp_path / "cut") > 5
