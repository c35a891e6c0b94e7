"""Rotary position embedding."""

# B batch, T tokens, H heads, N key width.

import torch
from torch import Tensor


def rope(x_BTHN: Tensor, pos_BT: Tensor, theta: float = 10_000.0) -> Tensor:
    """Rotate pairs (i, i + N/2) of every head by `pos * theta ** (-2i / N)` radians (split-half convention).

    Angles, sines and the rotation are float32 (float64 for float64 input). The two leading dimensions may
    come in any order, as long as `pos_BT` has the same.
    Source: RoFormer, arXiv 2104.09864, in the pairing of Llama.

    Args:
        x_BTHN: queries or keys.
        pos_BT: integer offset of every token in its document.
        theta: base of the wavelengths, > 0.

    Returns:
        The rotated heads in the dtype of `x_BTHN`.

    Raises:
        ValueError: N is odd, or `pos_BT` does not match the leading dimensions.
    """
    n_pairs, odd = divmod(x_BTHN.shape[-1], 2)
    if odd:
        raise ValueError(f"rope needs an even head width, got {x_BTHN.shape[-1]}")
    if pos_BT.shape != x_BTHN.shape[:-2]:
        raise ValueError(f"positions {tuple(pos_BT.shape)} do not match tokens {tuple(x_BTHN.shape[:-2])}")
    work = torch.float64 if x_BTHN.dtype == torch.float64 else torch.float32
    index = torch.arange(n_pairs, device=x_BTHN.device, dtype=torch.float64)
    frequency = (theta ** (-index / n_pairs)).to(work)
    angle = (pos_BT.to(work)[..., None] * frequency)[..., None, :]
    cos, sin = angle.cos(), angle.sin()
    first, second = x_BTHN.to(work).split(n_pairs, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BTHN.dtype)
