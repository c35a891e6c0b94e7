"""Decoding equals the forward pass, across every TransPoint, wherever the prompt ends."""

import math

import pytest
import torch

from transmamba.config import ModelConfig
from transmamba.kernels.documents import Documents
from transmamba.model.decode import prefill, step
from transmamba.model.model import Model

TOKENS = 30
SMALL = {
    "n_layers": 3,
    "d_model": 16,
    "n_heads": 2,
    "d_ff": 24,
    "ssm_head_dim": 8,
    "ssm_state": 6,
    "ssm_groups": 2,
}


def build(kind: str, **options: object) -> Model:
    config = ModelConfig.model_validate({**SMALL, **options})
    kinds = ["transformer", "mamba2", "transformer"] if kind == "hybrid" else [kind] * 3
    model = Model(config, kinds, n_tokens_known=50, n_rows=128, seed=1).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return model


@pytest.mark.parametrize("prompt", [1, 2, 3, 8, 9, 10, 29])
@pytest.mark.parametrize(
    ("kind", "points"),
    [
        ("transmamba", [0, 9, math.inf]),
        ("transmamba", [1, 2, 29]),
        ("transformer", [math.inf] * 3),
        ("mamba2", [0] * 3),
        ("hybrid", [math.inf, 0, math.inf]),
    ],
)
def test_decoding_equals_the_forward_pass(kind: str, points: list[float], prompt: int) -> None:
    model = build(kind)
    ids = torch.randint(0, 50, (2, TOKENS), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model.predict(ids, points, Documents.whole(2, TOKENS))
    logits, state = prefill(model, ids[:, :prompt], points)
    torch.testing.assert_close(logits, expected[prompt - 1], atol=1e-10, rtol=0)
    for t in range(prompt, TOKENS):
        torch.testing.assert_close(step(model, ids[:, t], state), expected[t], atol=1e-10, rtol=0)


@pytest.mark.parametrize("rope", ["both", "none"])
def test_decoding_equals_the_forward_pass_with_other_rotations(rope: str) -> None:
    model, points = build("transmamba", rope=rope), [0, 9, math.inf]
    ids = torch.randint(0, 50, (1, TOKENS), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model.predict(ids, points, Documents.whole(1, TOKENS))
    _, state = prefill(model, ids[:, :4], points)
    for t in range(4, TOKENS):
        torch.testing.assert_close(step(model, ids[:, t], state), expected[t], atol=1e-10, rtol=0)


def test_keys_and_values_are_dropped_at_the_transpoint() -> None:
    model = build("transmamba")
    ids = torch.randint(0, 50, (1, TOKENS))
    _, state = prefill(model, ids[:, :7], [0, 9, math.inf])
    held = []
    for t in range(7, 12):
        step(model, ids[:, t], state)
        held.append([None if cache.k_BTHN is None else cache.k_BTHN.shape[1] for cache in state.layers])
    assert held == [[None, 8, 8], [None, None, 9], [None, None, 10], [None, None, 11], [None, None, 12]]
