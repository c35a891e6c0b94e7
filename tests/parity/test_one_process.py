"""ZeRO stages, micro-batches and recomputation change nothing but memory."""

import pytest
import torch

from tests.parity.rig import ROWS, Trained, config_of, train
from transmamba.parallel.topology import Topology


@pytest.fixture(scope="module")
def plain(topology: Topology) -> Trained:
    """Plain AdamW, one micro-batch: the oracle."""
    return train(config_of(zero__stage=0, train__micro_batch=ROWS), topology)


def assert_same(found: Trained, expected: Trained, tolerance: float) -> None:
    for name, limit in (("losses", tolerance), ("norms", 5 * tolerance)):
        ours, theirs = torch.tensor(getattr(found, name)), torch.tensor(getattr(expected, name))
        worst = ((ours - theirs).abs() / theirs).max().item()
        assert worst <= limit, f"{name}: {worst:.1e}"
    masters = found.whole("master")
    for name, master in expected.whole("master").items():
        worst = (masters[name] - master).abs().max().item()
        assert worst <= 20 * tolerance, f"{name}: {worst:.1e}"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_equal_plain_adamw(topology: Topology, plain: Trained, stage: int) -> None:
    assert_same(train(config_of(zero__stage=stage, train__micro_batch=ROWS), topology), plain, 1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("micro_batch", [1, 2])
def test_micro_batches_of_unequal_weight_equal_one_batch(
    topology: Topology, plain: Trained, stage: int, micro_batch: int
) -> None:
    assert_same(train(config_of(zero__stage=stage, train__micro_batch=micro_batch), topology), plain, 1e-6)


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("kind", ["transmamba", "hybrid"])
def test_recomputation_is_bitwise(topology: Topology, kind: str, recompute: str) -> None:
    kept, again = (train(config_of(model__kind=kind, train__recompute=how), topology) for how in ("none", recompute))
    assert (kept.losses, kept.norms) == (again.losses, again.norms)
    masters = again.whole("master")
    assert all(torch.equal(master, masters[name]) for name, master in kept.whole("master").items())


def test_two_runs_are_bitwise_equal(topology: Topology) -> None:
    first, second = (train(config_of(zero__stage=1), topology) for _ in range(2))
    assert (first.losses, first.norms) == (second.losses, second.norms)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_follows_fp32(topology: Topology, plain: Trained, stage: int) -> None:
    found = train(config_of(zero__stage=stage, precision="bf16"), topology)
    worst = max(abs(a - b) / b for a, b in zip(found.losses, plain.losses, strict=True))
    assert worst < 1e-2, worst


def test_bf16_masters_start_from_the_float32_weights(topology: Topology) -> None:
    fp32, bf16 = (
        train(config_of(zero__stage=1, precision=p), topology, n_steps=0).whole("master") for p in ("fp32", "bf16")
    )
    assert all(torch.equal(bf16[name], fp32[name]) for name in fp32)


@pytest.mark.parametrize("kind", ["transformer", "mamba2", "hybrid"])
def test_every_kind_trains_alike_under_zero(topology: Topology, kind: str) -> None:
    plain, zero = (train(config_of(model__kind=kind, zero__stage=stage), topology) for stage in (0, 1))
    assert_same(zero, plain, 1e-6)
