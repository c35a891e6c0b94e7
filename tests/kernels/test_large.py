"""The check for offsets beyond 32 bits agrees where nothing overflows, and notices tokens that went elsewhere."""

from typing import Any

import pytest
import torch
from torch import Tensor

from transmamba.kernels import large

CPU = torch.device("cpu")


def test_the_last_tokens_are_those_of_a_row_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "PIECE", 100)
    errors = dict(large.far_errors(CPU, torch.float64, n_tokens=333, tail=64))
    assert set(errors) == {
        *("ssd values", "ssd gradient of c", "ssd gradient of b", "ssd gradient of x"),
        *("causal_conv values", "causal_conv gradient of x"),
        *("gated_norm values", "gated_norm gradient of y", "gated_norm gradient of z"),
        *("rope of q values", "rope of q gradient of q", "rope of k values", "rope of k gradient of k"),
    }
    assert max(errors.values()) < 1e-10


@pytest.mark.parametrize("name", ["ssd_scan", "causal_conv", "gated_rms_norm", "rope_qk"])
def test_a_token_read_from_elsewhere_is_noticed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    op = getattr(large, name)

    def wrapped(first: Tensor, *rest: Tensor, **others: Tensor) -> Any:
        if first.shape[1] == 200:
            first = torch.cat([first[:, :190], first[:, :10]], dim=1)
        return op(first, *rest, **others)

    monkeypatch.setattr(large, name, wrapped)
    errors = dict(large.far_errors(CPU, torch.float64, n_tokens=200, tail=64))
    assert max(errors.values()) > large.TOLERANCE
