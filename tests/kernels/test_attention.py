import math
from functools import partial
from typing import Any

import pytest
import torch

from transmamba.kernels.attention import prefix_attention
from transmamba.kernels.attention.reference import attention_loop
from transmamba.kernels.documents import Documents
from transmamba.kernels.testing import assert_close, assert_matches_reference

N_TOKENS = 37
PACKED = [[0, 1, 3, 20], [0, 2]]
WHOLE = [[0], [0]]


def streams(dtype: torch.dtype, n_values: int = 4, n_tokens: int = N_TOKENS) -> dict[str, Any]:
    shapes = {"q_BTHN": 4, "k_BTHN": 4, "v_BTHV": n_values}
    return {name: torch.randn(2, n_tokens, 3, width).to(dtype) for name, width in shapes.items()}


@pytest.mark.parametrize("starts", [WHOLE, PACKED], ids=["whole", "packed"])
@pytest.mark.parametrize("prefix", [0, 1, 5, 7.4, 16, 17, N_TOKENS - 1, N_TOKENS, N_TOKENS + 7, math.inf])
def test_prefix_attention_matches_the_token_loop(starts: list[list[int]], prefix: int | float) -> None:
    documents = Documents.from_starts(starts, N_TOKENS)
    op, reference = (
        partial(function, documents=documents, prefix=prefix) for function in (prefix_attention, attention_loop)
    )
    if prefix == 0:
        assert not op(**streams(torch.float64)).any()
    else:
        assert_matches_reference(op, reference, streams(torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_values", [4, 6])
def test_prefix_attention_keeps_precision_and_dtype(dtype: torch.dtype, n_values: int) -> None:
    documents = Documents.from_starts(PACKED, N_TOKENS)
    op, reference = (
        partial(function, documents=documents, prefix=19) for function in (prefix_attention, attention_loop)
    )
    tol = 8e-3 if dtype == torch.bfloat16 else None  # SDPA rounds the softmax weights to bfloat16 as well
    found = assert_matches_reference(op, reference, streams(dtype, n_values), tol)
    assert found["output 0"].dtype == dtype


def test_scale_reaches_the_logits() -> None:
    documents = Documents.whole(2, N_TOKENS)
    inputs = streams(torch.float64)
    wanted = attention_loop(**inputs, documents=documents, prefix=9, scale=0.3)
    assert_close(prefix_attention(**inputs, documents=documents, prefix=9, scale=0.3), wanted)


def test_packed_documents_attend_as_if_alone() -> None:
    inputs = streams(torch.float64)
    packed = prefix_attention(**inputs, documents=Documents.from_starts([[0, 20], [0, 20]], N_TOKENS), prefix=9)
    for part in (slice(0, 20), slice(20, N_TOKENS)):
        alone = {name: stream[:, part] for name, stream in inputs.items()}
        documents = Documents.whole(2, alone["q_BTHN"].shape[1])
        assert_close(packed[:, part][:, :9], prefix_attention(**alone, documents=documents, prefix=9))
        assert not packed[:, part][:, 9:].any()


def test_tokens_of_sequence_first_memory_attend_the_same() -> None:
    inputs = streams(torch.float32)
    turned = {name: stream.transpose(0, 1).contiguous().transpose(0, 1) for name, stream in inputs.items()}
    documents = Documents.from_starts(PACKED, N_TOKENS)
    expected = prefix_attention(**inputs, documents=documents, prefix=17)
    assert_close(prefix_attention(**turned, documents=documents, prefix=17), expected)


def test_two_runs_are_bitwise_equal() -> None:
    inputs, documents = streams(torch.float32), Documents.from_starts(PACKED, N_TOKENS)
    first, second = (prefix_attention(**inputs, documents=documents, prefix=17) for _ in range(2))
    assert torch.equal(first, second)


def test_mismatched_shapes_are_refused() -> None:
    inputs = streams(torch.float32)
    with pytest.raises(ValueError, match="do not match"):
        prefix_attention(inputs["q_BTHN"], inputs["k_BTHN"][:, :-1], inputs["v_BTHV"], Documents.whole(2, N_TOKENS), 3)
    with pytest.raises(ValueError, match="3 rows"):
        prefix_attention(**inputs, documents=Documents.whole(3, N_TOKENS), prefix=3)
