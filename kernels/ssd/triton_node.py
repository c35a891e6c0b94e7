"""The Triton scan as a node of autograd."""

# B batch, T tokens, P prefix, H heads, G groups of B and C, N key/state width, V value width.

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from transmamba.kernels.ssd.slabs import Streams
from transmamba.kernels.ssd.triton_scan import Problem, room_like, triton_backward, triton_forward


class _TritonScanGrads(NamedTuple):
    c_BTGN: Tensor
    b_BTGN: Tensor
    x_BTHV: Tensor
    dt_BTH: Tensor
    A_H: Tensor
    D_H: Tensor | None
    initial_state_BHNV: Tensor | None
    dt_bias_H: Tensor | None
    before_BPHV: Tensor | None
    problem: None = None
    keep: None = None


class TritonScan(torch.autograd.Function):
    """Outputs and final state of a scan; tokens without an output return `before_BPHV`, or zeros."""

    @staticmethod
    def forward(
        ctx: Any,
        c_BTGN: Tensor,
        b_BTGN: Tensor,
        x_BTHV: Tensor,
        dt_BTH: Tensor,
        A_H: Tensor,
        D_H: Tensor | None,
        initial_state_BHNV: Tensor | None,
        dt_bias_H: Tensor | None,
        before_BPHV: Tensor | None,
        problem: Problem,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        streams = Streams(c_BTGN, b_BTGN, x_BTHV, dt_BTH, A_H, D_H)
        y_BTHV = room_like(x_BTHV, x_BTHV.shape)
        n_before = x_BTHV.shape[1] if problem.documents is not None and problem.transpoint else problem.transpoint
        if before_BPHV is None:
            y_BTHV[:, :n_before].zero_()
        else:
            y_BTHV[:, :n_before].copy_(before_BPHV[:, :n_before])
        keep = keep and any(ctx.needs_input_grad)
        final_BHNV, states = triton_forward(streams, problem, initial_state_BHNV, y_BTHV, keep)
        ctx.save_for_backward(*streams, dt_bias_H, states)
        ctx.problem = problem._replace(dt_bias_H=None)
        ctx.before_shape = None if before_BPHV is None else before_BPHV.shape
        ctx.state_dtype = None if initial_state_BHNV is None else initial_state_BHNV.dtype
        ctx.set_materialize_grads(False)
        return y_BTHV, final_BHNV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> _TritonScanGrads:  # pyright: ignore[reportIncompatibleMethodOverride]
        dy_BTHV, dstate_BHNV = grads
        *streams, dt_bias_H, states = ctx.saved_tensors
        streams = Streams(*streams)
        problem = ctx.problem._replace(dt_bias_H=dt_bias_H)
        if dy_BTHV is None:
            dy_BTHV = torch.zeros_like(streams.x_BTHV)
        found = triton_backward(streams, problem, states, dy_BTHV, dstate_BHNV)
        dbefore_BPHV = None
        if ctx.before_shape is not None:
            n_columns = ctx.before_shape[1]
            dbefore_BPHV = dy_BTHV[:, : problem.transpoint]
            if problem.documents is not None:
                is_after = (problem.documents.pos_BT >= problem.transpoint)[..., None, None]
                dbefore_BPHV = dy_BTHV.masked_fill(is_after, 0)[:, :n_columns]
            dbefore_BPHV = pad(dbefore_BPHV, (0, 0, 0, 0, 0, n_columns - dbefore_BPHV.shape[1]))
        return _TritonScanGrads(
            found.c_BTGN,
            found.b_BTGN,
            found.x_BTHV,
            found.dt_BTH,
            found.A_H.to(streams.A_H.dtype),
            None if streams.D_H is None else found.D_H.to(streams.D_H.dtype),
            None if ctx.state_dtype is None else found.initial_state_BHNV.to(ctx.state_dtype),
            None if dt_bias_H is None else found.dt_bias_H.to(dt_bias_H.dtype),
            dbefore_BPHV,
        )
