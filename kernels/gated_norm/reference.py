"""Definition of the gated norm, for autograd."""

# B batch, T tokens, H heads, V value width.

import torch
from torch import Tensor
from torch.nn.functional import silu


def gated_rms_norm_reference(
    y_BTHV: Tensor,
    weight_HV: Tensor,
    z_BTHV: Tensor | None = None,
    *,
    gate_BT: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """u / sqrt(mean over V of u^2 + eps) * weight, with u = y * silu(z) where gated and y elsewhere."""
    u_BTHV = y_BTHV
    if z_BTHV is not None:
        gate = silu(z_BTHV)
        if gate_BT is not None:
            gate = torch.where(gate_BT[..., None, None], gate, torch.ones_like(gate))
        u_BTHV = y_BTHV * gate
    return u_BTHV * torch.rsqrt(u_BTHV.square().mean(-1, keepdim=True) + eps) * weight_HV
