"""FLOPs of the plan against torch's own counter, on real layers of every kind."""

import math

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from transmamba.compose import load
from transmamba.config import ModelConfig
from transmamba.costs import layer_flops, logit_flops, whole_windows
from transmamba.kernels.documents import Documents
from transmamba.model.layer import Layer
from transmamba.plan import make_plan
from transmamba.transpoint import LayerKind

# Chunks of the scan on a CPU are those of the convention, 64 tokens, from this head width on.
SIZES = {"n_layers": 1, "d_model": 256, "n_heads": 4, "d_ff": 704, "ssm_head_dim": 64, "ssm_state": 64, "ssm_groups": 2}
SEQ_LEN = 256
KINDS: list[tuple[LayerKind, float]] = [
    ("transmamba", 0),
    ("transmamba", 128),
    ("transmamba", math.inf),
    ("transformer", math.inf),
    ("mamba2", 0),
]


def counted(kind: LayerKind, point: float) -> tuple[int, int]:
    """Forward and backward FLOPs of one window in one layer; torch's plain attention computes the whole square."""
    layer = Layer(ModelConfig.model_validate(SIZES), kind, recompute_mixing=False)
    for tensor in (*layer.parameters(), *layer.buffers()):
        nn.init.normal_(tensor, std=0.1)
    x_TBD = torch.randn(SEQ_LEN, 1, 256).requires_grad_() * 1
    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH):
        with forward:
            y_TBD = layer(x_TBD, point, Documents.whole(1, SEQ_LEN))
        with backward:
            y_TBD.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def left_out(kind: LayerKind, point: float) -> float:
    """The half of the square that the causal convention does not count, and the diagonal once."""
    tokens = 0 if kind == "mamba2" else min(point, SEQ_LEN)
    return 4 * 256 * tokens * (tokens - 1) / 2


@pytest.mark.parametrize(("kind", "point"), KINDS)
def test_flops_of_a_layer_are_those_that_torch_counts(kind: LayerKind, point: float) -> None:
    model = ModelConfig.model_validate(SIZES)
    planned = layer_flops(model, kind, point, whole_windows(SEQ_LEN)) * SEQ_LEN + left_out(kind, point)
    forward, backward = counted(kind, point)
    assert planned == pytest.approx(forward, rel=0.01)
    assert 2 * planned == pytest.approx(backward, rel=0.01)


@pytest.mark.parametrize("kind", ["transmamba", "transformer", "mamba2"])
def test_the_whole_square_adds_the_other_half_of_attention(kind: str) -> None:
    sizes = [f"model.{name}={value}" for name, value in SIZES.items() if name != "n_layers"]
    plan = make_plan(
        load(["model=tiny", f"model.kind={kind}", *sizes, "model.head_dim=64", "transpoint.points=[0,128,inf]"])
    )
    halves = 3 * sum(left_out(layer.kind, math.inf if layer.point is None else layer.point) for layer in plan.layers)
    more = plan.training_flops_per_token_full_attention - plan.training_flops_per_token
    assert more == pytest.approx(halves / SEQ_LEN)
    assert (more > 0) == (kind != "mamba2")


def test_a_transformers_flops_are_six_per_weight_and_six_or_twelve_times_width_and_window() -> None:
    config = load(["model=small_transformer", "data.seq_len=2048", "model.vocab_size=32000"])
    plan, d, layers = make_plan(config), config.model.d_model, config.model.n_layers
    weights = layers * (4 * d * d + 3 * d * config.model.d_ff) + logit_flops(config.model, plan.vocab_rows) // 2
    assert plan.training_flops_per_token == pytest.approx(6 * weights + 6 * layers * d * 2049)
    assert plan.training_flops_per_token_full_attention == pytest.approx(6 * weights + 12 * layers * d * 2048)
