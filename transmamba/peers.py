"""transformers' mixers with our weights: independent, for parity tests and benchmarks (extra `peers`)."""
# I inner width, D model width.

from typing import Any

import torch
from torch import Tensor, nn

from transmamba.config import ModelConfig
from transmamba.model.mamba2 import Mamba2Mixer


def mamba2_peer(mixer: Mamba2Mixer, config: ModelConfig, chunk_size: int = 64) -> nn.Module:
    """transformers' Mamba-2 mixer (plain torch path) that computes what `mixer` does; [B, T, D] to [B, T, D]."""
    from transformers import Mamba2Config
    from transformers.models.mamba2 import modeling_mamba2

    inner = config.ssm_expand * config.d_model
    settings: Any = Mamba2Config(
        hidden_size=config.d_model,
        expand=config.ssm_expand,
        head_dim=config.ssm_head_dim,
        num_heads=inner // config.ssm_head_dim,
        n_groups=config.ssm_groups,
        state_size=config.ssm_state,
        conv_kernel=config.conv_width,
        chunk_size=chunk_size,
        layer_norm_epsilon=config.norm_eps,
        num_hidden_layers=1,
        use_bias=False,
        use_conv_bias=True,
    )
    peer = modeling_mamba2.Mamba2Mixer(settings, layer_idx=0)
    weights = {
        "in_proj.weight": torch.cat([mixer.z.weight, stock_rows(mixer.xbc.weight, mixer), mixer.dt.weight]),
        "conv1d.weight": stock_rows(mixer.conv.weight, mixer)[:, None],
        "conv1d.bias": stock_rows(mixer.conv.bias, mixer),
        "dt_bias": mixer.dt_bias(),
        "A_log": mixer.A_log(),
        "D": mixer.D(),
        "norm.weight": mixer.mixer_norm.weight.flatten(),
        "out_proj.weight": mixer.out.weight,
    }
    peer.load_state_dict({name: weight.detach().clone() for name, weight in weights.items()})
    return peer


def stock_rows(weight: Tensor, mixer: Mamba2Mixer) -> Tensor:
    """Rows x, B, C of all groups, as published, from ours, which are grouped (see `Mamba2Mixer`)."""
    sizes = [mixer.group_inner, mixer.state, mixer.state]
    return torch.cat([part.flatten(0, 1) for part in weight.unflatten(0, (mixer.n_groups_local, -1)).split(sizes, 1)])


def llama_peer(qkv_weight: Tensor, out_weight: Tensor, config: ModelConfig) -> nn.Module:
    """transformers' Llama attention (sdpa) from a projection whose rows are grouped by head as q, k, v."""
    from transformers import LlamaConfig
    from transformers.models.llama import modeling_llama

    width = config.head_dim or config.d_model // config.n_heads
    settings: Any = LlamaConfig(
        hidden_size=config.d_model,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_heads,
        head_dim=width,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        num_hidden_layers=1,
    )
    settings._attn_implementation = "sdpa"
    attention = modeling_llama.LlamaAttention(settings, layer_idx=0)
    q, k, v = qkv_weight.detach().unflatten(0, (config.n_heads, 3, width)).unbind(1)
    attention.load_state_dict(
        {
            "q_proj.weight": q.flatten(0, 1),
            "k_proj.weight": k.flatten(0, 1),
            "v_proj.weight": v.flatten(0, 1),
            "o_proj.weight": out_weight.detach(),
        }
    )
    return _WithPositions(attention, modeling_llama.LlamaRotaryEmbedding(settings))


class _WithPositions(nn.Module):
    """Llama's attention gets its rotary tables from the model around it; this is that model, of one layer."""

    def __init__(self, attention: nn.Module, rotary: nn.Module):
        super().__init__()
        self.attention, self.rotary = attention, rotary

    def forward(self, x_BTD: Tensor) -> Tensor:
        positions = torch.arange(x_BTD.shape[1])[None]
        return self.attention(x_BTD, self.rotary(x_BTD, positions), None)[0]
