# B batch, T tokens, C channels, K conv taps.

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from transmamba.kernels import backend
from transmamba.kernels.causal_conv import causal_conv, conv, conv_step, triton_conv
from transmamba.kernels.causal_conv.reference import conv_loop
from transmamba.kernels.documents import Documents
from transmamba.kernels.testing import assert_close, assert_matches_reference

PACKED = [[0, 1, 3, 20], [0, 2]]


def streams(
    dtype: torch.dtype = torch.float64, n_tokens: int = 37, n_channels: int = 5, n_taps: int = 4, n_rows: int = 2
) -> dict[str, Any]:
    return {
        "x_BTC": torch.randn(n_rows, n_tokens, n_channels).to(dtype),
        "weight_CK": torch.randn(n_channels, n_taps).to(dtype),
        "bias_C": torch.randn(n_channels).to(dtype),
        "tail_BKC": torch.randn(n_rows, n_taps - 1, n_channels).to(dtype),
    }


@pytest.mark.parametrize("slab_elements", [1 << 17, 40, 1])
@pytest.mark.parametrize("starts", [None, PACKED], ids=["restarted", "packed"])
@pytest.mark.parametrize("activation", ["silu", "none"])
def test_conv_matches_the_token_loop_whatever_the_slab(
    monkeypatch: pytest.MonkeyPatch, slab_elements: int, starts: list[list[int]] | None, activation: str
) -> None:
    monkeypatch.setattr(conv, "SLAB_ELEMENTS", slab_elements)
    documents = None if starts is None else Documents.from_starts(starts, 37)
    op, reference = (
        partial(function, documents=documents, activation=activation) for function in (causal_conv, conv_loop)
    )
    assert_matches_reference(op, reference, streams())


@settings(derandomize=True, max_examples=15, deadline=None)
@given(st.integers(0, 20), st.integers(1, 6), st.integers(1, 5), st.sets(st.integers(1, 19), max_size=5))
def test_conv_matches_the_token_loop_at_any_size(n_tokens: int, n_channels: int, n_taps: int, starts: set[int]) -> None:
    row = sorted({0} | {start for start in starts if start < n_tokens})
    documents = Documents.from_starts([row, [0]], n_tokens)
    op, reference = (partial(function, documents=documents) for function in (causal_conv, conv_loop))
    assert_matches_reference(op, reference, streams(torch.float64, n_tokens, n_channels, n_taps))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_conv_keeps_precision_and_dtype(dtype: torch.dtype) -> None:
    found = assert_matches_reference(causal_conv, conv_loop, streams(dtype))
    assert {value.dtype for value in found.values()} == {dtype}


def test_conv_equals_torch_conv1d_with_left_padding() -> None:
    inputs = streams()
    layer = torch.nn.Conv1d(5, 5, 4, groups=5, padding=3, dtype=torch.float64)
    layer.weight.data, layer.bias.data = inputs["weight_CK"][:, None], inputs["bias_C"]  # pyright: ignore[reportOptionalMemberAccess]
    expected = layer(inputs["x_BTC"].transpose(1, 2))[..., :37].transpose(1, 2)
    found = causal_conv(inputs["x_BTC"], inputs["weight_CK"], inputs["bias_C"], activation="none")
    assert_close(found, expected.detach())


def test_sequence_first_memory_gives_the_same_and_keeps_its_order() -> None:
    def turned(x_BTC: Tensor, **weights: Any) -> Tensor:
        return causal_conv(x_BTC.transpose(0, 1).contiguous().transpose(0, 1), **weights)

    assert_matches_reference(turned, conv_loop, streams())
    x_TBC = torch.randn(37, 2, 5)
    assert causal_conv(x_TBC.transpose(0, 1), torch.ones(5, 4), torch.ones(5)).transpose(0, 1).is_contiguous()


def test_a_column_slice_of_a_wider_stream_gives_the_same() -> None:
    def sliced(x_BTC: Tensor, **weights: Any) -> Tensor:
        return causal_conv(torch.cat([x_BTC, x_BTC], -1)[..., 5:], **weights)

    assert_matches_reference(sliced, conv_loop, streams())


def test_packed_documents_are_bitwise_what_they_are_alone() -> None:
    inputs = streams(torch.float32)
    del inputs["tail_BKC"]
    x_BTC = inputs.pop("x_BTC")
    packed = causal_conv(x_BTC, **inputs, documents=Documents.from_starts([[0, 20], [0, 20]], 37))
    for part in (slice(0, 20), slice(20, 37)):
        assert torch.equal(packed[:, part], causal_conv(x_BTC[:, part], **inputs))


def test_steps_equal_the_whole_row() -> None:
    inputs = streams()
    expected = causal_conv(**inputs)
    tail_BKC, x_BTC = inputs.pop("tail_BKC"), inputs.pop("x_BTC")
    for t in range(37):
        y_BC, tail_BKC = conv_step(tail_BKC, x_BTC[:, t], **inputs)
        assert_close(y_BC, expected[:, t], name=f"token {t}")
    assert torch.equal(tail_BKC, x_BTC[:, -3:])


def test_two_runs_are_bitwise_equal() -> None:
    inputs, documents = streams(torch.float32), Documents.from_starts(PACKED, 37)
    assert torch.equal(causal_conv(**inputs, documents=documents), causal_conv(**inputs, documents=documents))


def test_bad_arguments_are_refused() -> None:
    x, weight, bias = torch.ones(2, 5, 3), torch.ones(3, 4), torch.ones(3)
    with pytest.raises(ValueError, match='"silu" or "none", got \'relu\''):
        causal_conv(x, weight, bias, activation="relu")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="does not match 3 channels"):
        causal_conv(x, torch.ones(2, 4), bias)
    with pytest.raises(ValueError, match="bias"):
        causal_conv(x, weight, torch.ones(2))
    with pytest.raises(ValueError, match="tail"):
        causal_conv(x, weight, bias, tail_BKC=torch.ones(2, 4, 3))
    with pytest.raises(ValueError, match="documents of 1 rows"):
        causal_conv(x, weight, bias, documents=Documents.whole(1, 5))


# The interpreter truncates when it rounds to bfloat16: twice the error of rounding to the nearest.
TRITON_LIMIT = {torch.float32: 1e-6, torch.bfloat16: 6e-3}


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send every tensor through Triton, in its interpreter without a GPU, and cut rows into small programs."""
    monkeypatch.setattr(backend, "runs_triton", lambda stream: True)
    monkeypatch.setattr(triton_conv, "MIN_TOKENS", 8)
    for name in ("FWD_CHANNELS", "BWD_CHANNELS", "UNALIGNED"):
        monkeypatch.setattr(triton_conv, name, 16)


def short_row(n_tokens: int = 19) -> dict[str, Any]:
    """A row that few programs share, since the interpreter is slow."""
    return streams(torch.float32, n_tokens, n_rows=1)


def gradients(inputs: dict[str, Any], dy_BTC: Tensor, **flags: Any) -> dict[str, Tensor]:
    """Output and gradients of the operation for one cotangent."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    y_BTC = causal_conv(**leaves, **flags)
    grads = torch.autograd.grad(y_BTC, list(leaves.values()), dy_BTC, materialize_grads=True, allow_unused=True)
    return {"y_BTC": y_BTC.detach()} | dict(zip(leaves, grads, strict=True))


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("before", ["tail", "zeros", "documents"])
@pytest.mark.parametrize("activation", ["silu", "none"])
def test_triton_conv_matches_the_token_loop(triton: None, dtype: torch.dtype, before: str, activation: str) -> None:
    documents = Documents.from_starts([[0, 1, 3, 7], [0, 2]], 11) if before == "documents" else None
    op, reference = (
        partial(function, documents=documents, activation=activation) for function in (causal_conv, conv_loop)
    )
    inputs = streams(dtype, 11)
    if before == "zeros":
        del inputs["tail_BKC"]
    found = assert_matches_reference(op, reference, inputs, TRITON_LIMIT[dtype])
    assert {value.dtype for value in found.values()} == {dtype}


@settings(derandomize=True, max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 11), st.integers(1, 18), st.integers(1, 8), st.sets(st.integers(1, 10), max_size=3), st.booleans()
)
@example(n_tokens=1, n_channels=17, n_taps=8, starts=set(), packed=False)
@example(n_tokens=3, n_channels=32, n_taps=2, starts={2}, packed=True)
@example(n_tokens=2, n_channels=1, n_taps=4, starts={1}, packed=True)
@example(n_tokens=13, n_channels=3, n_taps=1, starts=set(), packed=False)
def test_triton_conv_matches_the_token_loop_at_any_size(
    triton: None, n_tokens: int, n_channels: int, n_taps: int, starts: set[int], packed: bool
) -> None:
    row = sorted({0} | {start for start in starts if start < n_tokens})
    documents = Documents.from_starts([row, [0]], n_tokens) if packed else None
    op, reference = (partial(function, documents=documents) for function in (causal_conv, conv_loop))
    assert_matches_reference(op, reference, streams(torch.float32, n_tokens, n_channels, n_taps), 1e-6)


def test_triton_conv_takes_float32_taps_beside_bfloat16_streams(triton: None) -> None:
    inputs = {name: value.bfloat16() if "B" in name else value for name, value in short_row().items()}
    found = assert_matches_reference(causal_conv, conv_loop, inputs, TRITON_LIMIT[torch.bfloat16])
    assert found["output 0"].dtype == torch.bfloat16
    assert found["gradient of weight_CK"].dtype == found["gradient of bias_C"].dtype == torch.float32


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_triton_documents_are_isolated_bit_for_bit(triton: None) -> None:
    """Other values in document A, infinite ones too, leave the outputs and gradients of document B as they were."""
    documents = Documents.from_starts([[0, 6, 13]], 19)
    inputs, dy_BTC = short_row(), torch.randn(1, 19, 5)
    del inputs["tail_BKC"]
    before = gradients(inputs, dy_BTC, documents=documents)
    for spoiled in (slice(0, 6), slice(13, 19)):
        changed, other_dy_BTC = {**inputs, "x_BTC": inputs["x_BTC"].clone()}, dy_BTC.clone()
        changed["x_BTC"][:, spoiled] = torch.inf
        other_dy_BTC[:, spoiled] += 1
        after = gradients(changed, other_dy_BTC, documents=documents)
        for name in ("y_BTC", "x_BTC"):
            assert torch.equal(before[name][:, 6:13], after[name][:, 6:13])
            assert not torch.equal(before[name][:, spoiled], after[name][:, spoiled])


def test_triton_packed_documents_are_bitwise_what_they_are_alone(triton: None) -> None:
    inputs, dy_BTC = short_row(), torch.randn(1, 19, 5)
    del inputs["tail_BKC"]
    packed = gradients(inputs, dy_BTC, documents=Documents.from_starts([[0, 2, 11]], 19))
    for part in (slice(0, 2), slice(2, 11), slice(11, 19)):
        alone = gradients({**inputs, "x_BTC": inputs["x_BTC"][:, part]}, dy_BTC[:, part])
        assert torch.equal(packed["y_BTC"][:, part], alone["y_BTC"])
        assert torch.equal(packed["x_BTC"][:, part], alone["x_BTC"])


@pytest.mark.parametrize("cut", [1, 8])
def test_triton_row_may_be_split_anywhere(triton: None, cut: int) -> None:
    """The second part gets the first one's last tokens as its tail; gradients flow back through it."""

    def split(x_BTC: Tensor, tail_BKC: Tensor, **weights: Any) -> Tensor:
        first = causal_conv(x_BTC[:, :cut], tail_BKC=tail_BKC, **weights)
        halo_BKC = torch.cat([tail_BKC, x_BTC[:, :cut]], dim=1)[:, -3:]
        return torch.cat([first, causal_conv(x_BTC[:, cut:], tail_BKC=halo_BKC, **weights)], dim=1)

    inputs = short_row(11)
    assert_matches_reference(split, conv_loop, inputs, 1e-6)
    assert torch.equal(split(**inputs), causal_conv(**inputs))


@pytest.mark.parametrize("turned", ["x", "dy", "both"])
def test_triton_memory_order_changes_nothing_and_costs_no_copy(
    triton: None, monkeypatch: pytest.MonkeyPatch, turned: str
) -> None:
    inputs, dy_BTC = streams(torch.float32, 7), torch.randn(2, 7, 5)
    documents = Documents.from_starts([[0, 1, 3], [0, 2]], 7)
    expected = gradients(inputs, dy_BTC, documents=documents)
    views = dict(inputs)
    if turned != "dy":
        views["x_BTC"] = inputs["x_BTC"].transpose(0, 1).contiguous().transpose(0, 1)
    if turned != "x":
        dy_BTC = dy_BTC.transpose(0, 1).contiguous().transpose(0, 1)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "contiguous", refuse_copies)
        found = gradients(views, dy_BTC, documents=documents)
    assert same_bits(found, expected)
    for name in ("y_BTC", "x_BTC"):
        assert found[name].transpose(0, 1).is_contiguous() == (turned != "dy")


def refuse_copies(x: Tensor) -> Tensor:
    assert x.is_contiguous(), "a copy"
    return x


def test_triton_takes_slices_channels_apart_and_expanded_gradients(triton: None) -> None:
    def apart(x_BTC: Tensor, weight_CK: Tensor, **others: Any) -> Tensor:
        wide_BTC = x_BTC.repeat_interleave(2, -1)
        sliced = causal_conv(torch.cat([x_BTC, x_BTC], -1)[..., 5:], weight_CK.T.contiguous().T, **others)
        return sliced + causal_conv(wide_BTC[..., ::2], weight_CK, **others)

    inputs = short_row(7)
    assert_matches_reference(apart, lambda **inputs: 2 * conv_loop(**inputs), inputs, 1e-6)
    ones = torch.ones(()).expand(1, 7, 5)
    assert same_bits(gradients(inputs, ones), gradients(inputs, ones.contiguous()))


def test_triton_reads_positions_of_any_integer_type(triton: None) -> None:
    inputs, pos_BT = short_row(9), Documents.from_starts([[0, 2]], 9).pos_BT
    x_BTC, weight_CK, bias_C = (inputs[name] for name in ("x_BTC", "weight_CK", "bias_C"))
    wide, narrow = (triton_conv.conv_fwd(x_BTC, weight_CK, bias_C, None, pos, "silu") for pos in (pos_BT, pos_BT.int()))
    assert torch.equal(wide, narrow)


def test_triton_steps_are_bitwise_the_whole_row_and_leave_their_tail_alone(triton: None) -> None:
    inputs = streams(torch.float32, n_tokens=9)
    expected = causal_conv(**inputs)
    tail_BKC, x_BTC = inputs.pop("tail_BKC"), inputs.pop("x_BTC")
    for t in range(9):
        before = tail_BKC.clone()
        y_BC, next_BKC = conv_step(tail_BKC, x_BTC[:, t], **inputs)
        assert torch.equal(y_BC, expected[:, t]) and torch.equal(tail_BKC, before)
        tail_BKC = next_BKC
    assert torch.equal(tail_BKC, x_BTC[:, -3:])


@pytest.mark.parametrize("n_taps", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_step_matches_the_token_loop(triton: None, n_taps: int, dtype: torch.dtype) -> None:
    inputs = streams(dtype, 1, 19, n_taps)
    x_BTC, tail_BKC = inputs["x_BTC"], inputs["tail_BKC"]
    exact = {name: value.double() for name, value in inputs.items()}
    y_BC, next_BKC = conv_step(tail_BKC, x_BTC[:, 0], inputs["weight_CK"], inputs["bias_C"])
    assert_close(y_BC, conv_loop(**exact)[:, 0], TRITON_LIMIT[dtype])
    assert torch.equal(next_BKC, torch.cat([tail_BKC, x_BTC], dim=1)[:, 1:])
    with pytest.raises(ValueError, match="tail"):
        conv_step(tail_BKC[:1], x_BTC[:, 0], inputs["weight_CK"], inputs["bias_C"])


def test_triton_step_gives_gradients_when_they_are_wanted(triton: None) -> None:
    def stepped(x_BTC: Tensor, tail_BKC: Tensor, **weights: Any) -> Tensor:
        return conv_step(tail_BKC, x_BTC[:, 0], **weights)[0][:, None]

    assert_matches_reference(stepped, conv_loop, streams(torch.float32, n_tokens=1), 1e-6)


def test_triton_conv_gives_the_same_bits_twice(triton: None) -> None:
    inputs, dy_BTC = short_row(11), torch.randn(1, 11, 5)
    assert same_bits(gradients(inputs, dy_BTC), gradients(inputs, dy_BTC))
