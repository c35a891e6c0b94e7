"""The GPU's benchmark without a GPU: the scan in Triton's interpreter, and a clock that counts calls."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.interpreter import repair
from transmamba.bench.cuda import scan_rows
from transmamba.kernels import backend, launches


def refusing(*_: int) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    raise ValueError("one group of keys a head only")


def slow(*sizes: int) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    """A peer that does everything twice."""
    op, inputs = launches.ours(*sizes)
    return (lambda **given: (op(**given), op(**given))[0]), inputs


def test_scan_and_peers_are_timed_in_both_directions_and_failures_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    repair(monkeypatch)
    calls: list[tuple[int, ...]] = []

    def runs_triton(stream: Tensor) -> bool:
        calls.append(tuple(stream.shape))
        return stream.dtype != torch.float64

    def measure(call: Callable[[], Any]) -> float:
        before = len(calls)
        call()
        return float(len(calls) - before)

    monkeypatch.setattr(backend, "runs_triton", runs_triton)
    monkeypatch.setattr("transmamba.bench.cuda.LENGTHS", (32, 64, 128))
    monkeypatch.setattr("transmamba.bench.cuda.kernel_findings", lambda *_, **__: [])
    contestants = {"transmamba": launches.ours, "slow": slow, "fla": refusing}
    rows = list(scan_rows(contestants, torch.device("cpu"), measure, shapes=((2, 1, 16, 16),), n_tokens=64))
    assert len(rows) == 2 * 2 * 2, "two lengths, two directions, two peers"
    assert {row["ratio"] for row in rows if "ratio" in row} == {2.0}
    assert {row["missing"] for row in rows if "missing" in row} == {"fla: ValueError: one group of keys a head only"}
    assert (2, 32, 2, 16) in calls and (1, 64, 2, 16) in calls


def test_nothing_is_timed_where_the_numbers_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from transmamba.kernels.ssd import triton_node

    repair(monkeypatch)
    monkeypatch.setattr(backend, "runs_triton", lambda stream: stream.dtype != torch.float64)
    forward = triton_node.triton_forward
    monkeypatch.setattr(
        triton_node, "triton_forward", lambda streams, *rest: forward(streams._replace(D_H=None), *rest)
    )
    with pytest.raises(AssertionError, match="ssd"):
        next(scan_rows({"transmamba": launches.ours}, torch.device("cpu"), lambda call: 1.0, n_tokens=64))
