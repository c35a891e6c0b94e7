# B batch, T tokens, C channels, K conv taps.

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transmamba.kernels.causal_conv import causal_conv, conv, conv_step
from transmamba.kernels.causal_conv.reference import conv_loop
from transmamba.kernels.documents import Documents
from transmamba.kernels.testing import assert_close, assert_matches_reference

PACKED = [[0, 1, 3, 20], [0, 2]]


def streams(
    dtype: torch.dtype = torch.float64, n_tokens: int = 37, n_channels: int = 5, n_taps: int = 4
) -> dict[str, Any]:
    return {
        "x_BTC": torch.randn(2, n_tokens, n_channels).to(dtype),
        "weight_CK": torch.randn(n_channels, n_taps).to(dtype),
        "bias_C": torch.randn(n_channels).to(dtype),
        "tail_BKC": torch.randn(2, n_taps - 1, n_channels).to(dtype),
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
