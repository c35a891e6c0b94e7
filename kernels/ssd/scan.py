"""Public scan operations: input checks, the autograd node, and the single-token step."""

# B batch, T tokens, H heads, G groups of B and C, N key/state width, V value width.

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from transmamba.kernels.documents import Documents
from transmamba.kernels.ssd.chunked import Kept, scan_backward, scan_forward
from transmamba.kernels.ssd.slabs import Streams, working_dtype


def ssd_scan(
    c_BTGN: Tensor,
    b_BTGN: Tensor,
    x_BTHV: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    *,
    D_H: Tensor | None = None,
    initial_state_BHNV: Tensor | None = None,
    documents: Documents | None = None,
    first_output: int = 0,
) -> tuple[Tensor, Tensor]:
    """Selective state-space scan: S_t = exp(dt_t A) S_{t-1} + dt_t b_t x_t^T, y_t = c_t^T S_t + D x_t.

    Source: Mamba-2, arXiv 2405.21060; with `first_output` at the TransPoint, the Memory Converter and the
    scan behind it of TransMamba, arXiv 2503.24067, equations 7 to 9, in one pass.

    Args:
        c_BTGN, b_BTGN: what tokens read and where they write; G divides H, group g serves heads g * H / G on.
        x_BTHV: values.
        dt_BTH: step sizes after softplus, > 0, float32 (float64 for float64 values).
        A_H: decay rates per head, < 0.
        D_H: skip weights per head.
        initial_state_BHNV: state before the row. A document that starts at column 0 drops it, so with
            `documents` it has no effect.
        documents: boundaries at which the state starts from zero.
        first_output: outputs before this token are not wanted: they are returned as zeros, send no gradient,
            and their tokens only build state.

    Returns:
        y_BTHV in the dtype of `x_BTHV`; the state after the last token, float32 (float64 for float64 values).

    Raises:
        ValueError: shapes disagree, G does not divide H, or `first_output` is not in 0..T.
    """
    streams = Streams(c_BTGN, b_BTGN, x_BTHV, dt_BTH, A_H, D_H)
    _check(streams, initial_state_BHNV, documents, first_output)
    n_rows, _, n_heads, n_values = x_BTHV.shape
    work = working_dtype(x_BTHV.dtype)
    if initial_state_BHNV is None:
        state_BHNV = x_BTHV.new_zeros(n_rows, n_heads, b_BTGN.shape[3], n_values, dtype=work)
    else:
        state_BHNV = initial_state_BHNV.to(work)
        if documents is not None and documents.n_tokens:
            state_BHNV = state_BHNV.masked_fill(documents.reset_BT[:, 0, None, None, None], 0)
    return _Scan.apply(*streams, state_BHNV, documents, first_output, torch.is_grad_enabled())


def final_state(
    b_BTGN: Tensor,
    x_BTHV: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    *,
    initial_state_BHNV: Tensor | None = None,
    documents: Documents | None = None,
) -> Tensor:
    """State that a scan holds after the last token: the Memory Converter, keys read as b and values as x.

    Source: TransMamba, arXiv 2503.24067, equations 8 and 9. Arguments and errors as in `ssd_scan`.

    Returns:
        state_BHNV, float32 (float64 for float64 values); the initial state, or zeros, when T is 0.
    """
    return ssd_scan(
        b_BTGN.detach(),
        b_BTGN,
        x_BTHV,
        dt_BTH,
        A_H,
        initial_state_BHNV=initial_state_BHNV,
        documents=documents,
        first_output=x_BTHV.shape[1],
    )[1]


def ssd_step(
    state_BHNV: Tensor,
    c_BGN: Tensor,
    b_BGN: Tensor,
    x_BHV: Tensor,
    dt_BH: Tensor,
    A_H: Tensor,
    *,
    D_H: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One token of the scan, for decoding.

    Args:
        state_BHNV: state before the token, float32 or float64; kept unchanged.
        c_BGN, b_BGN, x_BHV, dt_BH, A_H, D_H: as in `ssd_scan`, without the token axis.

    Returns:
        y_BHV in the dtype of `x_BHV`; the state after the token in the dtype of `state_BHNV`.

    Raises:
        ValueError: G does not divide H.
    """
    n_heads, work = x_BHV.shape[1], state_BHNV.dtype
    if n_heads % b_BGN.shape[1]:
        raise ValueError(f"{b_BGN.shape[1]} groups do not divide {n_heads} heads")
    n_shared = n_heads // b_BGN.shape[1]
    c_BHN, b_BHN = (stream.to(work).repeat_interleave(n_shared, 1) for stream in (c_BGN, b_BGN))
    x, dt = x_BHV.to(work), dt_BH.to(work)
    decay_BH = (dt * A_H.to(work)).exp()
    write_BHNV = b_BHN[..., None] * (dt[..., None] * x)[..., None, :]
    state_BHNV = torch.addcmul(write_BHNV, state_BHNV, decay_BH[..., None, None])
    y_BHV = (c_BHN[..., None, :] @ state_BHNV).squeeze(-2)
    if D_H is not None:
        y_BHV = y_BHV + D_H.to(work)[:, None] * x
    return y_BHV.to(x_BHV.dtype), state_BHNV


def _check(streams: Streams, state: Tensor | None, documents: Documents | None, first_output: int) -> None:
    c, b, x, dt, A, D = streams
    if c.dim() != 4 or x.dim() != 4:
        raise ValueError(f"the scan needs 4-dimensional c and x, got {tuple(c.shape)} and {tuple(x.shape)}")
    if c.shape != b.shape or c.shape[:2] != x.shape[:2] or dt.shape != x.shape[:3]:
        raise ValueError(
            f"c {tuple(c.shape)}, b {tuple(b.shape)}, x {tuple(x.shape)}, dt {tuple(dt.shape)} do not match"
        )
    n_rows, n_tokens, n_heads, n_values = x.shape
    if c.shape[2] == 0 or n_heads % c.shape[2]:
        raise ValueError(f"{c.shape[2]} groups do not divide {n_heads} heads")
    if A.shape != (n_heads,) or (D is not None and D.shape != (n_heads,)):
        raise ValueError(f"A {tuple(A.shape)} and D must have one entry for each of {n_heads} heads")
    if state is not None and state.shape != (n_rows, n_heads, c.shape[3], n_values):
        raise ValueError(f"initial state {tuple(state.shape)}, need {(n_rows, n_heads, c.shape[3], n_values)}")
    if documents is not None and (documents.n_rows, documents.n_tokens) != (n_rows, n_tokens):
        raise ValueError(f"documents of {documents.n_rows} rows of {documents.n_tokens} for x {tuple(x.shape)}")
    if not 0 <= first_output <= n_tokens:
        raise ValueError(f"first_output {first_output} is outside 0..{n_tokens}")


class _NodeGrads(NamedTuple):
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


class _Scan(torch.autograd.Function):
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
    def backward(ctx: Any, *grads: Tensor) -> _NodeGrads:  # pyright: ignore[reportIncompatibleMethodOverride]
        dy_BTHV, dstate_BHNV = grads
        saved = ctx.saved_tensors
        streams = Streams(*saved[: len(Streams._fields)])
        slabs = saved[len(streams) :]
        kept = [Kept(*pair) for pair in zip(slabs[::2], slabs[1::2], strict=True)]
        found = scan_backward(streams, kept, ctx.documents, ctx.first_output, dy_BTHV, dstate_BHNV)
        return _NodeGrads(
            found.c_BTGN,
            found.b_BTGN,
            found.x_BTHV,
            found.dt_BTH,
            found.A_H.to(streams.A_H.dtype),
            None if streams.D_H is None else found.D_H.to(streams.D_H.dtype),
            found.initial_state_BHNV,
        )
