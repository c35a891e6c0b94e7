"""Causal convolution in Triton: one pass forward, one pass backward."""

# B batch, T tokens, C channels, K conv taps. Words of `triton_window`: line, lane, window.
# Python numbers become constexpr and jitted functions return values, which their annotations cannot say.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from transmamba.kernels.causal_conv.triton_window import (
    convolve,
    load_taps,
    load_tokens,
    load_window,
    place,
    stays_inside,
)

# Channels of a program, of two warps: 16 bytes of bfloat16 a thread, and half of it in the backward, which holds
# twice the state. Above four taps halve both, or registers spill. A channel a thread where 16 bytes cannot be one load.
FWD_CHANNELS = 512
BWD_CHANNELS = 256
UNALIGNED = 64
# Tokens loaded before any is used: with 128 registers a thread about 32 KiB a multiprocessor are on their way.
UNROLL = 4
N_WARPS = 2
MOST_REGISTERS, MORE_REGISTERS = 128, 255  # up to four taps, above
# Programs that an H200 runs at once: 132 multiprocessors, 8 each. A constant, so that no sum depends on the device.
N_PROGRAMS = 1056
# Runs of tokens: shorter ones cost more in taps, tokens read twice and partial sums than they bring in parallel work;
# much longer ones leave nothing to level out when other kernels share the GPU.
MIN_TOKENS, MANY_TOKENS = 32, 256


@triton.jit
def fwd_tokens(
    window, values, taps, bias, pos_line, y_line, token, n_left, lane,
    K: tl.constexpr, UNROLL: tl.constexpr, SILU: tl.constexpr, AT_EDGE: tl.constexpr,
):  # fmt: skip
    """Convolve UNROLL tokens from `token` on; returns the window of the last."""
    channel, in_width = lane
    for step in tl.static_range(UNROLL):
        pos = K
        if AT_EDGE:
            pos = tl.load(pos_line[0] + (token + step) * pos_line[1], mask=step < n_left, other=0)
        window, _, y = convolve(window, values[step], taps, bias, pos, K, AT_EDGE)
        if SILU:
            y = y / (1.0 + tl.exp(-y))
        pointer = y_line[0] + (token + step) * y_line[1] + channel
        tl.store(pointer, y.to(y_line[0].dtype.element_ty), mask=in_width & (step < n_left))
    return window


@triton.jit
def conv_fwd_kernel(
    x_pointer, weight_pointer, bias_pointer, tail_pointer, pos_pointer, y_pointer,
    B, T, C, tokens_per_program,
    x_batch_stride, x_token_stride, weight_channel_stride, weight_tap_stride, tail_batch_stride, tail_token_stride,
    pos_batch_stride, pos_token_stride, y_batch_stride, y_token_stride,
    K: tl.constexpr, CHANNELS: tl.constexpr, UNROLL: tl.constexpr,
    SILU: tl.constexpr, HAS_TAIL: tl.constexpr, HAS_POS: tl.constexpr,
):  # fmt: skip
    lane, row, _, start = place(B, C, tokens_per_program, CHANNELS)
    x_line = (x_pointer + row * x_batch_stride, x_token_stride)
    tail_line = (tail_pointer + row * tail_batch_stride, tail_token_stride)
    pos_line = (pos_pointer + row * pos_batch_stride, pos_token_stride)
    y_line = (y_pointer + row * y_batch_stride, y_token_stride)
    taps, bias = load_taps(weight_pointer, bias_pointer, weight_channel_stride, weight_tap_stride, lane, K)
    window = load_window(x_line, tail_line, start, lane, K, HAS_TAIL)
    for offset in range(0, tl.minimum(tokens_per_program, T - start), UNROLL):
        token = start + offset
        n_left = (T - token).to(tl.int32)
        values = load_tokens(x_line, token, n_left, lane, UNROLL)
        if stays_inside(pos_line, token, n_left, K, UNROLL, HAS_POS):
            window = fwd_tokens(
                window, values, taps, bias, pos_line, y_line, token, n_left, lane, K, UNROLL, SILU, False
            )  # fmt: skip
        else:
            window = fwd_tokens(
                window, values, taps, bias, pos_line, y_line, token, n_left, lane, K, UNROLL, SILU, HAS_POS
            )  # fmt: skip


@triton.jit
def bwd_token(
    state, value, dy, taps, bias, pos, is_own, K: tl.constexpr, SILU: tl.constexpr, AT_EDGE: tl.constexpr
):  # fmt: skip
    """What one token adds to the gradients; `pending[s]` is what dx of the token s back has so far."""
    window, pending, dtaps, dbias = state
    window, visible, pre = convolve(window, value, taps, bias, pos, K, AT_EDGE)
    dpre = dy.to(tl.float32)
    if SILU:
        sigmoid = 1.0 / (1.0 + tl.exp(-pre))
        dpre *= sigmoid * (1.0 + pre * (1.0 - sigmoid))
    own = dpre
    if AT_EDGE:
        own = tl.where(is_own, dpre, 0.0)
    grown, summed = (taps[0] * dpre,), (dtaps[0] + own * visible[0],)
    for back in tl.static_range(1, K):
        sent = dpre
        if AT_EDGE:
            sent = tl.where(pos >= back, dpre, 0.0)
        grown += (pending[back - 1] + taps[back] * sent,)
        summed += (dtaps[back] + own * visible[back],)
    return window, grown, summed, dbias + own


@triton.jit
def bwd_tokens(
    state, x_values, dy_values, taps, bias, pos_line, dx_line, dtail_line, token, n_left, start, stop, lane,
    K: tl.constexpr, UNROLL: tl.constexpr,
    SILU: tl.constexpr, HAS_TAIL: tl.constexpr, HAS_POS: tl.constexpr, AT_EDGE: tl.constexpr,
):  # fmt: skip
    """Gradients of UNROLL tokens from `token` on; the program's own tokens are those from `start` to `stop`."""
    channel, in_width = lane
    for step in tl.static_range(UNROLL):
        pos = K
        if AT_EDGE and HAS_POS:
            pos = tl.load(pos_line[0] + (token + step) * pos_line[1], mask=step < n_left, other=0)
        state = bwd_token(
            state, x_values[step], dy_values[step], taps, bias, pos, token + step < stop, K, SILU, AT_EDGE
        )  # fmt: skip
        done = token + step - (K - 1)
        dx = state[1][K - 1]
        is_own = in_width
        if AT_EDGE:
            is_own = in_width & (done >= start) & (done < stop)
            if HAS_TAIL:
                pointer = dtail_line[0] + (done + K - 1) * dtail_line[1] + channel
                tl.store(pointer, dx.to(dtail_line[0].dtype.element_ty), mask=in_width & (done < 0))
        tl.store(dx_line[0] + done * dx_line[1] + channel, dx.to(dx_line[0].dtype.element_ty), mask=is_own)
    return state


@triton.jit
def conv_bwd_kernel(
    x_pointer, weight_pointer, bias_pointer, tail_pointer, pos_pointer, dy_pointer,
    dx_pointer, dtail_pointer, partial_pointer,
    B, T, C, tokens_per_program,
    x_batch_stride, x_token_stride, weight_channel_stride, weight_tap_stride, tail_batch_stride, tail_token_stride,
    pos_batch_stride, pos_token_stride, dy_batch_stride, dy_token_stride, dx_batch_stride, dx_token_stride,
    K: tl.constexpr, CHANNELS: tl.constexpr, UNROLL: tl.constexpr,
    SILU: tl.constexpr, HAS_TAIL: tl.constexpr, HAS_POS: tl.constexpr,
):  # fmt: skip
    lane, row, share, start = place(B, C, tokens_per_program, CHANNELS)
    channel, in_width = lane
    stop = tl.minimum(start + tokens_per_program, T)
    x_line = (x_pointer + row * x_batch_stride, x_token_stride)
    tail_line = (tail_pointer + row * tail_batch_stride, tail_token_stride)
    pos_line = (pos_pointer + row * pos_batch_stride, pos_token_stride)
    dy_line = (dy_pointer + row * dy_batch_stride, dy_token_stride)
    dx_line = (dx_pointer + row * dx_batch_stride, dx_token_stride)
    dtail_line = (dtail_pointer + row * (K - 1) * C, C)
    taps, bias = load_taps(weight_pointer, bias_pointer, weight_channel_stride, weight_tap_stride, lane, K)
    zero = tl.zeros_like(bias)
    zeros = ()
    for _ in tl.static_range(K):
        zeros += (zero,)
    state = (load_window(x_line, tail_line, start, lane, K, HAS_TAIL), zeros, zeros, zero)
    # the K - 1 tokens after the last own one still send gradients back to it
    for offset in range(0, stop - start + K - 1, UNROLL):
        token = start + offset
        n_left = (T - token).to(tl.int32)
        x_values = load_tokens(x_line, token, n_left, lane, UNROLL)
        dy_values = load_tokens(dy_line, token, n_left, lane, UNROLL)
        is_inner = (offset >= K - 1) & (token + UNROLL <= stop)
        if is_inner & stays_inside(pos_line, token, n_left, K, UNROLL, HAS_POS):
            state = bwd_tokens(
                state, x_values, dy_values, taps, bias, pos_line, dx_line, dtail_line, token, n_left, start, stop,
                lane, K, UNROLL, SILU, HAS_TAIL, HAS_POS, False,
            )  # fmt: skip
        else:
            state = bwd_tokens(
                state, x_values, dy_values, taps, bias, pos_line, dx_line, dtail_line, token, n_left, start, stop,
                lane, K, UNROLL, SILU, HAS_TAIL, HAS_POS, True,
            )  # fmt: skip
    partial = partial_pointer + share * (K + 1) * C + channel
    for tap in tl.static_range(K):
        tl.store(partial, state[2][K - 1 - tap], mask=in_width)
        partial += C
    tl.store(partial, state[3], mask=in_width)


def conv_fwd(
    x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor, tail_BKC: Tensor | None, pos_BT: Tensor | None, activation: str
) -> Tensor:
    """Result in the memory order of `x_BTC`; `pos_BT`: integer offset of every token in its document."""
    x = _channels_last(x_BTC)
    tail, pos = x if tail_BKC is None else _channels_last(tail_BKC), x if pos_BT is None else pos_BT
    y_BTC = torch.empty_like(x)
    sizes, n_shares, options = _launch(x, weight_CK, FWD_CHANNELS, 0)
    conv_fwd_kernel[(n_shares * triton.cdiv(x.shape[2], options["CHANNELS"]),)](
        x, weight_CK, bias_C.contiguous(), tail, pos, y_BTC, *sizes,
        *x.stride()[:2], *weight_CK.stride(), *tail.stride()[:2], *pos.stride()[:2], *y_BTC.stride()[:2],
        SILU=activation == "silu", HAS_TAIL=tail_BKC is not None, HAS_POS=pos_BT is not None, **options,
    )  # fmt: skip
    return y_BTC


def conv_bwd(
    x_BTC: Tensor,
    weight_CK: Tensor,
    bias_C: Tensor,
    tail_BKC: Tensor | None,
    pos_BT: Tensor | None,
    activation: str,
    dy_BTC: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of x, of taps and bias (both in the dtype of the taps), and of the tail."""
    x = _channels_last(x_BTC)
    tail, pos = x if tail_BKC is None else _channels_last(tail_BKC), x if pos_BT is None else pos_BT
    dy = _channels_last(dy_BTC)
    n_channels, n_taps = weight_CK.shape
    dx_BTC = torch.empty_like(x)
    dtail_BKC = None if tail_BKC is None else tail_BKC.new_empty(tail_BKC.shape)
    sizes, n_shares, options = _launch(x, weight_CK, BWD_CHANNELS, n_taps - 1)
    partial = torch.empty(n_shares, n_taps + 1, n_channels, dtype=torch.float32, device=x.device)
    conv_bwd_kernel[(n_shares * triton.cdiv(n_channels, options["CHANNELS"]),)](
        x, weight_CK, bias_C.contiguous(), tail, pos, dy,
        dx_BTC, dx_BTC if dtail_BKC is None else dtail_BKC, partial, *sizes,
        *x.stride()[:2], *weight_CK.stride(), *tail.stride()[:2], *pos.stride()[:2], *dy.stride()[:2],
        *dx_BTC.stride()[:2],
        SILU=activation == "silu", HAS_TAIL=tail_BKC is not None, HAS_POS=pos_BT is not None, **options,
    )  # fmt: skip
    sums = partial.sum(0).to(weight_CK.dtype)
    return dx_BTC, sums[:n_taps].T, sums[n_taps], dtail_BKC


def _channels_last(x_BTC: Tensor) -> Tensor:
    """Rows and tokens with any strides; a copy only where channels are apart."""
    return x_BTC if x_BTC.stride(2) == 1 or x_BTC.shape[2] == 1 else x_BTC.contiguous()


def _launch(
    x_BTC: Tensor, weight_CK: Tensor, most_channels: int, n_halo: int
) -> tuple[tuple[int, int, int, int], int, dict[str, int]]:
    """Sizes, programs per block of channels, and compile-time options; programs walk `n_halo` tokens past theirs."""
    n_rows, n_tokens, n_channels = x_BTC.shape
    n_taps = weight_CK.shape[1]
    is_short = n_taps <= 4
    most_channels = most_channels if is_short else most_channels // 2
    channels = min(triton.next_power_of_2(max(n_channels, 1)), most_channels if n_channels % 16 == 0 else UNALIGNED)
    n_walks = n_rows * math.ceil(n_channels / channels)
    # whole waves of programs: one program more would double the time of a single wave
    n_waves = max(n_tokens * n_walks // (N_PROGRAMS * MANY_TOKENS), 1)
    run = max(math.ceil(n_tokens / max(N_PROGRAMS * n_waves // max(n_walks, 1), 1)), MIN_TOKENS)
    tokens_per_program = math.ceil((run + n_halo) / UNROLL) * UNROLL - n_halo
    n_shares = max(math.ceil(n_tokens / tokens_per_program), 1) * n_rows
    options = {"K": n_taps, "CHANNELS": channels, "UNROLL": UNROLL, "num_warps": N_WARPS}
    options["maxnreg"] = MOST_REGISTERS if is_short else MORE_REGISTERS
    return (n_rows, n_tokens, n_channels, tokens_per_program), n_shares, options
