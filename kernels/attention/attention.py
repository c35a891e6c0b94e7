"""Causal attention inside every document, for its first tokens only, on torch's own attention."""

# B batch, T tokens, P prefix, H heads, N key width, V value width.

import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from transmamba.kernels.attention.gathering import Gathering, Put, Take
from transmamba.kernels.attention.packed import attend_packed
from transmamba.kernels.backend import runs_varlen
from transmamba.kernels.documents import Documents
from transmamba.kernels.rope import rope_qk


def prefix_attention(
    q_BTHN: Tensor,
    k_BTHN: Tensor,
    v_BTHV: Tensor,
    documents: Documents,
    prefix: int | float,
    *,
    scale: float | None = None,
    rope_theta: float | None = None,
) -> Tensor:
    """Causal softmax attention inside each document for its tokens with `pos < prefix`.

    Where torch can (CUDA, 16 bits), several documents are one call without padding; elsewhere they are batched by
    padded length. No mask of T x T is ever made.
    Source: TransMamba, arXiv 2503.24067, table 1 (the attention reading of the shared weights).

    Args:
        q_BTHN, k_BTHN, v_BTHV: queries, keys, values; any strides.
        documents: boundaries of the B rows of T tokens.
        prefix: attend while the offset in the document is below it; 0, `math.inf` and values above T work.
        scale: factor on the logits; default 1 / sqrt(N).
        rope_theta: rotate queries and keys by their offset in the document, with this base; None leaves them. Only
            tokens that attend are rotated.

    Returns:
        y_BPHV in the dtype of `v_BTHV`: the tokens before the prefix ends, where rows are one document; otherwise
        whole rows, zeros where a token does not attend.

    Raises:
        ValueError: shapes disagree with each other or with `documents`.
    """
    if q_BTHN.shape != k_BTHN.shape or q_BTHN.shape[:3] != v_BTHV.shape[:3]:
        raise ValueError(f"q {tuple(q_BTHN.shape)}, k {tuple(k_BTHN.shape)}, v {tuple(v_BTHV.shape)} do not match")
    if q_BTHN.shape[:2] != (documents.n_rows, documents.n_tokens):
        raise ValueError(f"q {tuple(q_BTHN.shape)} against {documents.n_rows} rows of {documents.n_tokens} tokens")
    scale = 1.0 / math.sqrt(q_BTHN.shape[-1]) if scale is None else scale
    if documents.is_whole:
        P = math.ceil(min(max(prefix, 0), documents.n_tokens))
        return _attend(q_BTHN[:, :P], k_BTHN[:, :P], v_BTHV[:, :P], scale, rope_theta)
    attend = attend_packed if runs_varlen(q_BTHN, v_BTHV) else _attend_padded
    return attend(q_BTHN, k_BTHN, v_BTHV, documents, prefix, scale, rope_theta)


def _attend_padded(
    q_BTHN: Tensor,
    k_BTHN: Tensor,
    v_BTHV: Tensor,
    documents: Documents,
    prefix: int | float,
    scale: float,
    rope_theta: float | None,
) -> Tensor:
    """Prefixes of similar length beside each other, each length a call of SDPA."""
    plan = documents.prefix(prefix)
    gathering = Gathering(plan.padded_tokens, plan.tokens, plan.slots)
    q, k, v = (Take.apply(stream.flatten(0, 1), gathering) for stream in (q_BTHN, k_BTHN, v_BTHV))
    sizes = [n_prefixes * padded for n_prefixes, padded in plan.buckets]
    y = [
        _attend(q_.unflatten(0, bucket), k_.unflatten(0, bucket), v_.unflatten(0, bucket), scale, rope_theta)
        for bucket, q_, k_, v_ in zip(plan.buckets, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
    ]
    y_padded = torch.cat([part.flatten(0, 1) for part in y]) if y else v
    return Put.apply(y_padded, gathering, documents.n_rows * documents.n_tokens).unflatten(0, v_BTHV.shape[:2])


def _attend(q_BTHN: Tensor, k_BTHN: Tensor, v_BTHV: Tensor, scale: float, rope_theta: float | None) -> Tensor:
    """Rows that all start a document: position and column are the same."""
    if rope_theta is not None:
        pos_BT = torch.arange(q_BTHN.shape[1], device=q_BTHN.device).expand(q_BTHN.shape[:2])
        q_BTHN, k_BTHN = rope_qk(q_BTHN, k_BTHN, pos_BT, rope_theta)
    q, k, v = (stream.transpose(1, 2) for stream in (q_BTHN, k_BTHN, v_BTHV))
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)
