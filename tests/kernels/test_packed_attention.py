"""torch's packed attention: its kernel needs a GPU; here is everything around it, with a loop in the kernel's place."""

import inspect
import math
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.varlen import varlen_attn

from transmamba.kernels.attention import attention, packed, prefix_attention
from transmamba.kernels.attention.reference import attention_loop
from transmamba.kernels.backend import runs_varlen
from transmamba.kernels.documents import Documents, PackedPlan
from transmamba.kernels.testing import assert_close, assert_matches_reference

N_TOKENS = 37
PACKED = [[0, 1, 3, 20], [0, 2]]
KEYS = ("q_BTHN", "k_BTHN", "v_BTHV")


def in_a_loop(*args: Any, **options: Any) -> Tensor:
    """What `varlen_attn` is documented to do, one document at a time; called as the installed torch can be called."""
    call = inspect.signature(varlen_attn).bind(*args, **options)
    call.apply_defaults()
    found = call.arguments
    assert found["window_size"] == (-1, 0) and found["return_aux"] is None
    assert found["cu_seq_q"] is found["cu_seq_k"] and found["cu_seq_q"].dtype == torch.int32
    edges = found["cu_seq_q"].tolist()
    assert found["max_q"] == found["max_k"] == max(end - first for first, end in pairwise(edges))
    parts = []
    for first, end in pairwise(edges):
        q, k, v = (found[name][first:end].transpose(0, 1) for name in ("query", "key", "value"))
        weights = (q @ k.mT * found["scale"]).masked_fill(
            torch.ones(end - first, end - first).triu(1).bool(), -math.inf
        )
        parts.append((weights.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture
def packed_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "runs_varlen", lambda q, v: True)
    monkeypatch.setattr(packed, "varlen_attn", in_a_loop)


def streams(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    return {name: torch.randn(2, N_TOKENS, 3, 8).to(dtype) for name in KEYS}


@pytest.mark.usefixtures("packed_path")
@pytest.mark.parametrize("prefix", [1, 5, 16, 17, N_TOKENS - 1, N_TOKENS, N_TOKENS + 7, math.inf])
def test_packed_documents_match_the_token_loop(prefix: int | float) -> None:
    documents = Documents.from_starts(PACKED, N_TOKENS)
    op, reference = (
        partial(function, documents=documents, prefix=prefix) for function in (prefix_attention, attention_loop)
    )
    assert_matches_reference(op, reference, streams())


@pytest.mark.parametrize("prefix", [4, math.inf])
@pytest.mark.parametrize("theta", [None, 10_000.0])
def test_padded_and_packed_agree_rotated_or_not(
    prefix: float, theta: float | None, request: pytest.FixtureRequest
) -> None:
    documents, inputs = Documents.from_starts(PACKED, N_TOKENS), streams()
    inputs = {name: stream.transpose(0, 1).contiguous().transpose(0, 1) for name, stream in inputs.items()}
    padded = prefix_attention(**inputs, documents=documents, prefix=prefix, rope_theta=theta, scale=0.3)
    request.getfixturevalue("packed_path")
    assert_close(prefix_attention(**inputs, documents=documents, prefix=prefix, rope_theta=theta, scale=0.3), padded)


@pytest.mark.usefixtures("packed_path")
def test_nothing_attends_before_token_zero() -> None:
    inputs = {name: stream.requires_grad_() for name, stream in streams().items()}
    y_BTHV = prefix_attention(**inputs, documents=Documents.from_starts(PACKED, N_TOKENS), prefix=0)
    assert y_BTHV.shape == inputs["v_BTHV"].shape and not y_BTHV.any()
    assert not torch.autograd.grad(y_BTHV.sum(), inputs["v_BTHV"])[0].any()


@pytest.mark.parametrize("prefix", [5, math.inf])
def test_torch_takes_the_call_and_its_backward(prefix: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # Meta tensors go through torch's own operator: its arguments, its outputs' shapes and its gradients, no kernel.
    monkeypatch.setattr(attention, "runs_varlen", lambda q, v: True)
    documents = Documents.from_starts(PACKED, N_TOKENS)
    plan = documents.packed(prefix)
    tokens = None if plan.tokens is None else plan.tokens.to("meta")
    moved = PackedPlan(tokens, plan.pos.to("meta"), plan.edges.to("meta"), plan.longest)
    monkeypatch.setattr(documents, "packed", lambda P: moved)
    inputs = {name: stream.to("meta", torch.bfloat16).requires_grad_() for name, stream in streams().items()}
    y_BTHV = prefix_attention(**inputs, documents=documents, prefix=prefix)
    assert (y_BTHV.shape, y_BTHV.dtype) == (inputs["v_BTHV"].shape, torch.bfloat16)
    for grad in torch.autograd.grad(y_BTHV, list(inputs.values()), torch.empty_like(y_BTHV)):
        assert grad.shape == y_BTHV.shape


@pytest.mark.parametrize(
    ("dtype", "widths", "device", "expected"),
    [
        (torch.bfloat16, (64, 64), "cuda", True),
        (torch.float16, (256, 256), "cuda", True),
        (torch.float32, (64, 64), "cuda", False),
        (torch.bfloat16, (64, 128), "cuda", False),
        (torch.bfloat16, (20, 20), "cuda", False),
        (torch.bfloat16, (264, 264), "cuda", False),
        (torch.bfloat16, (64, 64), "cpu", False),
    ],
)
def test_device_and_type_decide(dtype: torch.dtype, widths: tuple[int, int], device: str, expected: bool) -> None:
    with FakeTensorMode():
        q, v = (torch.empty(1, 2, 3, width, dtype=dtype, device=device) for width in widths)
        assert runs_varlen(q, v) is expected
