"""What the convolution's Triton kernels share: a walk along the tokens of a row with the last K of them at hand."""

# B batch, T tokens, C channels, K conv taps.
# `window[s]` and `taps[s]` belong to the token s before the current one. A `line` is a batch row of a tensor: the
# pointer to its first token and the stride between tokens. `lane` is a program's channels, and which of them exist.
# Tuples grow with `+=`: Triton knows no unpacking.
# Python numbers become constexpr and jitted functions return values, which their annotations cannot say.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def place(B, C, tokens_per_program, CHANNELS: tl.constexpr):
    """This program's lane, batch row, index among those of its channels, and first token; channels run fastest."""
    program = tl.program_id(0).to(tl.int64)
    n_blocks = tl.cdiv(C, CHANNELS)
    channel = (program % n_blocks) * CHANNELS + tl.arange(0, CHANNELS)
    share = program // n_blocks
    return (channel, channel < C), share % B, share, (share // B) * tokens_per_program


@triton.jit
def load_taps(weight_pointer, bias_pointer, channel_stride, tap_stride, lane, K: tl.constexpr):
    """Taps, that of the current token first, and the bias, in float32."""
    channel, in_width = lane
    pointer = weight_pointer + channel * channel_stride
    taps = ()
    for _ in tl.static_range(K):
        farther = taps
        taps = (tl.load(pointer, mask=in_width, other=0.0).to(tl.float32),)
        taps += farther
        pointer += tap_stride
    return taps, tl.load(bias_pointer + channel, mask=in_width, other=0.0).to(tl.float32)


@triton.jit
def load_window(x_line, tail_line, start, lane, K: tl.constexpr, HAS_TAIL: tl.constexpr):
    """The tokens before `start`: of the row, of the tail, or zeros. The last entry is filler, never read."""
    channel, in_width = lane
    window = ()
    for back in tl.static_range(1, K):
        token = start - back
        pointer = x_line[0] + token * x_line[1] + channel
        x = tl.load(pointer, mask=in_width & (token >= 0), other=0.0).to(tl.float32)
        if HAS_TAIL:
            pointer = tail_line[0] + (token + K - 1) * tail_line[1] + channel
            tail = tl.load(pointer, mask=in_width & (token < 0), other=0.0).to(tl.float32)
            x = tl.where(token < 0, tail, x)
        window += (x,)
    window += (tl.zeros_like(channel).to(tl.float32),)
    return window


@triton.jit
def load_tokens(line, token, n_left, lane, UNROLL: tl.constexpr):
    """UNROLL tokens in the tensor's dtype, bfloat16 being half the registers of float32; zeros past `n_left`."""
    channel, in_width = lane
    values = ()
    for step in tl.static_range(UNROLL):
        pointer = line[0] + (token + step) * line[1] + channel
        values += (tl.load(pointer, mask=in_width & (step < n_left), other=0.0),)
    return values


@triton.jit
def stays_inside(pos_line, token, n_left, K: tl.constexpr, UNROLL: tl.constexpr, HAS_POS: tl.constexpr):
    """Whether all taps of UNROLL tokens stay in their document. Positions grow by one, so the last one tells."""
    inside = True
    if HAS_POS:
        last = tl.load(pos_line[0] + (token + UNROLL - 1) * pos_line[1], mask=n_left >= UNROLL, other=0)
        inside = last >= UNROLL + K - 2
    return inside


@triton.jit
def convolve(window, value, taps, bias, pos, K: tl.constexpr, AT_EDGE: tl.constexpr):
    """Window of the next token, what of it is in the same document, and the pre-activation, farthest tap first."""
    moved = (value.to(tl.float32),)
    for back in tl.static_range(1, K):
        moved += (window[back - 1],)
    visible = moved
    if AT_EDGE:
        visible = (moved[0],)
        for back in tl.static_range(1, K):
            visible += (tl.where(pos >= back, moved[back], 0.0),)
    pre = bias
    for index in tl.static_range(K):
        pre += taps[K - 1 - index] * visible[K - 1 - index]
    return moved, visible, pre
