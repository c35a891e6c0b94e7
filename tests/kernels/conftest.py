"""Kernels are tested with uninitialised memory full of NaN, and with non-deterministic operations refused."""

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.interpreter import repair


@pytest.fixture(autouse=True)
def repaired_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        repair(monkeypatch)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # also fills torch.empty with NaN
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(before)
