"""Against code that is not ours: transformers' Mamba-2 mixer and Llama attention, values and gradients."""

import math

import pytest
import torch
from torch import Tensor, nn

from transmamba.config import ModelConfig
from transmamba.kernels.documents import Documents
from transmamba.model.attention import AttentionMixer
from transmamba.model.init import initialise
from transmamba.model.mamba2 import Mamba2Mixer
from transmamba.model.mixer import TransMambaMixer
from transmamba.peers import llama_peer, mamba2_peer, stock_rows

ROWS, TOKENS = 2, 150


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def both(ours: nn.Module, theirs: nn.Module, width: int, transpoint: float) -> dict[str, float]:
    """Errors of the output and of the input's gradient; leaves the weights' gradients on both modules."""
    x = torch.randn(ROWS, TOKENS, width, generator=torch.Generator().manual_seed(1))
    cotangent = torch.randn(ROWS, TOKENS, width, generator=torch.Generator().manual_seed(2))
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y_ours = ours(x_ours.transpose(0, 1), transpoint, Documents.whole(ROWS, TOKENS)).transpose(0, 1)
    y_theirs = theirs(x_theirs)
    y_ours.backward(cotangent)
    y_theirs.backward(cotangent)
    assert x_ours.grad is not None and x_theirs.grad is not None
    return {"output": relative(y_ours, y_theirs), "input": relative(x_ours.grad, x_theirs.grad)}


def grad(module: nn.Module, name: str) -> Tensor:
    gradient = module.get_parameter(name).grad
    assert gradient is not None, name
    return gradient


@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_layer_equals_transformers(groups: int) -> None:
    config = ModelConfig(d_model=32, ssm_head_dim=16, ssm_state=24, ssm_groups=groups, n_layers=1)
    mixer = Mamba2Mixer(config)
    initialise(mixer, config, seed=1, prefix="layers.0.mixer.")
    peer = mamba2_peer(mixer, config)
    errors = both(mixer, peer, 32, 0)
    sizes = [64, 64 + 2 * groups * 24, 4]
    z, xbc, dt = grad(peer, "in_proj.weight").split(sizes)
    theirs = {
        "z.weight": z,
        "xbc.weight": xbc,  # rows as published; compared in that order
        "dt.weight": dt,
        "conv.weight": grad(peer, "conv1d.weight")[:, 0],
        "conv.bias": grad(peer, "conv1d.bias"),
        "dt_bias.offset": grad(peer, "dt_bias"),
        "A_log.offset": grad(peer, "A_log"),
        "D.offset": grad(peer, "D"),
        "mixer_norm.weight": grad(peer, "norm.weight").view(groups, -1),
        "out.weight": grad(peer, "out_proj.weight"),
    }
    for name, _ in mixer.named_parameters():
        ours = grad(mixer, name)
        if name.startswith(("xbc", "conv")):
            ours = stock_rows(ours, mixer)
        errors[name] = relative(ours, theirs[name])
    assert max(errors.values()) < 1e-4, errors


def _identity_conv(mixer: TransMambaMixer) -> None:
    with torch.no_grad():
        mixer.conv.weight.zero_()
        mixer.conv.weight[:, -1] = 1
        mixer.conv.bias.zero_()


@pytest.mark.parametrize("kind", ["transmamba", "transformer"])
def test_attention_equals_llama(kind: str) -> None:
    config = ModelConfig(d_model=48, n_heads=4, conv_activation="none", mixer_norm="none", n_layers=1)
    mixer = TransMambaMixer(config) if kind == "transmamba" else AttentionMixer(config)
    initialise(mixer, config, seed=1, prefix="layers.0.mixer.")
    if isinstance(mixer, TransMambaMixer):
        _identity_conv(mixer)
    peer = llama_peer(mixer.qkv.weight, mixer.out.weight, config)
    errors = both(mixer, peer, 48, math.inf)
    by_head = grad(mixer, "qkv.weight").unflatten(0, (4, 3, 12))
    for index, name in enumerate("qkv"):
        theirs = grad(peer, f"attention.{name}_proj.weight")
        errors[name] = relative(by_head[:, index].flatten(0, 1), theirs)
    errors["out"] = relative(grad(mixer, "out.weight"), grad(peer, "attention.o_proj.weight"))
    assert max(errors.values()) < 1e-5, errors
