"""Public scan operations: input checks, and the choice between the two devices' paths."""

# B batch, T tokens, H heads, G groups of B and C, N key/state width, V value width.

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from transmamba.kernels import backend
from transmamba.kernels.documents import Documents
from transmamba.kernels.ssd.chunked_node import ChunkedScan
from transmamba.kernels.ssd.slabs import Streams, working_dtype
from transmamba.kernels.ssd.triton_node import TritonScan
from transmamba.kernels.ssd.triton_scan import WIDEST_STATE, Problem


def ssd_scan(
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
    """Selective state-space scan: S_t = exp(dt_t A) S_{t-1} + dt_t b_t x_t^T, y_t = c_t^T S_t + D x_t.

    Source: Mamba-2, arXiv 2405.21060; with a TransPoint, the Memory Converter and the scan behind it of
    TransMamba, arXiv 2503.24067, equations 7 to 9, in one pass.

    Args:
        c_BTGN, b_BTGN: what tokens read and where they write; G divides H, group g serves heads g * H / G on.
        x_BTHV: values.
        dt_BTH: step sizes > 0; with `dt_bias_H` what they are made of: dt = softplus(dt_BTH + dt_bias_H), in float32
            (float64 for float64 values).
        A_H: decay rates per head, < 0.
        D_H: skip weights per head.
        initial_state_BHNV: state before the row. A document that starts at column 0 drops it, so with
            `documents` it has no effect.
        documents: boundaries at which the state starts from zero.
        transpoint: tokens whose offset in their document (in the row, without documents) is below it only build
            state: 0 to inf. They return what `before_BPHV` holds.
        before_BPHV: values for the tokens before the TransPoint, in the row's first P columns; P reaches the last
            of them. Default zeros.

    Returns:
        y_BTHV in the dtype of `x_BTHV`; the state after the last token, float32 (float64 for float64 values).

    Raises:
        ValueError: shapes disagree, G does not divide H, or `transpoint` is negative.
    """
    streams = Streams(c_BTGN, b_BTGN, x_BTHV, dt_BTH, A_H, D_H)
    _check(streams, dt_bias_H, initial_state_BHNV, documents, transpoint)
    if documents is not None and initial_state_BHNV is not None and x_BTHV.shape[1]:
        initial_state_BHNV = initial_state_BHNV.masked_fill(documents.reset_BT[:, 0, None, None, None], 0)
    if documents is not None and documents.is_whole:
        documents = None
    n_rows, n_tokens, n_heads, n_values = x_BTHV.shape
    P = math.ceil(min(transpoint, n_tokens))
    first_output = P if documents is None else documents.first_output(P)
    if before_BPHV is not None:
        _check_before(before_BPHV, x_BTHV, P if documents is None else n_tokens * (P > 0))
    work = working_dtype(x_BTHV.dtype)
    if x_BTHV.numel() and backend.runs_triton(x_BTHV) and c_BTGN.shape[3] <= WIDEST_STATE:
        problem = Problem(dt_bias_H, documents, P, first_output)
        return TritonScan.apply(*streams, initial_state_BHNV, dt_bias_H, before_BPHV, problem, torch.is_grad_enabled())
    if dt_bias_H is not None:
        streams = streams._replace(dt_BTH=softplus(dt_BTH.to(work) + dt_bias_H.to(work)))
    if initial_state_BHNV is None:
        state_BHNV = x_BTHV.new_zeros(n_rows, n_heads, b_BTGN.shape[3], n_values, dtype=work)
    else:
        state_BHNV = initial_state_BHNV.to(work)
    y_BTHV, state_BHNV = ChunkedScan.apply(*streams, state_BHNV, documents, first_output, torch.is_grad_enabled())
    if P > 0 and (documents is not None or before_BPHV is not None):
        y_BTHV = _with_before(y_BTHV, before_BPHV, documents, P)
    return y_BTHV, state_BHNV


def final_state(
    b_BTGN: Tensor,
    x_BTHV: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    *,
    dt_bias_H: Tensor | None = None,
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
        dt_bias_H=dt_bias_H,
        initial_state_BHNV=initial_state_BHNV,
        documents=documents,
        transpoint=math.inf,
    )[1]


def _with_before(y_BTHV: Tensor, before_BPHV: Tensor | None, documents: Documents | None, P: int) -> Tensor:
    """Outputs of the tokens from the TransPoint on; of those before it, what they were given, or zeros."""
    if documents is None:
        assert before_BPHV is not None
        return torch.cat([before_BPHV[:, :P], y_BTHV[:, P:]], dim=1)
    is_before_BT11 = (documents.pos_BT < P)[..., None, None]
    return y_BTHV.masked_fill(is_before_BT11, 0) if before_BPHV is None else before_BPHV.where(is_before_BT11, y_BTHV)


def _check_before(before: Tensor, x: Tensor, n_least: int) -> None:
    fits = before.dim() == 4 and before.shape[0] == x.shape[0] and before.shape[2:] == x.shape[2:]
    if not fits or not n_least <= before.shape[1] <= x.shape[1]:
        raise ValueError(f"before {tuple(before.shape)}, need {n_least} or more columns of x {tuple(x.shape)}")


def _check(
    streams: Streams,
    dt_bias: Tensor | None,
    state: Tensor | None,
    documents: Documents | None,
    transpoint: int | float,
) -> None:
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
    if dt_bias is not None and dt_bias.shape != (n_heads,):
        raise ValueError(f"dt_bias {tuple(dt_bias.shape)}, need one entry for each of {n_heads} heads")
    if state is not None and state.shape != (n_rows, n_heads, c.shape[3], n_values):
        raise ValueError(f"initial state {tuple(state.shape)}, need {(n_rows, n_heads, c.shape[3], n_values)}")
    if documents is not None and (documents.n_rows, documents.n_tokens) != (n_rows, n_tokens):
        raise ValueError(f"documents of {documents.n_rows} rows of {documents.n_tokens} for x {tuple(x.shape)}")
    if not transpoint >= 0:
        raise ValueError(f"transpoint {transpoint} is negative")
