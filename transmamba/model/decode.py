"""Decoding: a prompt in one pass, then token by token, with caches that switch where the layers switch."""
# B batch, T tokens, D model width, H heads, G groups, N key/state width, V value width, C channels, K conv taps.

from dataclasses import dataclass

import torch
from torch import Tensor

from transmamba.kernels.attention.cached import attend_cached
from transmamba.kernels.causal_conv import conv_step
from transmamba.kernels.documents import Documents
from transmamba.kernels.ssd import final_state, ssd_step
from transmamba.model.attention import AttentionMixer
from transmamba.model.layer import Layer
from transmamba.model.mamba2 import Mamba2Mixer
from transmamba.model.mixer import TransMambaMixer
from transmamba.model.mixing import read_streams, rotate, split_streams
from transmamba.model.model import Model


@dataclass
class LayerCache:
    """What one layer remembers of the tokens so far.

    The scan's state is kept from the first token on, in both readings, so the switch at the TransPoint is to change the
    read-out and to drop the keys and values (None from then on).
    """

    tail_BKC: Tensor | None = None
    state_BHNV: Tensor | None = None
    k_BTHN: Tensor | None = None
    v_BTHV: Tensor | None = None


@dataclass
class DecodeState:
    """Caches of all layers and the number of tokens they have seen."""

    layers: list[LayerCache]
    transpoints: list[int | float]
    n_seen: int


@torch.no_grad()
def prefill(model: Model, ids_BT: Tensor, transpoints: list[int | float]) -> tuple[Tensor, DecodeState]:
    """Read a prompt (at least one token, rows of equal length) as the start of a document.

    Returns:
        Logits [B, E] of the next token, and the state to continue from.
    """
    documents = Documents.whole(ids_BT.shape[0], ids_BT.shape[1], ids_BT.device)
    x_TBD = model.embed(ids_BT)
    caches = []
    for layer, transpoint in zip(_layers(model), transpoints, strict=True):
        caches.append(_read_prompt(layer.mixer, layer.norm(x_TBD), transpoint, documents))
        x_TBD = layer(x_TBD, transpoint, documents)
    return model.logits(x_TBD[-1:])[0], DecodeState(caches, list(transpoints), ids_BT.shape[1])


@torch.no_grad()
def step(model: Model, ids_B: Tensor, state: DecodeState) -> Tensor:
    """Read one more token per row; updates `state` and returns the logits [B, E] of the next one."""
    x_TBD = model.embed(ids_B[:, None])
    for layer, transpoint, cache in zip(_layers(model), state.transpoints, state.layers, strict=True):
        mixed = _step_mixer(layer.mixer, layer.norm(x_TBD), transpoint, cache, state.n_seen)
        x_TBD = layer.feed_forward(x_TBD + mixed)
    state.n_seen += 1
    return model.logits(x_TBD)[0]


def _layers(model: Model) -> list[Layer]:
    return [layer for layer in model.layers.values() if isinstance(layer, Layer)]


def _read_prompt(mixer: torch.nn.Module, x_TBD: Tensor, transpoint: int | float, documents: Documents) -> LayerCache:
    match mixer:
        case AttentionMixer():
            _, k_BTHN, v_BTHV = mixer.rotated_heads(x_TBD, documents.pos_BT)
            return LayerCache(k_BTHN=k_BTHN, v_BTHV=v_BTHV)
        case Mamba2Mixer():
            streams = mixer.xbc(x_TBD).transpose(0, 1)
            read = mixer.read(streams, mixer.dt(x_TBD).transpose(0, 1))
            state = final_state(read.b_BTGN, read.x_BTHV, read.dt_BTH, read.A_H, dt_bias_H=read.dt_bias_H)
            return LayerCache(_tail(streams, mixer.conv.weight.shape[1]), state)
    assert isinstance(mixer, TransMambaMixer)
    tokens = mixer.project(x_TBD)
    read = read_streams(tokens, mixer.per_head(), documents.pos_BT, mixer.options)
    cache = LayerCache(
        _tail(tokens.qkv_BTC, mixer.conv.weight.shape[1]),
        final_state(read.k_BTHN, read.v_BTHV, read.dt_BTH, read.A_H, dt_bias_H=read.dt_bias_H),
    )
    if documents.n_tokens < transpoint:
        _, cache.k_BTHN = rotate(read.q_BTHN, read.k_BTHN, documents.pos_BT, mixer.options)
        cache.v_BTHV = read.v_BTHV
    return cache


def _tail(streams_BTC: Tensor, taps: int) -> Tensor:
    """The last taps - 1 rows before the convolution, zeros where the prompt is shorter."""
    padded = torch.nn.functional.pad(streams_BTC, (0, 0, taps - 1, 0))
    return padded[:, padded.shape[1] - (taps - 1) :]


def _step_mixer(
    mixer: torch.nn.Module, x_1BD: Tensor, transpoint: int | float, cache: LayerCache, position: int
) -> Tensor:
    match mixer:
        case AttentionMixer():
            return _step_attention(mixer, x_1BD, cache, position)
        case Mamba2Mixer():
            return _step_mamba2(mixer, x_1BD, cache)
    assert isinstance(mixer, TransMambaMixer)
    return _step_transmamba(mixer, x_1BD, transpoint, cache, position)


def _step_transmamba(
    mixer: TransMambaMixer, x_1BD: Tensor, transpoint: int | float, cache: LayerCache, position: int
) -> Tensor:
    assert cache.tail_BKC is not None and cache.state_BHNV is not None
    tokens, heads = mixer.project(x_1BD), mixer.per_head()
    pos_BT = torch.full((x_1BD.shape[1], 1), position, device=x_1BD.device)
    weights, activation = (heads.conv_weight_CK, heads.conv_bias_C), mixer.options.conv_activation
    qkv_BC, cache.tail_BKC = conv_step(cache.tail_BKC, tokens.qkv_BTC[:, 0], *weights, activation=activation)
    read = split_streams(qkv_BC[:, None], tokens.dt_BTH, heads, pos_BT, mixer.options)
    y_BHV, cache.state_BHNV = ssd_step(
        cache.state_BHNV,
        read.q_BTHN[:, 0],
        read.k_BTHN[:, 0],
        read.v_BTHV[:, 0],
        read.dt_BTH[:, 0],
        read.A_H,
        D_H=heads.D_H,
        dt_bias_H=read.dt_bias_H,
    )
    is_scanned = position >= transpoint
    if not is_scanned:
        q_BTHN, k_BTHN = rotate(read.q_BTHN, read.k_BTHN, pos_BT, mixer.options)
        y_BHV = _attend(q_BTHN, k_BTHN, read.v_BTHV, cache)
    if position + 1 >= transpoint:
        cache.k_BTHN = cache.v_BTHV = None
    gate_TB = torch.full((1, x_1BD.shape[1]), is_scanned, device=x_1BD.device)
    return mixer.finish(y_BHV[None], x_1BD, gate_TB)


def _step_attention(mixer: AttentionMixer, x_1BD: Tensor, cache: LayerCache, position: int) -> Tensor:
    pos_BT = torch.full((x_1BD.shape[1], 1), position, device=x_1BD.device)
    y_BHN = _attend(*mixer.rotated_heads(x_1BD, pos_BT), cache)
    return mixer.out(y_BHN.flatten(-2))[None]


def _step_mamba2(mixer: Mamba2Mixer, x_1BD: Tensor, cache: LayerCache) -> Tensor:
    assert cache.tail_BKC is not None and cache.state_BHNV is not None
    xbc_BC, cache.tail_BKC = conv_step(cache.tail_BKC, mixer.xbc(x_1BD)[0], mixer.conv.weight, mixer.conv.bias)
    read = mixer.split(xbc_BC[:, None], mixer.dt(x_1BD).transpose(0, 1))
    y_BHV, cache.state_BHNV = ssd_step(
        cache.state_BHNV,
        read.c_BTGN[:, 0],
        read.b_BTGN[:, 0],
        read.x_BTHV[:, 0],
        read.dt_BTH[:, 0],
        read.A_H,
        D_H=mixer.D(),
        dt_bias_H=read.dt_bias_H,
    )
    return mixer.finish(y_BHV[None].flatten(-2), x_1BD)


def _attend(q_B1HN: Tensor, k_B1HN: Tensor, v_B1HV: Tensor, cache: LayerCache) -> Tensor:
    """Append one token's key and value and attend to all of them; returns [B, H, V]."""
    assert cache.k_BTHN is not None and cache.v_BTHV is not None
    cache.k_BTHN = torch.cat([cache.k_BTHN, k_B1HN], dim=1)
    cache.v_BTHV = torch.cat([cache.v_BTHV, v_B1HV], dim=1)
    return attend_cached(q_B1HN[:, 0], cache.k_BTHN, cache.v_BTHV)
