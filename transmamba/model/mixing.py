"""TransMamba (arXiv 2503.24067) on one card: the same streams, read as attention or as a state-space scan."""
# B batch, T tokens, H heads on this rank, N key/state width, V value width, C conv channels, K conv taps.

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from transmamba.kernels.attention import prefix_attention
from transmamba.kernels.causal_conv import causal_conv
from transmamba.kernels.documents import Documents
from transmamba.kernels.rope import rope_qk
from transmamba.kernels.ssd import ssd_scan


class TokenStreams(NamedTuple):
    """What the shared projections say about every token, before any token has seen another."""

    qkv_BTC: Tensor  # rows of a head are adjacent: C = H * (N + N + V)
    dt_BTH: Tensor


class HeadWeights(NamedTuple):
    """The weights that belong to heads and not to tokens."""

    conv_weight_CK: Tensor
    conv_bias_C: Tensor
    A_log_H: Tensor
    dt_bias_H: Tensor
    D_H: Tensor | None


class MixOptions(NamedTuple):
    """Choices of the config that `mix_tokens` needs."""

    head_dim: int
    conv_activation: Literal["silu", "none"]
    rope: Literal["attention", "both", "none"]
    rope_theta: float


class Readings(NamedTuple):
    """Queries, keys and values (read by the scan as C, B and x), decay rates, and what time steps are made of."""

    q_BTHN: Tensor
    k_BTHN: Tensor
    v_BTHV: Tensor
    dt_BTH: Tensor  # logits: a step is softplus(dt + dt_bias)
    dt_bias_H: Tensor
    A_H: Tensor


def read_streams(
    tokens: TokenStreams,
    heads: HeadWeights,
    pos_BT: Tensor,
    options: MixOptions,
    *,
    documents: Documents | None = None,
) -> Readings:
    """Convolve the shared streams and split them by head (paper eq. 1 and 3).

    `pos_BT` is every token's offset in its document.
    """
    qkv_BTC = causal_conv(
        tokens.qkv_BTC,
        heads.conv_weight_CK,
        heads.conv_bias_C,
        documents=documents,
        activation=options.conv_activation,
    )
    return split_streams(qkv_BTC, tokens.dt_BTH, heads, pos_BT, options)


def split_streams(qkv_BTC: Tensor, dt_BTH: Tensor, heads: HeadWeights, pos_BT: Tensor, options: MixOptions) -> Readings:
    """The convolved streams by head."""
    q_BTHN, k_BTHN, v_BTHV = qkv_BTC.unflatten(-1, (-1, 3 * options.head_dim)).chunk(3, dim=-1)
    if options.rope == "both":
        q_BTHN, k_BTHN = rope_qk(q_BTHN, k_BTHN, pos_BT, options.rope_theta)
    return Readings(q_BTHN, k_BTHN, v_BTHV, dt_BTH, heads.dt_bias_H, -heads.A_log_H.exp())


def mix_tokens(
    tokens: TokenStreams,
    heads: HeadWeights,
    transpoint: int | float,
    documents: Documents,
    options: MixOptions,
) -> Tensor:
    """Mix all tokens of some heads: attend before the TransPoint, scan from it on (paper eq. 2-6).

    Positions count from the document's start. The scan builds state only where it gives no output: that part of it is
    the Memory Converter (eq. 8-9), so `layer_P = where(pos < P, attention, full scan)` holds exactly, gradients too.

    Args:
        tokens: projected streams of all T tokens and some heads.
        heads: weights of the same heads.
        transpoint: P in tokens, 0 (scan only) to inf (attention only).
        documents: boundaries inside the window; no operation looks across them.
        options: widths and switches.

    Returns:
        y_BTHV, in the streams' dtype.
    """
    q_BTHN, k_BTHN, v_BTHV, dt_BTH, dt_bias_H, A_H = read_streams(
        tokens, heads, documents.pos_BT, options, documents=documents
    )
    # Tokens to attend and tokens to scan are sizes: 0 and T are as ordinary as any other.
    theta = options.rope_theta if options.rope == "attention" else None
    attended_BPHV = prefix_attention(q_BTHN, k_BTHN, v_BTHV, documents, transpoint, rope_theta=theta)
    if documents.first_output(transpoint) == documents.n_tokens:
        # No token is past the TransPoint: a scan of nothing gives its weights the gradient zero.
        q_BTHN, k_BTHN, v_BTHV, dt_BTH = (stream[:, :0] for stream in (q_BTHN, k_BTHN, v_BTHV, dt_BTH))
        scanned, _ = ssd_scan(q_BTHN, k_BTHN, v_BTHV, dt_BTH, A_H, D_H=heads.D_H, dt_bias_H=dt_bias_H)
        return torch.cat([attended_BPHV, scanned], dim=1)
    y_BTHV, _ = ssd_scan(
        c_BTGN=q_BTHN,
        b_BTGN=k_BTHN,
        x_BTHV=v_BTHV,
        dt_BTH=dt_BTH,
        A_H=A_H,
        D_H=heads.D_H,
        dt_bias_H=dt_bias_H,
        documents=documents,
        transpoint=transpoint,
        before_BPHV=attended_BPHV,
    )
    return y_BTHV


def rotate(q_BTHN: Tensor, k_BTHN: Tensor, pos_BT: Tensor, options: MixOptions) -> tuple[Tensor, Tensor]:
    """Rotary positions for attention; the scan and the converter never see them unless `rope` says both."""
    if options.rope != "attention":
        return q_BTHN, k_BTHN
    return rope_qk(q_BTHN, k_BTHN, pos_BT, options.rope_theta)
