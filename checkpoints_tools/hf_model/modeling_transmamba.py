"""TransMamba language models (arXiv 2503.24067) for transformers: attention before a TransPoint, a scan from it on."""
# B batch, T tokens, D model width, F feed-forward width, H heads, G groups, N key/state width, V value width,
# C conv channels, K conv taps.

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from transmamba.checkpoints_tools.hf_model.configuration_transmamba import TransMambaConfig
from transmamba.checkpoints_tools.hf_model.mixing_transmamba import (
    LayerMemory,
    Layout,
    TransMambaCache,
    attend,
    causal_conv,
    gated_norm,
    make_layout,
    rope,
    scan,
)


class Conv(nn.Module):
    """Depthwise causal convolution."""

    def __init__(self, channels: int, taps: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, taps))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x_BTC: Tensor, layout: Layout, memory: LayerMemory | None) -> Tensor:
        return causal_conv(x_BTC, self.weight, self.bias, layout, memory)


class HeadNorm(nn.Module):
    """Weight [heads or groups, width] of a norm whose statistics are per head or group."""

    def __init__(self, n_heads: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_heads, width))


class GateUp(nn.Module):
    """Gate and up projections in one weight [2, F, D]."""

    def __init__(self, n_in: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, width, n_in))

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BTF, up_BTF = F.linear(x_BTD, self.weight.flatten(0, 1)).chunk(2, dim=-1)
        return F.silu(gate_BTF) * up_BTF


class ScanWeights(nn.Module):
    """The numbers of a scan that belong to its heads; they stay in float32."""

    def __init__(self, n_heads: int, has_skip: bool = True):
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(n_heads))
        self.dt_bias = nn.Parameter(torch.empty(n_heads))
        self.D = nn.Parameter(torch.empty(n_heads)) if has_skip else None

    def steps(self, dt_BTH: Tensor) -> Tensor:
        """Time steps of every token, in the precision of the scan."""
        return F.softplus(dt_BTH.to(torch.promote_types(dt_BTH.dtype, torch.float32)) + self.dt_bias)


class TransMambaMixer(ScanWeights):
    """One set of projections: Q, K, V of attention before the TransPoint, C, B, x of a scan from it on."""

    def __init__(self, config: TransMambaConfig, transpoint: int | None):
        heads, width = config.num_attention_heads, config.head_dim
        super().__init__(heads, config.d_skip)
        self.transpoint, self.width, self.eps = transpoint, width, config.rms_norm_eps
        self.rope, self.rope_theta, self.activation = config.rope, config.rope_theta, config.conv_activation
        self.qkv = nn.Linear(config.hidden_size, heads * 3 * width, bias=False)
        self.z = nn.Linear(config.hidden_size, heads * width, bias=False)
        self.dt = nn.Linear(config.hidden_size, heads, bias=False)
        self.conv = Conv(heads * 3 * width, config.conv_width)
        self.mixer_norm = HeadNorm(heads, width) if config.mixer_norm == "head" else None
        self.out = nn.Linear(heads * width, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, layout: Layout, memory: LayerMemory | None) -> Tensor:
        qkv_BTC = self.conv(self.qkv(x_BTD), layout, memory)
        qkv_BTC = F.silu(qkv_BTC) if self.activation == "silu" else qkv_BTC
        q, k, v = qkv_BTC.unflatten(-1, (-1, 3 * self.width)).chunk(3, dim=-1)
        q_turned, k_turned = (rope(s, layout.pos_BT, self.rope_theta) if self.rope != "none" else s for s in (q, k))
        c, b = (q_turned, k_turned) if self.rope == "both" else (q, k)
        attended = attend(q_turned, k_turned, v, layout, memory, self.transpoint)
        A_H, dt_BTH = -self.A_log.exp(), self.steps(self.dt(x_BTD))
        scanned = scan(c, b, v, dt_BTH, A_H, self.D, layout, memory, self.transpoint)
        past_BT = layout.pos_BT >= (math.inf if self.transpoint is None else self.transpoint)
        y_BTHV = scanned.where(past_BT[..., None, None], attended)
        weight_HV = None if self.mixer_norm is None else self.mixer_norm.weight
        z_BTHV = self.z(x_BTD).unflatten(-1, (-1, self.width))
        return self.out(gated_norm(y_BTHV, weight_HV, z_BTHV, past_BT, self.eps).flatten(-2))


class AttentionMixer(nn.Module):
    """Llama's attention."""

    def __init__(self, config: TransMambaConfig, transpoint: int | None):
        super().__init__()
        self.width, self.rope, self.rope_theta = config.head_dim, config.rope, config.rope_theta
        self.qkv = nn.Linear(config.hidden_size, config.num_attention_heads * 3 * self.width, bias=False)
        self.out = nn.Linear(config.num_attention_heads * self.width, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, layout: Layout, memory: LayerMemory | None) -> Tensor:
        q, k, v = self.qkv(x_BTD).unflatten(-1, (-1, 3 * self.width)).chunk(3, dim=-1)
        if self.rope != "none":
            q, k = (rope(stream, layout.pos_BT, self.rope_theta) for stream in (q, k))
        return self.out(attend(q, k, v, layout, memory, None).flatten(-2))


class Mamba2Mixer(ScanWeights):
    """Mamba-2 (arXiv 2405.21060). Rows of `xbc` are grouped: x of a group's heads, its B, its C, the next group."""

    def __init__(self, config: TransMambaConfig, transpoint: int | None):
        inner, state = config.ssm_expand * config.hidden_size, config.ssm_state
        n_heads = inner // config.ssm_head_dim
        super().__init__(n_heads)
        self.n_groups, self.width, self.eps = config.ssm_groups, config.ssm_head_dim, config.rms_norm_eps
        self.sizes = [inner // self.n_groups, state, state]
        channels = inner + 2 * self.n_groups * state
        self.z = nn.Linear(config.hidden_size, inner, bias=False)
        self.xbc = nn.Linear(config.hidden_size, channels, bias=False)
        self.dt = nn.Linear(config.hidden_size, n_heads, bias=False)
        self.conv = Conv(channels, config.conv_width)
        self.mixer_norm = HeadNorm(self.n_groups, self.sizes[0])
        self.out = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, layout: Layout, memory: LayerMemory | None) -> Tensor:
        xbc_BTC = F.silu(self.conv(self.xbc(x_BTD), layout, memory))
        x, b, c = xbc_BTC.unflatten(-1, (self.n_groups, -1)).split(self.sizes, dim=-1)
        x_BTHV = x.unflatten(-1, (-1, self.width)).flatten(2, 3)
        heads_per_group = x_BTHV.shape[2] // self.n_groups
        b, c = (shared.repeat_interleave(heads_per_group, dim=2) for shared in (b, c))
        y_BTHV = scan(c, b, x_BTHV, self.steps(self.dt(x_BTD)), -self.A_log.exp(), self.D, layout, memory)
        y_BTGI, z_BTGI = (inner.unflatten(-1, (self.n_groups, -1)) for inner in (y_BTHV.flatten(-2), self.z(x_BTD)))
        return self.out(gated_norm(y_BTGI, self.mixer_norm.weight, z_BTGI, None, self.eps).flatten(-2))


MIXERS = {"transmamba": TransMambaMixer, "transformer": AttentionMixer, "mamba2": Mamba2Mixer}


class FeedForward(nn.Module):
    """SwiGLU without biases."""

    def __init__(self, config: TransMambaConfig):
        super().__init__()
        self.gate_up = GateUp(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(self.gate_up(x_BTD))


class TransMambaLayer(nn.Module):
    """A mixer and, unless its width is 0, a feed-forward network, each behind its norm."""

    def __init__(self, config: TransMambaConfig, kind: str, transpoint: int | None):
        super().__init__()
        has_ffn = config.intermediate_size > 0
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = MIXERS[kind](config, transpoint)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps) if has_ffn else None
        self.ffn = FeedForward(config) if has_ffn else None

    def forward(self, x_BTD: Tensor, layout: Layout, memory: LayerMemory | None) -> Tensor:
        x_BTD = x_BTD + self.mixer(self.norm(x_BTD), layout, memory)
        return x_BTD if self.ffn is None or self.ffn_norm is None else x_BTD + self.ffn(self.ffn_norm(x_BTD))


class TransMambaPreTrainedModel(PreTrainedModel):
    """What the model and its heads share."""

    config_class = TransMambaConfig
    base_model_prefix = "model"
    _no_split_modules = ["TransMambaLayer"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["A_log", "dt_bias", "D"]  # noqa: RUF012
    _supports_sdpa = True
    _is_stateful = True  # a state cannot be rolled back, so assisted generation is refused

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As in training; weights that were loaded are left alone by the functions of `init`."""
        super()._init_weights(module)
        config = self.config
        if isinstance(module, Conv):
            bound = config.conv_width**-0.5
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, GateUp):
            init.normal_(module.weight, 0.0, config.initializer_range)
        elif isinstance(module, HeadNorm | nn.RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, ScanWeights):
            init.copy_(module.A_log, torch.empty_like(module.A_log).uniform_(1, 16).log())
            low, high = math.log(config.dt_min), math.log(config.dt_max)
            dt = torch.empty_like(module.dt_bias).uniform_(low, high).exp().clamp(min=1e-4)
            init.copy_(module.dt_bias, dt + torch.log(-torch.expm1(-dt)))
            if module.D is not None:
                init.ones_(module.D)


class TransMambaModel(TransMambaPreTrainedModel):
    """Token ids to hidden states."""

    def __init__(self, config: TransMambaConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        kinds = zip(config.layer_kinds or [], config.transpoints or [], strict=True)
        self.layers = nn.ModuleList([TransMambaLayer(config, kind, point) for kind, point in kinds])
        self.final_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the layers.

        Args:
            attention_mask: [B, T], 0 for padding, which stands before all tokens (or, without a cache, after them).
            position_ids: offsets in documents; where one is 0, a document starts, and nothing looks across.
            past_key_values: a `TransMambaCache`; any other cache must be empty, and is replaced by one.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache(past_key_values, use_cache)
        layout = make_layout(x_BTD, 0 if cache is None else cache.n_seen, attention_mask, position_ids)
        states = [x_BTD]
        for index, layer in enumerate(self.layers):
            x_BTD = layer(x_BTD, layout, None if cache is None else cache.layers[index])
            states.append(x_BTD)
        if cache is not None:
            cache.n_seen += x_BTD.shape[1]
        return BaseModelOutputWithPast(
            last_hidden_state=self.final_norm(x_BTD),
            past_key_values=cache,
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    def _cache(self, given: Any, use_cache: bool | None) -> TransMambaCache | None:
        if isinstance(given, TransMambaCache):
            return given
        if given is not None and given.get_seq_length():
            raise ValueError(f"the cache of this model is TransMambaCache, not {type(given).__name__}")
        wanted = self.config.use_cache and not self.training if use_cache is None else use_cache
        return TransMambaCache(len(self.layers)) if wanted else None


class TransMambaForCausalLM(TransMambaPreTrainedModel, GenerationMixin):
    """Token ids to logits of the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: TransMambaConfig):
        super().__init__(config)
        self.model = TransMambaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        cache_params: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits and, given labels (-100 is left out), the mean loss of every token's successor.

        `generate` hands a cache to classes with "mamba" in their name as `cache_params`; it is a general one and
        empty, and the `past_key_values` that are returned take its place from the second token on.
        """
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache_params if past_key_values is None else past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )


__all__ = ["TransMambaForCausalLM", "TransMambaModel", "TransMambaPreTrainedModel"]
