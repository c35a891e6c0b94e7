"""One token of the scan, for decoding."""

# B batch, H heads, G groups of B and C, N key/state width, V value width.

import torch
from torch import Tensor
from torch.nn.functional import softplus

from transmamba.kernels import backend
from transmamba.kernels.ssd.triton_step import triton_step


def ssd_step(
    state_BHNV: Tensor,
    c_BGN: Tensor,
    b_BGN: Tensor,
    x_BHV: Tensor,
    dt_BH: Tensor,
    A_H: Tensor,
    *,
    D_H: Tensor | None = None,
    dt_bias_H: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of the scan, for decoding.

    Args:
        state_BHNV: state before the token, float32 or float64; kept unchanged.
        c_BGN, b_BGN, x_BHV, dt_BH, A_H, D_H, dt_bias_H: as in `ssd_scan`, without the token axis.

    Returns:
        y_BHV in the dtype of `x_BHV`; the state after the token in the dtype of `state_BHNV`.

    Raises:
        ValueError: G does not divide H.
    """
    n_heads, work = x_BHV.shape[1], state_BHNV.dtype
    if n_heads % b_BGN.shape[1]:
        raise ValueError(f"{b_BGN.shape[1]} groups do not divide {n_heads} heads")
    if backend.runs_triton(x_BHV) and work == torch.float32:
        return triton_step(state_BHNV, c_BGN, b_BGN, x_BHV, dt_BH, A_H, D_H, dt_bias_H)
    n_shared = n_heads // b_BGN.shape[1]
    c_BHN, b_BHN = (stream.to(work).repeat_interleave(n_shared, 1) for stream in (c_BGN, b_BGN))
    x, dt = x_BHV.to(work), dt_BH.to(work)
    if dt_bias_H is not None:
        dt = softplus(dt + dt_bias_H.to(work))
    decay_BH = (dt * A_H.to(work)).exp()
    write_BHNV = b_BHN[..., None] * (dt[..., None] * x)[..., None, :]
    state_BHNV = torch.addcmul(write_BHNV, state_BHNV, decay_BH[..., None, None])
    y_BHV = (c_BHN[..., None, :] @ state_BHNV).squeeze(-2)
    if D_H is not None:
        y_BHV = y_BHV + D_H.to(work)[:, None] * x
    return y_BHV.to(x_BHV.dtype), state_BHNV
