"""The scan in chunks as a node of autograd."""

# B batch, T tokens, H heads, G groups of B and C, N key/state width, V value width.

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from transmamba.kernels.documents import Documents
from transmamba.kernels.ssd.chunked import Kept, scan_backward, scan_forward
from transmamba.kernels.ssd.slabs import Streams


class _ChunkedScanGrads(NamedTuple):
    c_BTGN: Tensor
    b_BTGN: Tensor
    x_BTHV: Tensor
    dt_BTH: Tensor
    A_H: Tensor
    D_H: Tensor | None
    state_BHNV: Tensor
    documents: None = None
    first_output: None = None
    keep: None = None


class ChunkedScan(torch.autograd.Function):
    """Outputs, zeros before `first_output`, and final state of a scan that starts from `state_BHNV`."""

    @staticmethod
    def forward(
        ctx: Any,
        c_BTGN: Tensor,
        b_BTGN: Tensor,
        x_BTHV: Tensor,
        dt_BTH: Tensor,
        A_H: Tensor,
        D_H: Tensor | None,
        state_BHNV: Tensor,
        documents: Documents | None,
        first_output: int,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        streams = Streams(c_BTGN, b_BTGN, x_BTHV, dt_BTH, A_H, D_H)
        keep = keep and any(ctx.needs_input_grad)
        y_BTHV, final_BHNV, kept = scan_forward(streams, state_BHNV, documents, first_output, keep)
        ctx.save_for_backward(*streams, *(tensor for slab in kept for tensor in slab))
        ctx.documents, ctx.first_output = documents, first_output
        return y_BTHV, final_BHNV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> _ChunkedScanGrads:  # pyright: ignore[reportIncompatibleMethodOverride]
        dy_BTHV, dstate_BHNV = grads
        saved = ctx.saved_tensors
        streams = Streams(*saved[: len(Streams._fields)])
        slabs = saved[len(streams) :]
        kept = [Kept(*pair) for pair in zip(slabs[::2], slabs[1::2], strict=True)]
        found = scan_backward(streams, kept, ctx.documents, ctx.first_output, dy_BTHV, dstate_BHNV)
        return _ChunkedScanGrads(
            found.c_BTGN,
            found.b_BTGN,
            found.x_BTHV,
            found.dt_BTH,
            found.A_H.to(streams.A_H.dtype),
            None if streams.D_H is None else found.D_H.to(streams.D_H.dtype),
            found.initial_state_BHNV,
        )
