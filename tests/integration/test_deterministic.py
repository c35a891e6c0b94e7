"""`train.deterministic`: torch is asked for one order of sums; on a CPU it has one anyway."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils import deterministic

from tests.integration.conftest import Trainer


@pytest.fixture
def settings_put_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    filling = deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(before)
    deterministic.fill_uninitialized_memory = filling  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.usefixtures("settings_put_back")
@pytest.mark.parametrize("kind", ["transmamba", "mamba2"])
def test_no_operation_of_a_step_lacks_a_deterministic_form_and_no_bit_changes(
    kind: str, train: Trainer, tmp_path: Path
) -> None:
    losses = []
    for chosen in (False, True):
        folder = tmp_path / f"{chosen}"
        assert train(folder, "train.steps=4", f"model.kind={kind}", f"train.deterministic={str(chosen).lower()}") == 0
        assert torch.are_deterministic_algorithms_enabled() is chosen
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is chosen
        losses.append([json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == losses[1]
    assert not deterministic.fill_uninitialized_memory  # pyright: ignore[reportAttributeAccessIssue]
