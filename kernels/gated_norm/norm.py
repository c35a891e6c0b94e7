"""Per-head RMS norm with an optional gate: public operation, autograd node, and the CPU path."""

# B batch, T tokens, H heads, V value width.

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from transmamba.kernels import backend
from transmamba.kernels.gated_norm.triton_norm import norm_bwd, norm_fwd


def gated_rms_norm(
    y_BTHV: Tensor,
    weight_HV: Tensor,
    z_BTHV: Tensor | None = None,
    *,
    gate_BT: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise every head of every token: u / sqrt(mean over V of u^2 + eps) * weight, u = y or y * silu(z).

    Statistics are per head, so they do not depend on how heads are spread over ranks; float32 inside (float64
    for float64 input). The leading dimensions may be any, in any order, the same for all three.
    Source: the gated norm of Mamba-2, arXiv 2405.21060, with one group per head.

    Args:
        y_BTHV: what a mixer read.
        weight_HV: scale.
        z_BTHV: gate logits; without them nothing is gated.
        gate_BT: bool, gate only the tokens where it is True; default all.

    Returns:
        out_BTHV in the dtype of `y_BTHV`.

    Raises:
        ValueError: shapes disagree, or `gate_BT` comes without `z_BTHV`.
    """
    if y_BTHV.shape[-2:] != weight_HV.shape or (z_BTHV is not None and z_BTHV.shape != y_BTHV.shape):
        z_shape = None if z_BTHV is None else tuple(z_BTHV.shape)
        raise ValueError(f"y {tuple(y_BTHV.shape)}, weight {tuple(weight_HV.shape)}, z {z_shape} do not match")
    if gate_BT is not None and (z_BTHV is None or gate_BT.shape != y_BTHV.shape[:-2]):
        raise ValueError(f"gate {tuple(gate_BT.shape)} needs z and one entry per token of {tuple(y_BTHV.shape)}")
    return _GatedNorm.apply(y_BTHV, weight_HV, z_BTHV, gate_BT, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean over the last dimension of x^2 + eps) * weight, statistics in float32, result like x."""
    return functional.rms_norm(x, weight.shape, weight, eps)


class _NormGrads(NamedTuple):
    y_BTHV: Tensor
    weight_HV: Tensor
    z_BTHV: Tensor | None
    gate_BT: None = None
    eps: None = None


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y_BTHV: Tensor, weight_HV: Tensor, z_BTHV: Tensor | None, gate_BT: Tensor | None, eps: float
    ) -> Tensor:
        forward = norm_fwd if backend.runs_triton(y_BTHV) else _forward
        out_BTHV, scale = forward(y_BTHV, weight_HV, z_BTHV, gate_BT, eps)
        ctx.save_for_backward(y_BTHV, weight_HV, z_BTHV, gate_BT, scale)
        return out_BTHV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> _NormGrads:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dout_BTHV,) = grads
        y_BTHV, weight_HV, z_BTHV, gate_BT, scale = ctx.saved_tensors
        backward = norm_bwd if backend.runs_triton(y_BTHV) else _backward
        dy, dweight, dz = backward(y_BTHV, weight_HV, z_BTHV, gate_BT, scale, dout_BTHV)
        return _NormGrads(dy.to(y_BTHV.dtype), dweight.to(weight_HV.dtype), None if dz is None else dz.to(z_BTHV.dtype))


def _forward(
    y_BTHV: Tensor, weight_HV: Tensor, z_BTHV: Tensor | None, gate_BT: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    work = torch.float64 if y_BTHV.dtype == torch.float64 else torch.float32
    u_BTHV = y_BTHV.to(work)
    if z_BTHV is not None:
        u_BTHV = u_BTHV * _gate(z_BTHV.to(work), gate_BT)
    scale = torch.rsqrt(u_BTHV.square().mean(-1, keepdim=True) + eps)
    return (u_BTHV * scale).mul_(weight_HV.to(work)).to(y_BTHV.dtype), scale


def _backward(
    y_BTHV: Tensor,
    weight_HV: Tensor,
    z_BTHV: Tensor | None,
    gate_BT: Tensor | None,
    scale: Tensor,
    dout_BTHV: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    y, dout = y_BTHV.to(scale.dtype), dout_BTHV.to(scale.dtype)
    z = gate_BTHV = None
    if z_BTHV is not None:
        z = z_BTHV.to(scale.dtype)
        gate_BTHV = _gate(z, gate_BT)
    normal_BTHV = y * scale if gate_BTHV is None else (y * gate_BTHV).mul_(scale)
    dweight_HV = (dout * normal_BTHV).flatten(0, -3).sum(0)
    dnormal = dout * weight_HV.to(scale.dtype)
    shared = (dnormal * normal_BTHV).mean(-1, keepdim=True)
    du_BTHV = dnormal.addcmul_(normal_BTHV, shared, value=-1).mul_(scale)
    if z is None or gate_BTHV is None:
        return du_BTHV, dweight_HV, None
    dz_BTHV = torch.ops.aten.silu_backward(du_BTHV * y, z)
    if gate_BT is not None:
        dz_BTHV = dz_BTHV.masked_fill_(~gate_BT[..., None, None], 0)
    return du_BTHV.mul_(gate_BTHV), dweight_HV, dz_BTHV


def _gate(z_BTHV: Tensor, gate_BT: Tensor | None) -> Tensor:
    """silu(z), and 1 for the tokens that are not gated."""
    gate_BTHV = functional.silu(z_BTHV)
    return gate_BTHV if gate_BT is None else gate_BTHV.masked_fill_(~gate_BT[..., None, None], 1)
