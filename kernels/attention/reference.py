"""Definition of prefix attention: one query at a time."""

# B batch, T tokens, H heads, N key width, V value width.

import math

import torch
from torch import Tensor

from transmamba.kernels.documents import Documents


def attention_loop(
    q_BTHN: Tensor,
    k_BTHN: Tensor,
    v_BTHV: Tensor,
    documents: Documents,
    prefix: int | float,
    *,
    scale: float | None = None,
) -> Tensor:
    """y_t = sum over j <= t in the document of softmax_j(scale * q_t.k_j) v_j where `pos < prefix`.

    Source: TransMamba, arXiv 2503.24067, table 1. Shapes as in `prefix_attention`.
    """
    factor = q_BTHN.shape[-1] ** -0.5 if scale is None else scale
    y_BTHV = torch.zeros_like(v_BTHV)
    for row, start, length in documents.spans():
        for offset in range(math.ceil(min(length, max(prefix, 0)))):
            t = start + offset
            keys = k_BTHN[row, start : t + 1]
            logits = torch.einsum("hn,jhn->jh", q_BTHN[row, t], keys) * factor
            y_BTHV[row, t] = torch.einsum("jh,jhv->hv", logits.softmax(0), v_BTHV[row, start : t + 1])
    return y_BTHV[:, : math.ceil(min(prefix, documents.n_tokens))] if documents.is_whole else y_BTHV
