"""Definition of the scan: a loop over tokens."""

# B batch, T tokens, H heads, G groups of B and C, N key/state width, V value width.

import torch
from torch import Tensor

from transmamba.kernels.documents import Documents


def scan_loop(
    c_BTGN: Tensor,
    b_BTGN: Tensor,
    x_BTHV: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    *,
    D_H: Tensor | None = None,
    dt_bias_H: Tensor | None = None,
    initial_state_BHNV: Tensor | None = None,
    documents: Documents | None = None,
    transpoint: int | float = 0,
    before_BPHV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(dt_t A) S_{t-1} + dt_t b_t x_t^T and y_t = c_t^T S_t + D x_t, token by token.

    The state before a document's first token is zero. Differentiable by autograd; works in the widest of the
    input dtypes and at least float32. Arguments and results as in `ssd_scan`.
    Source: Mamba-2, arXiv 2405.21060, equation 1 with the discretisation of its section 2.
    """
    n_tokens, n_heads, n_values = x_BTHV.shape[1:]
    n_shared = n_heads // b_BTGN.shape[2]
    work = torch.float64 if x_BTHV.dtype == torch.float64 else torch.float32
    c_BTHN, b_BTHN = (stream.to(work).repeat_interleave(n_shared, 2) for stream in (c_BTGN, b_BTGN))
    x, dt, A = x_BTHV.to(work), dt_BTH.to(work), A_H.to(work)
    if dt_bias_H is not None:
        dt = torch.log1p(torch.exp(dt + dt_bias_H.to(work)))
    if initial_state_BHNV is None:
        state_BHNV = x.new_zeros(x.shape[0], n_heads, b_BTGN.shape[3], n_values)
    else:
        state_BHNV = initial_state_BHNV.to(work)
    y: list[Tensor] = []
    for t in range(n_tokens):
        if documents is not None:
            starts_B = documents.reset_BT[:, t]
            state_BHNV = torch.where(starts_B[:, None, None, None], torch.zeros_like(state_BHNV), state_BHNV)
        decay_BH = (dt[:, t] * A).exp()
        write_BHNV = b_BTHN[:, t, :, :, None] * (dt[:, t, :, None] * x[:, t])[:, :, None]
        state_BHNV = decay_BH[..., None, None] * state_BHNV + write_BHNV
        read_BHV = torch.einsum("bhn,bhnv->bhv", c_BTHN[:, t], state_BHNV)
        if D_H is not None:
            read_BHV = read_BHV + D_H.to(work)[:, None] * x[:, t]
        pos_B = torch.full((x.shape[0],), t) if documents is None else documents.pos_BT[:, t]
        given_BHV = torch.zeros_like(read_BHV)
        if before_BPHV is not None and t < before_BPHV.shape[1]:
            given_BHV = before_BPHV[:, t].to(work)
        y.append(torch.where((pos_B < transpoint)[:, None, None], given_BHV, read_BHV))
    y_BTHV = torch.stack(y, dim=1) if y else torch.zeros_like(x)
    return y_BTHV.to(x_BTHV.dtype), state_BHNV
