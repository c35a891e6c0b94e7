"""Names, shapes and sizes on both sides: weights and configuration in training and in a class of transformers."""
# D model width, F feed-forward width, H heads, N key/state width, C conv channels.

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LlamaConfig, Mamba2Config
from transformers.configuration_utils import PreTrainedConfig

from transmamba.checkpoints_tools.hf_model.configuration_transmamba import TransMambaConfig
from transmamba.config import Config, ModelConfig, head_width
from transmamba.model.mamba2 import Mamba2Mixer
from transmamba.model.model import Model
from transmamba.peers import stock_rows
from transmamba.transpoint import layer_kinds

# Keys of our configuration under the names that transformers gives them; the others keep theirs.
HF_NAMES = {
    "n_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "d_ff": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
    "init_std": "initializer_range",
}
NOT_EXPORTED = ("kind", "pattern", "vocab_size")  # layer_kinds says more; rows that no token has are left out
FLOAT32 = (".A_log", ".dt_bias", ".D")  # a decay rate in bf16 would move in steps of 0.4 %
Family = Literal["transmamba", "llama", "mamba2"]
ARCHITECTURES: dict[Family, str] = {
    "transmamba": "TransMambaForCausalLM",
    "llama": "LlamaForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
}


# Where transformers finds the classes of an exported folder: in the files of `CODE` beside it.
CODE = ("configuration_transmamba.py", "mixing_transmamba.py", "modeling_transmamba.py")
AUTO_MAP = {
    "AutoConfig": "configuration_transmamba.TransMambaConfig",
    "AutoModel": "modeling_transmamba.TransMambaModel",
    "AutoModelForCausalLM": "modeling_transmamba.TransMambaForCausalLM",
}


def family_of(model: ModelConfig) -> Family:
    """The class of transformers that computes exactly what the model does; its own where there is none."""
    kinds = set(layer_kinds(model))
    if kinds == {"transformer"} and model.d_ff > 0 and model.rope != "none":
        return "llama"
    return "mamba2" if kinds == {"mamba2"} and model.d_ff == 0 else "transmamba"


def our_tensors(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Weights under the names that users know: start and offset of a per-head weight are one, a tied head is none."""
    buffers = dict(model.named_buffers())
    for name, parameter in model.named_parameters():
        if name.endswith(".offset"):
            name = name.removesuffix(".offset")
            yield name, buffers[f"{name}.start"] + parameter.detach()
        else:
            yield name, parameter.detach()


def hf_tensors(model: Model, config: ModelConfig, family: Family) -> Iterator[tuple[str, Tensor]]:
    """Weights of the exported class by name."""
    if family == "transmamba":
        yield from ((hf_name(name), tensor) for name, tensor in our_tensors(model))
        return
    ours, is_llama = dict(our_tensors(model)), family == "llama"
    base, embedding, norm = ("model", "embed_tokens", "norm") if is_llama else ("backbone", "embeddings", "norm_f")
    yield f"{base}.{embedding}.weight", ours["embedding.weight"]
    yield f"{base}.{norm}.weight", ours["final_norm.weight"]
    if not config.tied:
        yield "lm_head.weight", ours["head.weight"]
    for index, layer in model.layers.items():
        place = f"layers.{index}."
        own = {name.removeprefix(place): tensor for name, tensor in ours.items() if name.startswith(place)}
        parts = _llama_layer(own, config) if is_llama else _mamba2_layer(own, layer.mixer)
        yield from ((f"{base}.{place}{name}", tensor.clone()) for name, tensor in parts.items())


def hf_name(name: str) -> str:
    """Name of one of our tensors in the exported class."""
    if name == "head.weight":
        return "lm_head.weight"
    return f"model.{name.replace('embedding.', 'embed_tokens.')}"


def _llama_layer(own: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    q, k, v = own["mixer.qkv.weight"].unflatten(0, (config.n_heads, 3, head_width(config))).unbind(1)
    gate_FD, up_FD = own["ffn.gate_up.weight"]
    return {
        "self_attn.q_proj.weight": q.flatten(0, 1),
        "self_attn.k_proj.weight": k.flatten(0, 1),
        "self_attn.v_proj.weight": v.flatten(0, 1),
        "self_attn.o_proj.weight": own["mixer.out.weight"],
        "mlp.gate_proj.weight": gate_FD,
        "mlp.up_proj.weight": up_FD,
        "mlp.down_proj.weight": own["ffn.down.weight"],
        "input_layernorm.weight": own["norm.weight"],
        "post_attention_layernorm.weight": own["ffn_norm.weight"],
    }


def _mamba2_layer(own: dict[str, Tensor], mixer: Any) -> dict[str, Tensor]:
    assert isinstance(mixer, Mamba2Mixer)
    xbc, taps, bias = (stock_rows(own[f"mixer.{name}"], mixer) for name in ("xbc.weight", "conv.weight", "conv.bias"))
    return {
        "norm.weight": own["norm.weight"],
        "mixer.in_proj.weight": torch.cat([own["mixer.z.weight"], xbc, own["mixer.dt.weight"]]),
        "mixer.conv1d.weight": taps[:, None],
        "mixer.conv1d.bias": bias,
        "mixer.dt_bias": own["mixer.dt_bias"],
        "mixer.A_log": own["mixer.A_log"],
        "mixer.D": own["mixer.D"],
        "mixer.norm.weight": own["mixer.mixer_norm.weight"].flatten(),
        "mixer.out_proj.weight": own["mixer.out.weight"],
    }


def hf_config(
    config: Config, family: Family, points: Sequence[int | float], n_known: int, eod_id: int
) -> PreTrainedConfig:
    """The configuration of the exported class."""
    model = config.model
    shared: dict[str, Any] = {
        "vocab_size": n_known,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.n_layers,
        "bos_token_id": None,
        "eos_token_id": eod_id,
        "pad_token_id": eod_id,
        "tie_word_embeddings": model.tied,
        "initializer_range": model.init_std,
        "architectures": [ARCHITECTURES[family]],
    }
    if family == "mamba2":
        return _mamba2_config(model, shared)
    shared |= {
        "intermediate_size": model.d_ff,
        "num_attention_heads": model.n_heads,
        "head_dim": head_width(model),
        "rms_norm_eps": model.norm_eps,
        "max_position_embeddings": config.data.seq_len,
    }
    if family == "llama":
        rotary = {"rope_type": "default", "rope_theta": model.rope_theta}
        return LlamaConfig(num_key_value_heads=model.n_heads, rope_parameters=rotary, **shared)
    left = {key: value for key, value in model.model_dump().items() if key not in (*HF_NAMES, *NOT_EXPORTED)}
    shared |= {**left, "head_dim": head_width(model)}
    shared["auto_map"] = dict(AUTO_MAP)
    finite = [None if point == math.inf else int(point) for point in points]
    return TransMambaConfig(layer_kinds=list(layer_kinds(model)), transpoints=finite, **shared)


def _mamba2_config(model: ModelConfig, shared: dict[str, Any]) -> Mamba2Config:
    return Mamba2Config(
        expand=model.ssm_expand,
        head_dim=model.ssm_head_dim,
        num_heads=model.ssm_expand * model.d_model // model.ssm_head_dim,
        n_groups=model.ssm_groups,
        state_size=model.ssm_state,
        conv_kernel=model.conv_width,
        chunk_size=64,  # transformers' torch path pads to whole chunks and is quadratic in them
        layer_norm_epsilon=model.norm_eps,
        time_step_min=model.dt_min,
        time_step_max=model.dt_max,
        use_bias=False,
        use_conv_bias=True,
        **shared,
    )
