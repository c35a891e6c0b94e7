# B batch, T tokens, H heads, V value width.

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from transmamba.kernels import backend
from transmamba.kernels.gated_norm import gated_rms_norm, rms_norm
from transmamba.kernels.gated_norm.reference import gated_rms_norm_reference
from transmamba.kernels.testing import assert_close, assert_matches_reference

HERE = Path(__file__).parent


def streams(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    shapes = {"y_BTHV": (2, 7, 3, 4), "weight_HV": (3, 4), "z_BTHV": (2, 7, 3, 4)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gate", ["all", "some", "none"])
def test_gated_norm_matches_its_definition(dtype: torch.dtype, gate: str) -> None:
    gate_BT = torch.rand(2, 7) > 0.5 if gate == "some" else None
    op, reference = (partial(function, gate_BT=gate_BT) for function in (gated_rms_norm, gated_rms_norm_reference))
    inputs = streams(dtype)
    if gate == "none":
        del inputs["z_BTHV"]
    found = assert_matches_reference(op, reference, inputs)
    assert {value.dtype for value in found.values()} == {dtype}


def test_leading_dimensions_may_be_any() -> None:
    inputs = streams()
    expected = gated_rms_norm(**inputs)
    turned = {name: value.transpose(0, 1) if "BT" in name else value for name, value in inputs.items()}
    assert_close(gated_rms_norm(**turned).transpose(0, 1), expected)
    flat = {name: value.flatten(0, 1) if "BT" in name else value for name, value in inputs.items()}
    assert_close(gated_rms_norm(**flat), expected.flatten(0, 1))


def test_heads_do_not_share_statistics() -> None:
    inputs = streams()
    louder = inputs["y_BTHV"].clone()
    louder[:, :, 0] *= 100
    before, after = gated_rms_norm(**inputs), gated_rms_norm(**{**inputs, "y_BTHV": louder})
    assert torch.equal(before[:, :, 1:], after[:, :, 1:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_plain_norm_matches_its_definition(dtype: torch.dtype) -> None:
    inputs = {"x": torch.randn(5, 7, 48).to(dtype), "weight": torch.randn(48).to(dtype)}

    def reference(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    found = assert_matches_reference(rms_norm, reference, inputs)
    assert found["output 0"].dtype == dtype


def test_bad_arguments_are_refused() -> None:
    y_BTHV, weight_HV = torch.ones(2, 7, 3, 4), torch.ones(3, 4)
    with pytest.raises(ValueError, match="do not match"):
        gated_rms_norm(y_BTHV, weight_HV[:2])
    with pytest.raises(ValueError, match="do not match"):
        gated_rms_norm(y_BTHV, weight_HV, y_BTHV[:1])
    with pytest.raises(ValueError, match="needs z"):
        gated_rms_norm(y_BTHV, weight_HV, gate_BT=torch.ones(2, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="one entry per token"):
        gated_rms_norm(y_BTHV, weight_HV, y_BTHV, gate_BT=torch.ones(7, 2, dtype=torch.bool))


# The interpreter truncates when it rounds to bfloat16: twice the error of rounding to the nearest.
TRITON_LIMIT = {torch.float32: 1e-6, torch.bfloat16: 6e-3}


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send every tensor through Triton; without a GPU in its interpreter."""
    monkeypatch.setattr(backend, "runs_triton", lambda stream: True)


def triton_streams(
    dtype: torch.dtype, shape: tuple[int, ...], weight_dtype: torch.dtype | None = None
) -> dict[str, Any]:
    return {
        "y_BTHV": torch.randn(shape).to(dtype),
        "weight_HV": torch.randn(shape[-2:]).to(weight_dtype or dtype),
        "z_BTHV": torch.randn(shape).to(dtype),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 25, 3, 20), (1, 1, 1, 64), (7, 2, 5), (2, 2, 3, 2, 4), (2, 0, 3, 4)], ids=str)
@pytest.mark.parametrize("gate", ["all", "some", "none"])
def test_triton_norm_matches_its_definition(
    triton: None, dtype: torch.dtype, shape: tuple[int, ...], gate: str
) -> None:
    gate_BT = torch.rand(shape[:-2]) > 0.4 if gate == "some" else None
    inputs = triton_streams(dtype, shape)
    if gate == "none":
        del inputs["z_BTHV"]
    op, reference = (partial(function, gate_BT=gate_BT) for function in (gated_rms_norm, gated_rms_norm_reference))
    found = assert_matches_reference(op, reference, inputs, TRITON_LIMIT[dtype])
    assert {value.dtype for value in found.values()} == {dtype}


def test_triton_norm_keeps_a_float32_weight_beside_bfloat16_streams(triton: None) -> None:
    inputs = triton_streams(torch.bfloat16, (2, 9, 3, 8), torch.float32)
    exact = gated_rms_norm_reference
    found = assert_matches_reference(gated_rms_norm, exact, inputs, TRITON_LIMIT[torch.bfloat16])
    assert found["output 0"].dtype == torch.bfloat16
    assert found["gradient of weight_HV"].dtype == torch.float32


@pytest.mark.parametrize(
    "turned", [("y",), ("z",), ("gate",), ("dout",), ("y", "z"), ("y", "z", "gate", "dout")], ids="".join
)
def test_triton_norm_takes_any_memory_order_without_a_copy(
    triton: None, monkeypatch: pytest.MonkeyPatch, turned: tuple[str, ...]
) -> None:
    """Streams in memory order [T, B, ...] seen as [B, T, ...], all or some of them, give bit for bit the same."""
    inputs = {"gate": torch.rand(3, 7) > 0.4, **{name: torch.randn(3, 7, 2, 8) for name in ("y", "z", "dout")}}
    weight_HV = torch.randn(2, 8, requires_grad=True)

    def run(streams: dict[str, Tensor]) -> tuple[Tensor, ...]:
        y, z = (streams[name].requires_grad_() for name in ("y", "z"))
        out = gated_rms_norm(y, weight_HV, z, gate_BT=streams["gate"])
        return out, *torch.autograd.grad(out, [y, weight_HV, z], streams["dout"])

    expected = run({name: value.clone() for name, value in inputs.items()})
    views = {name: sequence_first(value) if name in turned else value.clone() for name, value in inputs.items()}
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "contiguous", refuse_copies)
        found = run(views)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    for index, name in ((0, "y"), (1, "y"), (3, "z")):
        assert found[index].transpose(0, 1).is_contiguous() == (name in turned)


def sequence_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)


def refuse_copies(x: Tensor) -> Tensor:
    assert x.is_contiguous(), "a copy"
    return x


def test_triton_norm_takes_streams_whose_values_lie_apart(triton: None) -> None:
    def apart(y_BTHV: Tensor, **others: Any) -> Tensor:
        return gated_rms_norm(y_BTHV.repeat_interleave(2, -1)[..., ::2], **others)

    assert_matches_reference(apart, gated_rms_norm_reference, triton_streams(torch.float32, (2, 5, 3, 4)), 1e-6)


def test_triton_norm_gives_the_same_bits_twice(triton: None) -> None:
    def run() -> list[Tensor]:
        leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
        out = gated_rms_norm(**leaves)
        return [out, *torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))]

    inputs = triton_streams(torch.float32, (2, 67, 2, 20))
    assert all(torch.equal(*pair) for pair in zip(run(), run(), strict=True))
