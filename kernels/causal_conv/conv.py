"""Depthwise causal convolution with optional SiLU: public operations, autograd node, and the CPU path.

The CPU path does shifted multiply-adds over slabs of tokens that fit the caches. Taps that would reach before a
document are undone by clearing the few first rows of documents between two taps: after the taps that look back s
or more, the rows with fewer than s tokens before them hold nothing yet. The backward clears in the opposite order.
"""

# B batch, T tokens, C channels, K conv taps.

from bisect import bisect_left
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from transmamba.kernels import backend
from transmamba.kernels.causal_conv.triton_conv import conv_bwd, conv_fwd
from transmamba.kernels.causal_conv.triton_step import step_fwd
from transmamba.kernels.documents import Documents

Activation = Literal["silu", "none"]

SLAB_ELEMENTS = 1 << 18  # values worked on at a time: 1 MiB in float32


def causal_conv(
    x_BTC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor,
    *,
    documents: Documents | None = None,
    activation: Activation = "silu",
    tail_BKC: Tensor | None = None,
) -> Tensor:
    """Mix every channel with its own last K tokens; `weight_CK[:, K - 1]` multiplies the current one.

    Equals `nn.Conv1d(C, C, K, groups=C)` on left-padded rows, then the activation. float32 sums (float64 for
    float64 input); fastest when rows and tokens, in either order, are the outer dimensions in memory.
    Source: Mamba, arXiv 2312.00752, figure 3.

    Args:
        x_BTC: any strides.
        weight_CK, bias_C: taps and bias.
        documents: taps do not reach before the start of a document; `tail_BKC` is then unused, since every
            row starts one.
        activation: "silu" or "none".
        tail_BKC: the K - 1 tokens before the row, [B, K - 1, C]; default zeros.

    Returns:
        y_BTC in the dtype and the memory order of `x_BTC`.

    Raises:
        ValueError: shapes disagree or the activation is unknown.
    """
    tail_BKC = None if documents is not None else tail_BKC
    _check(x_BTC, weight_CK, bias_C, activation, tail_BKC)
    if documents is not None and (documents.n_rows, documents.n_tokens) != x_BTC.shape[:2]:
        raise ValueError(f"documents of {documents.n_rows} rows of {documents.n_tokens} for {tuple(x_BTC.shape)}")
    return _Conv.apply(x_BTC, weight_CK, bias_C, tail_BKC, documents, activation)


def conv_step(
    tail_BKC: Tensor, x_BC: Tensor, weight_CK: Tensor, bias_C: Tensor, *, activation: Activation = "silu"
) -> tuple[Tensor, Tensor]:
    """One token of `causal_conv`, for decoding.

    Args:
        tail_BKC: the K - 1 tokens before this one, [B, K - 1, C]; zeros at the start of a document.
        x_BC: the token.

    Returns:
        y_BC, and the tail for the next token, a new tensor. Triton runs it in one launch unless gradients are wanted.

    Raises:
        ValueError: shapes disagree or the activation is unknown.
    """
    weights = (tail_BKC, x_BC, weight_CK, bias_C)
    has_gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in weights)
    if backend.runs_triton(x_BC) and not has_gradients:
        _check(x_BC[:, None], weight_CK, bias_C, activation, tail_BKC)
        return step_fwd(tail_BKC, x_BC, weight_CK, bias_C, activation)
    window_BKC = torch.cat([tail_BKC, x_BC[:, None]], dim=1)
    y_BTC = causal_conv(x_BC[:, None], weight_CK, bias_C, activation=activation, tail_BKC=tail_BKC)
    return y_BTC[:, 0], window_BKC[:, 1:]


class _ConvGrads(NamedTuple):
    x_BTC: Tensor
    weight_CK: Tensor
    bias_C: Tensor
    tail_BKC: Tensor | None
    documents: None = None
    activation: None = None


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BTC: Tensor,
        weight_CK: Tensor,
        bias_C: Tensor,
        tail_BKC: Tensor | None,
        documents: Documents | None,
        activation: Activation,
    ) -> Tensor:
        ctx.save_for_backward(x_BTC, weight_CK, bias_C, tail_BKC)
        ctx.documents, ctx.activation = documents, activation
        if backend.runs_triton(x_BTC):
            return conv_fwd(x_BTC, weight_CK, bias_C, tail_BKC, _positions(documents), activation)
        return _forward(x_BTC, weight_CK, bias_C, tail_BKC, documents, activation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> _ConvGrads:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dy_BTC,) = grads
        x_BTC, weight_CK, bias_C, tail_BKC = ctx.saved_tensors
        if backend.runs_triton(x_BTC):
            pos_BT = _positions(ctx.documents)
            dx, dweight, dbias, dtail = conv_bwd(x_BTC, weight_CK, bias_C, tail_BKC, pos_BT, ctx.activation, dy_BTC)
        else:
            dx, dweight, dbias, dtail = _backward(
                x_BTC, weight_CK, bias_C, tail_BKC, ctx.documents, ctx.activation, dy_BTC
            )
        dtail = None if tail_BKC is None else dtail
        return _ConvGrads(dx, dweight, dbias.to(bias_C.dtype), dtail)


def _positions(documents: Documents | None) -> Tensor | None:
    """Offsets of tokens in their documents; none where taps only meet the row's own start."""
    return None if documents is None or documents.is_whole else documents.pos_BT


def _forward(
    x_BTC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor,
    tail_BKC: Tensor | None,
    documents: Documents | None,
    activation: Activation,
) -> Tensor:
    tail_BKC = _tail(x_BTC, weight_CK, tail_BKC)
    weight_KC, bias = _weights(x_BTC, weight_CK, bias_C)
    y_BTC = torch.empty_like(x_BTC)
    for start, stop in _slabs(x_BTC):
        pre_BTC = _preactivation(_window(x_BTC, tail_BKC, start, stop), weight_KC, bias, documents, start)
        y_BTC[:, start:stop] = silu(pre_BTC, inplace=True) if activation == "silu" else pre_BTC
    return y_BTC


def _backward(
    x_BTC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor,
    tail_BKC: Tensor | None,
    documents: Documents | None,
    activation: Activation,
    dy_BTC: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tail_BKC = _tail(x_BTC, weight_CK, tail_BKC)
    weight_KC, bias = _weights(x_BTC, weight_CK, bias_C)
    dweight_KC, dbias_C = torch.zeros_like(weight_KC), torch.zeros_like(bias)
    dx_BTC = torch.empty_like(x_BTC)
    dtail_BKC = torch.zeros_like(tail_BKC, dtype=bias.dtype)
    for start, stop in reversed(_slabs(x_BTC)):
        window = _window(x_BTC, tail_BKC, start, stop)
        if activation == "silu":
            pre_BTC = _preactivation(window, weight_KC, bias, documents, start)
            dpre_BTC = torch.ops.aten.silu_backward(dy_BTC[:, start:stop].to(bias.dtype), pre_BTC)
        else:
            dpre_BTC = dy_BTC[:, start:stop].to(bias.dtype, copy=True)
        dbias_C += dpre_BTC.sum((0, 1))
        dwindow = _adjoint(dpre_BTC, window, weight_KC, dweight_KC, dtail_BKC, documents, start)
        n_tail = tail_BKC.shape[1]
        dtail_BKC, dx_BTC[:, start:stop] = dwindow[:, :n_tail], dwindow[:, n_tail:]
    return dx_BTC, dweight_KC.T.to(weight_CK.dtype), dbias_C, dtail_BKC.to(tail_BKC.dtype)


def _tail(x_BTC: Tensor, weight_CK: Tensor, tail_BKC: Tensor | None) -> Tensor:
    return x_BTC.new_zeros(x_BTC.shape[0], weight_CK.shape[1] - 1, x_BTC.shape[2]) if tail_BKC is None else tail_BKC


def _check(x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor, activation: str, tail_BKC: Tensor | None) -> None:
    if activation not in ("silu", "none"):
        raise ValueError(f'activation is "silu" or "none", got {activation!r}')
    if x_BTC.dim() != 3 or weight_CK.dim() != 2 or bias_C.shape != x_BTC.shape[2:]:
        raise ValueError(f"x {tuple(x_BTC.shape)} and bias {tuple(bias_C.shape)} do not match")
    if weight_CK.shape[0] != x_BTC.shape[2] or weight_CK.shape[1] == 0:
        raise ValueError(f"weight {tuple(weight_CK.shape)} does not match {x_BTC.shape[2]} channels")
    tail_shape = (x_BTC.shape[0], weight_CK.shape[1] - 1, x_BTC.shape[2])
    if tail_BKC is not None and tail_BKC.shape != tail_shape:
        raise ValueError(f"tail {tuple(tail_BKC.shape)}, need {tail_shape}")


def _weights(x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor) -> tuple[Tensor, Tensor]:
    """Taps first, and the bias, in the working precision."""
    work = torch.float64 if x_BTC.dtype == torch.float64 else torch.float32
    return weight_CK.to(work).T.contiguous(), bias_C.to(work)


def _slabs(x_BTC: Tensor) -> list[tuple[int, int]]:
    n_rows, n_tokens, n_channels = x_BTC.shape
    step = max(SLAB_ELEMENTS // max(n_rows * n_channels, 1), 1)
    return [(start, min(start + step, n_tokens)) for start in range(0, n_tokens, step)]


def _window(x_BTC: Tensor, tail_BKC: Tensor, start: int, stop: int) -> Tensor:
    """The tokens of a slab and the K - 1 before them; a view of x where it can be."""
    n_tail = tail_BKC.shape[1]
    work = torch.float64 if x_BTC.dtype == torch.float64 else torch.float32
    if start >= n_tail:
        return x_BTC[:, start - n_tail : stop].to(work)
    return torch.cat([tail_BKC[:, start:].to(work), x_BTC[:, :stop].to(work)], dim=1)


def _preactivation(
    window: Tensor, weight_KC: Tensor, bias_C: Tensor, documents: Documents | None, start: int
) -> Tensor:
    """Bias plus taps, the one that looks back farthest first."""
    n_tail = weight_KC.shape[0] - 1
    n_slab = window.shape[1] - n_tail
    pre_BTC = torch.addcmul(bias_C, window[:, :n_slab], weight_KC[0])
    for tap in range(1, n_tail + 1):
        _fill_edges(pre_BTC, bias_C, documents, n_tail - tap + 1, start)
        pre_BTC.addcmul_(window[:, tap : tap + n_slab], weight_KC[tap])
    return pre_BTC


def _adjoint(
    dpre_BTC: Tensor,
    window: Tensor,
    weight_KC: Tensor,
    dweight_KC: Tensor,
    dafter_BKC: Tensor,
    documents: Documents | None,
    start: int,
) -> Tensor:
    """Gradient of the window; adds to that of the taps. `dafter_BKC`: what later slabs send to its end."""
    n_tail = weight_KC.shape[0] - 1
    n_slab = dpre_BTC.shape[1]
    dwindow = torch.zeros_like(window)
    dwindow[:, n_slab:] = dafter_BKC
    product, zero = torch.empty_like(dpre_BTC), dpre_BTC.new_zeros(())
    for tap in range(n_tail, -1, -1):
        _fill_edges(dpre_BTC, zero, documents, n_tail - tap, start)
        torch.mul(dpre_BTC, window[:, tap : tap + n_slab], out=product)
        dweight_KC[tap] += product.sum((0, 1))
        dwindow[:, tap : tap + n_slab].addcmul_(dpre_BTC, weight_KC[tap])
    return dwindow


def _fill_edges(slab_BTC: Tensor, value: Tensor, documents: Documents | None, n_edge: int, start: int) -> None:
    """Overwrite the rows with fewer than `n_edge` tokens of their document before them."""
    if documents is None or documents.is_whole:
        return
    columns, column_index, row_index = documents.edge_rows(n_edge)
    first, last = bisect_left(columns, start), bisect_left(columns, start + slab_BTC.shape[1])
    if last > first:
        slab_BTC[row_index[first:last], column_index[first:last] - start] = value
