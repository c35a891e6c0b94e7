"""Rotary positions in Triton against complex numbers in float64: in the interpreter, or on the GPU if there is one."""
# B batch, T tokens, H heads, N key width.

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from transmamba.kernels import backend
from transmamba.kernels.launches import rope_rows
from transmamba.kernels.rope import rope, rope_qk, triton_rope
from transmamba.kernels.rope.reference import rope_qk_reference
from transmamba.kernels.testing import assert_matches_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter truncates when it rounds to bfloat16: twice the error of rounding to the nearest.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3}
LONGEST = 131_072


@pytest.fixture(autouse=True)
def triton_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(backend, "runs_triton", lambda stream: stream.dtype != torch.float64)
        yield


def streams(*shape: int, dtype: torch.dtype = torch.float32, longest: int = LONGEST) -> dict[str, Tensor]:
    inputs = {name: torch.randn(shape).to(dtype) for name in ("q_BTHN", "k_BTHN")}
    inputs["pos_BT"] = torch.randint(longest, shape[:2])
    return {name: value.to(DEVICE) for name, value in inputs.items()}


def run(inputs: dict[str, Tensor], dq_BTHN: Tensor, dk_BTHN: Tensor) -> tuple[Tensor, ...]:
    """Both outputs and both gradients, of these very tensors and not of copies."""
    q_BTHN, k_BTHN = (inputs[name].detach().requires_grad_() for name in ("q_BTHN", "k_BTHN"))
    outputs = rope_qk(q_BTHN, k_BTHN, inputs["pos_BT"])
    return *outputs, *torch.autograd.grad(outputs, [q_BTHN, k_BTHN], [dq_BTHN, dk_BTHN])


SHAPES = [(3, 25, 3, 20), (1, 1, 1, 64), (2, 9, 5, 96), (1, 40, 9, 64), (2, 0, 3, 4), (0, 3, 2, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_the_definition(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    found = assert_matches_reference(rope_qk, rope_qk_reference, streams(*shape, dtype=dtype), TOLERANCE[dtype])
    assert {value.dtype for value in found.values()} == {dtype}
    assert found["output 0"].is_contiguous() and found["gradient of k_BTHN"].is_contiguous()


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 40).map(lambda n: 2 * n)),
    theta=st.floats(1.5, 1e6),
)
def test_any_shape_and_base(shape: tuple[int, ...], theta: float) -> None:
    def with_theta(op: Callable[..., Any]) -> Callable[..., Any]:
        return lambda q_BTHN, k_BTHN, pos_BT: op(q_BTHN, k_BTHN, pos_BT, theta)

    assert_matches_reference(with_theta(rope_qk), with_theta(rope_qk_reference), streams(*shape), 1e-6)


def test_positions_up_to_the_longest_have_their_sines_and_cosines() -> None:
    """A head of (1, 0) comes out as cosines, then sines; no pair may hide behind the others."""
    pos_BT = torch.arange(0, LONGEST + 1, 13, device=DEVICE)[None]
    x_BTHN = torch.tensor([1.0, 1, 1, 0, 0, 0], device=DEVICE).expand(1, pos_BT.shape[1], 1, 6)
    found, _ = rope_qk(x_BTHN, x_BTHN, pos_BT, 100.0)
    expected, _ = rope_qk_reference(x_BTHN.double(), x_BTHN.double(), pos_BT, 100.0)
    assert (found - expected).abs().max() < 9e-8
    torch_path = rope(x_BTHN, pos_BT, 100.0)
    assert (found - torch_path).abs().max() < 2e-7, "the angles are those of the torch path"


def time_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def third_of_a_row(x_BTHN: Tensor) -> Tensor:
    nan = torch.full_like(x_BTHN, torch.nan)
    return torch.cat([nan, x_BTHN, nan], -1).chunk(3, -1)[1]


def heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def apart(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2]


ORDERS = [time_first, third_of_a_row, heads_first, apart, lambda x: third_of_a_row(x.transpose(0, 1)).transpose(0, 1)]


@pytest.mark.parametrize("order", ORDERS, ids=["time first", "rows of 3N", "heads first", "apart", "both"])
@pytest.mark.parametrize("turned", [("q",), ("k", "dq"), ("dk",), ("q", "k", "dq", "dk", "pos")], ids="".join)
def test_any_memory_order_gives_the_same_bits(order: Callable[[Tensor], Tensor], turned: tuple[str, ...]) -> None:
    inputs, grads = streams(3, 7, 3, 8), torch.randn(2, 3, 7, 3, 8, device=DEVICE)
    expected = run(inputs, *grads)
    views = {name: order(value) if name[0] in turned else value for name, value in inputs.items() if name != "pos_BT"}
    views["pos_BT"] = time_first(inputs["pos_BT"]) if "pos" in turned else inputs["pos_BT"]
    found = run(
        views, *(order(grad) if name in turned else grad for name, grad in zip(("dq", "dk"), grads, strict=True))
    )
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert all(value.is_contiguous() for value in found)


def test_only_values_that_lie_apart_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, dq_BTHN = streams(3, 7, 3, 8), torch.randn(3, 3, 7, 8, device=DEVICE).permute(1, 2, 0, 3)
    views = {name: time_first(value) for name, value in inputs.items()}
    monkeypatch.setattr(Tensor, "contiguous", lambda _: pytest.fail("a copy"))
    run(views, dq_BTHN, dq_BTHN[:1, :1, :1].expand(3, 7, 3, 8))


def test_positions_may_be_one_row_for_all() -> None:
    inputs = streams(3, 7, 2, 8)
    inputs["pos_BT"] = torch.arange(7, device=DEVICE).expand(3, 7)
    copied = {**inputs, "pos_BT": inputs["pos_BT"].contiguous()}
    grads = torch.randn(2, 3, 7, 2, 8, device=DEVICE)
    assert all(torch.equal(*pair) for pair in zip(run(inputs, *grads), run(copied, *grads), strict=True))


def test_two_runs_and_any_split_of_the_heads_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, grads = streams(2, 67, 11, 20), torch.randn(2, 2, 67, 11, 20, device=DEVICE)
    expected = run(inputs, *grads)
    for enough in (1024, 1, 4):
        monkeypatch.setattr(triton_rope, "ENOUGH_PROGRAMS", enough)
        assert all(torch.equal(*pair) for pair in zip(run(inputs, *grads), expected, strict=True))


def test_one_launch_each_way_where_torch_takes_dozens() -> None:
    rows = list(rope_rows())
    for ours, torches in zip(rows[::2], rows[1::2], strict=True):
        n_heads, width = (ours["shape"][letter] for letter in "HN")
        for part in ("forward", "backward"):
            assert ours[part]["names"] == ["rope_kernel"]
            assert torches[part]["launches"] >= 20
            # both streams are read and written once, besides 8 bytes a token
            n_bytes = ours[part]["bytes_per_token_head"]
            assert n_bytes == pytest.approx(2 * 2 * 2 * width + 8 / n_heads, abs=0.05)
            assert torches[part]["bytes_per_token_head"] > 12 * n_bytes


def test_float64_and_what_does_not_fit() -> None:
    q_BTHN, pos_BT = torch.ones(1, 2, 3, 4), torch.zeros(1, 2, dtype=torch.long)
    exact = q_BTHN.double()
    assert torch.equal(rope_qk(exact, exact, pos_BT + 5)[1], rope(exact, pos_BT + 5))
    with pytest.raises(ValueError, match="even head width, got 3"):
        rope_qk(q_BTHN[..., :3], q_BTHN[..., :3], pos_BT)
    with pytest.raises(ValueError, match=r"positions \(2, 1\) do not match tokens \(1, 2\)"):
        rope_qk(q_BTHN, q_BTHN, pos_BT.T)
    for k_BTHN in (q_BTHN[:, :, :2], q_BTHN.double()):
        with pytest.raises(ValueError, match="not both"):
            rope_qk(q_BTHN, k_BTHN, pos_BT)
    with pytest.raises(ValueError, match="not both"):
        rope_qk(q_BTHN[0], q_BTHN[0], pos_BT[0])
