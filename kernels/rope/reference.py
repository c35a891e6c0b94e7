"""Definition of rotary positions: products of complex numbers, one pair after the other."""

# B batch, T tokens, H heads, N key width.

import torch
from torch import Tensor


def rope_reference(
    x_BTHN: Tensor, pos_BT: Tensor, theta: float = 10_000.0, *, angle_dtype: torch.dtype = torch.float32
) -> Tensor:
    """Pair i turns by pos * theta ** (-2i / N), an angle computed in `angle_dtype`; all else as exact as the input.

    A long angle in float32 is not the exact one: at 100,000 radians it is off by up to 0.004. The operation promises
    the sine and cosine of the former.
    """
    n_pairs = x_BTHN.shape[-1] // 2
    turned = []
    for pair in range(n_pairs):
        frequency = torch.tensor(theta ** (-pair / n_pairs), dtype=torch.float64, device=pos_BT.device)
        angle = (pos_BT.to(angle_dtype) * frequency.to(angle_dtype)).double()
        turn = torch.polar(torch.ones_like(angle), angle)[..., None]
        turned.append(torch.complex(x_BTHN[..., pair], x_BTHN[..., pair + n_pairs]) * turn)
    value = torch.stack(turned, -1)
    return torch.cat([value.real, value.imag], -1)


def rope_qk_reference(q_BTHN: Tensor, k_BTHN: Tensor, pos_BT: Tensor, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """`rope_reference` of queries and of keys."""
    return rope_reference(q_BTHN, pos_BT, theta), rope_reference(k_BTHN, pos_BT, theta)
