"""Definition of the causal convolution: one token at a time."""

# B batch, T tokens, C channels, K conv taps.

import torch
from torch import Tensor

from transmamba.kernels.documents import Documents


def conv_loop(
    x_BTC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor,
    *,
    documents: Documents | None = None,
    activation: str = "silu",
    tail_BKC: Tensor | None = None,
) -> Tensor:
    """y_t = activation(bias + sum over k of weight_k x_{t - (K - 1) + k}), taps inside the document only."""
    n_rows, n_tokens, _ = x_BTC.shape
    n_taps = weight_CK.shape[1]
    if documents is None:
        before = x_BTC.new_zeros(n_rows, n_tokens, dtype=torch.int64) + torch.arange(n_tokens) + n_taps - 1
        tail = x_BTC.new_zeros(n_rows, n_taps - 1, x_BTC.shape[2]) if tail_BKC is None else tail_BKC
    else:
        before = documents.pos_BT
        tail = x_BTC.new_zeros(n_rows, n_taps - 1, x_BTC.shape[2])
    padded = torch.cat([tail, x_BTC], dim=1)
    y: list[Tensor] = []
    for t in range(n_tokens):
        total = bias_C.expand(n_rows, -1)
        for back in range(n_taps):
            seen_B = (before[:, t] >= back)[:, None]
            tap = weight_CK[:, n_taps - 1 - back] * padded[:, t + n_taps - 1 - back]
            total = total + torch.where(seen_B, tap, torch.zeros_like(tap))
        y.append(total)
    y_BTC = torch.stack(y, dim=1) if y else torch.zeros_like(x_BTC)
    return y_BTC * y_BTC.sigmoid() if activation == "silu" else y_BTC
