"""Model folders of transformers, read as ours: which family, which configuration, which of our weights.

Only local JSON and safetensors are read; no code of the folder runs and nothing is unpickled.
"""
# D model width, F feed-forward width, H heads, G groups, N key/state width, V value width, C conv channels, K taps.

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from transmamba.checkpoints_tools.hf_format import HF_NAMES, NOT_EXPORTED, Family
from transmamba.checkpoints_tools.hf_model.configuration_transmamba import TransMambaConfig
from transmamba.config import ModelConfig
from transmamba.errors import ConfigError, Problem

# Model types that are Llama's computation in other words, and whether their rotary pairs are neighbours (2i, 2i + 1)
# instead of halves (i, i + N/2).
LLAMA_TYPES = {"llama": False, "mistral": False, "qwen2": False, "ernie4_5": True}
KINDS: dict[Family, tuple[str, ...]] = {
    "llama": ("transmamba", "transformer"),
    "mamba2": ("mamba2", "transmamba"),
    "transmamba": ("transmamba", "transformer", "mamba2", "hybrid"),
}
SWITCHES = ("rope", "rope_theta", "conv_activation", "mixer_norm")  # what no weight forbids to override
Named = Iterator[tuple[str, Tensor]]


@dataclass
class Weights:
    """Tensors of a folder's safetensors files, read one by one; `unread` are those that nobody asked for."""

    files: dict[str, Path]
    unread: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.unread = set(self.files)

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __getitem__(self, name: str) -> Tensor:
        """The tensor in float32.

        Raises:
            ConfigError: the folder has none of that name, or the file is damaged.
        """
        if name not in self.files:
            raise _fault("SRC", "a weight is missing", name, "give a whole folder of a supported model")
        self.unread.discard(name)
        try:
            with safe_open(self.files[name], framework="pt") as file:
                return file.get_tensor(name).float()
        except (OSError, SafetensorError) as error:
            raise _fault("SRC", f"cannot be read ({error})", self.files[name], "copy it again") from error


@dataclass
class Source:
    """A folder that was understood: what it holds, and what its weights are in our model."""

    folder: Path
    family: Family
    described: PreTrainedConfig
    weights: Weights

    def model_section(self) -> dict[str, Any]:
        """Values of our `model` keys that these weights need."""
        match self.family:
            case "llama":
                return _llama_section(self.described)
            case "mamba2":
                return _mamba2_section(self.described)
        return _own_section(self.described)

    def transpoints(self) -> list[int | float]:
        """TransPoints at which our model computes what the source does."""
        c = self.described
        if isinstance(c, TransMambaConfig):
            return [math.inf if point is None else point for point in c.transpoints or []]
        return [0 if self.family == "mamba2" else math.inf] * c.num_hidden_layers

    def is_exact(self, model: ModelConfig) -> bool:
        """Whether a model of this configuration computes at those TransPoints what the source does."""
        if self.family != "mamba2":
            wanted = self.model_section()
            switches = SWITCHES if model.kind == "transmamba" else ("rope", "rope_theta")
            return all(getattr(model, key) == wanted[key] for key in switches)
        if model.kind == "mamba2":
            return True
        # The norm's statistics are per group there and per head here.
        one_head_a_group = self.described.n_groups == self.described.num_heads
        return one_head_a_group and model.conv_activation == "silu" and model.mixer_norm == "head"

    def tensors(self, model: ModelConfig) -> Named:
        """Our weights by their usual names; vocabularies have the source's rows.

        Raises:
            ConfigError: weights are missing, or there are some that the kind of layer has no place for.
        """
        if self.family == "transmamba":
            names = [name for name in self.weights.files if name != "lm_head.weight" or not model.tied]
            yield from ((_own_name(name), self.weights[name]) for name in names)
        else:
            yield from self._foreign(model)
        left = {name for name in self.weights.unread if not name.endswith("rotary_emb.inv_freq")}
        if model.tied:
            left -= {"lm_head.weight"}
        if left:
            fix = f"use one of the model types {', '.join([*LLAMA_TYPES, 'mamba2'])} without such weights"
            raise _fault("SRC", f"{len(left)} weights have no place in model.kind={model.kind}", min(left), fix)

    def _foreign(self, model: ModelConfig) -> Named:
        get, is_llama = self.weights, self.family == "llama"
        base, embedding, norm = ("model", "embed_tokens", "norm") if is_llama else ("backbone", "embeddings", "norm_f")
        yield "embedding.weight", get[f"{base}.{embedding}.weight"]
        yield "final_norm.weight", get[f"{base}.{norm}.weight"]
        if not model.tied:
            yield "head.weight", get["lm_head.weight"]
        for index in range(model.n_layers):
            place = f"{base}.layers.{index}"
            if is_llama:
                parts = _llama_layer(get, place, self.described, model)
            elif model.kind == "mamba2":
                parts = _mamba2_layer(get, f"{place}.mixer", self.described)
            else:
                parts = _mamba2_as_transmamba(get, f"{place}.mixer", self.described)
            if not is_llama:
                yield f"layers.{index}.norm.weight", get[f"{place}.norm.weight"]
            yield from ((f"layers.{index}.{name}", tensor) for name, tensor in parts.items())


def open_source(folder: Path) -> Source:
    """Look at a folder without reading its weights.

    Raises:
        ConfigError: it is not there, not of a supported family, or computes something that our layers do not.
    """
    fix = "give a local folder with config.json and safetensors files"
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        model_type = raw["model_type"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _fault("SRC", f"no readable config.json in it ({error})", folder, fix) from error
    supported = (*LLAMA_TYPES, "mamba2", "transmamba")
    if model_type not in supported:
        raise _fault("SRC", "a model type that cannot be imported", model_type, f"use one of {', '.join(supported)}")
    try:
        if model_type == "transmamba":
            described: Any = TransMambaConfig.from_pretrained(folder, local_files_only=True)
        else:
            described = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and its validators raise many classes
        raise _fault("SRC", f"its config.json is not valid ({error})", folder, fix) from error
    family: Family = "llama" if model_type in LLAMA_TYPES else model_type
    for what, value, wanted in _foreign_features(described, family):
        if value != wanted:
            raise _fault("SRC", f"{what} is not what our layers compute", value, f"use a model with {wanted}")
    return Source(folder, family, described, Weights(_weight_files(folder)))


def _foreign_features(described: Any, family: Family) -> Iterator[tuple[str, object, object]]:
    """What a configuration may say that our layers cannot do: name, value, the value that they can."""
    if family == "llama":
        rotary = described.rope_parameters or {}
        yield "hidden_act", described.hidden_act, "silu"
        yield "rope_type", rotary.get("rope_type", "default"), "default"
        yield "partial_rotary_factor", rotary.get("partial_rotary_factor") or 1.0, 1.0
        yield "sliding_window", getattr(described, "sliding_window", None), None
    elif family == "mamba2":
        yield "hidden_act", described.hidden_act, "silu"
        yield "use_bias", described.use_bias, False
        yield "use_conv_bias", described.use_conv_bias, True
        yield "time_step_limit", [float(limit) for limit in described.time_step_limit], [0.0, math.inf]


def _weight_files(folder: Path) -> dict[str, Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    fix = "save the model with save_pretrained, which writes safetensors"
    try:
        if index.is_file():
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            if any(Path(name).name != name for name in places.values()):
                raise _fault("SRC", "the index names files outside the folder", index, "give a folder that you trust")
            return {name: folder / file for name, file in places.items()}
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise _fault("SRC", f"no readable safetensors ({error})", folder, fix) from error


def _llama_section(described: Any) -> dict[str, Any]:
    """Without an activation after the convolution and a norm of the heads, attention is Llama's own."""
    return {
        "kind": "transmamba",
        "n_layers": described.num_hidden_layers,
        "d_model": described.hidden_size,
        "n_heads": described.num_attention_heads,
        "head_dim": getattr(described, "head_dim", None) or described.hidden_size // described.num_attention_heads,
        "d_ff": described.intermediate_size,
        "vocab_size": described.vocab_size,
        "tied": bool(described.tie_word_embeddings),
        "rope": "attention",
        "rope_theta": float(described.rope_parameters["rope_theta"]),
        "norm_eps": described.rms_norm_eps,
        "conv_activation": "none",
        "mixer_norm": "none",
    }


def _mamba2_section(described: Any) -> dict[str, Any]:
    return {
        "kind": "mamba2",
        "n_layers": described.num_hidden_layers,
        "d_model": described.hidden_size,
        "n_heads": described.num_heads,
        "head_dim": described.head_dim,
        "d_ff": 0,
        "vocab_size": described.vocab_size,
        "tied": bool(described.tie_word_embeddings),
        "conv_width": described.conv_kernel,
        "norm_eps": described.layer_norm_epsilon,
        "ssm_expand": described.expand,
        "ssm_head_dim": described.head_dim,
        "ssm_state": described.state_size,
        "ssm_groups": described.n_groups,
    }


def _own_section(described: Any) -> dict[str, Any]:
    section = {
        key: getattr(described, HF_NAMES.get(key, key)) for key in ModelConfig.model_fields if key not in NOT_EXPORTED
    }
    kinds = described.layer_kinds
    pattern = "".join("A" if kind == "transformer" else "M" for kind in kinds)
    one = {"kind": kinds[0]} if len(set(kinds)) == 1 else {"kind": "hybrid", "pattern": pattern}
    return section | one | {"vocab_size": described.vocab_size}


def _own_name(name: str) -> str:
    """Inverse of `hf_name`."""
    if name == "lm_head.weight":
        return "head.weight"
    return name.removeprefix("model.").replace("embed_tokens.", "embedding.")


def _llama_layer(get: Weights, place: str, described: Any, model: ModelConfig) -> dict[str, Tensor]:
    heads, width = model.n_heads, model.head_dim or model.d_model // model.n_heads
    are_neighbours = LLAMA_TYPES[described.model_type]

    def rows(stream: str, leaf: str) -> Tensor:
        """[H, N, ...]: keys and values once per query head, rotary pairs as halves."""
        part = get[f"{place}.self_attn.{stream}_proj.{leaf}"].unflatten(0, (-1, width))
        if are_neighbours and stream != "v":
            part = part.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
        return part.repeat_interleave(heads // part.shape[0], dim=0)

    def grouped(leaf: str) -> Tensor:
        return torch.stack([rows(stream, leaf) for stream in "qkv"], dim=1).flatten(0, 2)

    parts = {
        "norm.weight": get[f"{place}.input_layernorm.weight"],
        "ffn_norm.weight": get[f"{place}.post_attention_layernorm.weight"],
        "mixer.qkv.weight": grouped("weight"),
        "mixer.out.weight": get[f"{place}.self_attn.o_proj.weight"],
        "ffn.gate_up.weight": torch.stack([get[f"{place}.mlp.{name}_proj.weight"] for name in ("gate", "up")]),
        "ffn.down.weight": get[f"{place}.mlp.down_proj.weight"],
    }
    if model.kind == "transmamba":
        channels = heads * 3 * width
        taps_CK = torch.zeros(channels, model.conv_width)
        taps_CK[:, -1] = 1  # the token itself: the convolution changes nothing but adds the bias
        has_bias = f"{place}.self_attn.q_proj.bias" in get
        parts["mixer.conv.weight"] = taps_CK
        parts["mixer.conv.bias"] = grouped("bias") if has_bias else torch.zeros(channels)
    return parts


def _mamba2_streams(get: Weights, place: str, described: Any) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Weights of a Mamba-2 mixer that need no new order, and its projection, taps and bias as z, x, B, C and dt."""
    groups, state, heads = described.n_groups, described.state_size, described.num_heads
    inner = heads * described.head_dim
    sizes = {"z": inner, "x": inner, "B": groups * state, "C": groups * state, "dt": heads}
    convolved = {name: sizes[name] for name in ("x", "B", "C")}

    def cut(tensor: Tensor, parts: dict[str, int]) -> dict[str, Tensor]:
        return dict(zip(parts, tensor.split(list(parts.values())), strict=True))

    in_proj = cut(get[f"{place}.in_proj.weight"], sizes)
    kept = {
        "z.weight": in_proj["z"],
        "dt.weight": in_proj["dt"],
        "A_log": get[f"{place}.A_log"],
        "dt_bias": get[f"{place}.dt_bias"],
        "D": get[f"{place}.D"],
        "out.weight": get[f"{place}.out_proj.weight"],
    }
    taps, bias = get[f"{place}.conv1d.weight"][:, 0], get[f"{place}.conv1d.bias"]
    return kept, [in_proj, cut(taps, convolved), cut(bias, convolved)]


def _mamba2_layer(get: Weights, place: str, described: Any) -> dict[str, Tensor]:
    """Rows x, B, C of all groups become x, B, C of one group after the other."""
    groups = described.n_groups
    kept, streams = _mamba2_streams(get, place, described)
    names = ("xbc.weight", "conv.weight", "conv.bias")
    parts = kept | {"mixer_norm.weight": get[f"{place}.norm.weight"].view(groups, -1)}
    for name, stream in zip(names, streams, strict=True):
        by_group = [stream[part].unflatten(0, (groups, -1)) for part in ("x", "B", "C")]
        parts[name] = torch.cat(by_group, dim=1).flatten(0, 1)
    return {f"mixer.{name}": tensor for name, tensor in parts.items()}


def _mamba2_as_transmamba(get: Weights, place: str, described: Any) -> dict[str, Tensor]:
    """C, B, x of every head as its q, k, v; groups are copied to their heads."""
    heads, width = described.num_heads, described.head_dim
    kept, streams = _mamba2_streams(get, place, described)
    parts = kept | {"mixer_norm.weight": get[f"{place}.norm.weight"].view(heads, width)}
    for name, stream in zip(("qkv.weight", "conv.weight", "conv.bias"), streams, strict=True):
        by_head = [stream[part].unflatten(0, (-1, width)) for part in ("C", "B", "x")]
        by_head = [part.repeat_interleave(heads // part.shape[0], dim=0) for part in by_head]
        parts[name] = torch.stack(by_head, dim=1).flatten(0, 2)
    return {f"mixer.{name}": tensor for name, tensor in parts.items()}


def _fault(key: str, problem: str, value: object, fix: str) -> ConfigError:
    return ConfigError([Problem(key, problem, value, fix)])
