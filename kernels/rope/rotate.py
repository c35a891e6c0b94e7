"""Rotary position embedding: public operations, autograd node, and the torch path."""

# B batch, T tokens, H heads, N key width.

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from transmamba.kernels import backend
from transmamba.kernels.rope.triton_rope import turn_heads


def rope(x_BTHN: Tensor, pos_BT: Tensor, theta: float = 10_000.0) -> Tensor:
    """Rotate pairs (i, i + N/2) of every head by `pos * theta ** (-2i / N)` radians (split-half convention).

    Angles, sines and the rotation are float32 (float64 for float64 input). The two leading dimensions may
    come in any order, as long as `pos_BT` has the same. Torch code on every device.
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
    _check(x_BTHN, pos_BT)
    n_pairs = x_BTHN.shape[-1] // 2
    work = torch.float64 if x_BTHN.dtype == torch.float64 else torch.float32
    index = torch.arange(n_pairs, device=x_BTHN.device, dtype=torch.float64)
    frequency = (theta ** (-index / n_pairs)).to(work)
    angle = (pos_BT.to(work)[..., None] * frequency)[..., None, :]
    cos, sin = angle.cos(), angle.sin()
    first, second = x_BTHN.to(work).split(n_pairs, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BTHN.dtype)


def rope_qk(q_BTHN: Tensor, k_BTHN: Tensor, pos_BT: Tensor, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """`rope` of queries and of keys, in one launch on a GPU and one more for both gradients.

    Nothing but the positions is kept for the backward there, which turns the gradients back.
    Source: RoFormer, arXiv 2104.09864, in the pairing of Llama.

    Args:
        q_BTHN, k_BTHN: queries and keys of the same heads; any strides.
        pos_BT: integer offset of every token in its document, below 2^24 to be exact in float32.
        theta: base of the wavelengths, > 0.

    Returns:
        The rotated queries and keys in their dtype, contiguous.

    Raises:
        ValueError: N is odd, there are not four dimensions, or shapes or dtypes do not match.
    """
    if q_BTHN.dim() != 4 or q_BTHN.shape != k_BTHN.shape or q_BTHN.dtype != k_BTHN.dtype:
        q, k = (f"{tuple(x.shape)} {x.dtype}" for x in (q_BTHN, k_BTHN))
        raise ValueError(f"queries {q} and keys {k} are not both [B, T, H, N] of one dtype")
    _check(q_BTHN, pos_BT)
    if not backend.runs_triton(q_BTHN):
        return rope(q_BTHN, pos_BT, theta), rope(k_BTHN, pos_BT, theta)
    return _RopeQK.apply(q_BTHN, k_BTHN, pos_BT, float(theta))


class _RopeGrads(NamedTuple):
    q_BTHN: Tensor
    k_BTHN: Tensor
    pos_BT: None = None
    theta: None = None


class _RopeQK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BTHN: Tensor, k_BTHN: Tensor, pos_BT: Tensor, theta: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(pos_BT)
        ctx.theta = theta
        return turn_heads(q_BTHN, k_BTHN, pos_BT, theta, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> _RopeGrads:  # pyright: ignore[reportIncompatibleMethodOverride]
        dq_BTHN, dk_BTHN = grads
        (pos_BT,) = ctx.saved_tensors
        return _RopeGrads(*turn_heads(dq_BTHN, dk_BTHN, pos_BT, ctx.theta, back=True))


def _check(x_BTHN: Tensor, pos_BT: Tensor) -> None:
    if x_BTHN.shape[-1] % 2:
        raise ValueError(f"rope needs an even head width, got {x_BTHN.shape[-1]}")
    if pos_BT.shape != x_BTHN.shape[:-2]:
        raise ValueError(f"positions {tuple(pos_BT.shape)} do not match tokens {tuple(x_BTHN.shape[:-2])}")
