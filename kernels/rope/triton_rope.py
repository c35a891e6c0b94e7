"""Rotary positions of queries and keys in Triton; the backward is the same kernel, turning back."""

# B batch, T tokens, H heads, N key width.
# Python numbers become constexpr and jitted functions return values, which their annotations cannot say.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportIndexIssue=false

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Pairs of a tile, of q and of k each: 1024 are 8 a thread at 4 warps, 16 bytes of bfloat16 in one load.
PAIRS_PER_TILE = 1024
# Heads of a tile. Sines are computed anew for each of them, but its rows in memory are that much longer.
HEADS_PER_TILE = 4
# Programs that fill a GPU: with fewer, several share the heads of a token.
ENOUGH_PROGRAMS = 1024

TWO_OVER_PI = tl.constexpr(2.0 / math.pi)
HALF_PI = tl.constexpr(math.pi / 2.0)


@triton.jit
def sine_cosine(angle):
    """Sine and cosine of float32 radians to float32 precision, however many turns they are.

    Whole quarter turns are taken off in float64. Of what is left, at most pi / 4, the first terms of both series that
    float32 cannot see are r^11 / 11! and r^12 / 12!.
    """
    exact = angle.to(tl.float64)
    quarters = tl.floor(exact * TWO_OVER_PI + 0.5)
    rest = (exact - quarters * HALF_PI).to(tl.float32)
    r2 = rest * rest
    odd = 1.0 - r2 * (1.0 / 72.0)
    odd = 1.0 - r2 * (1.0 / 42.0) * odd
    odd = 1.0 - r2 * (1.0 / 20.0) * odd
    odd = rest - rest * r2 * (1.0 / 6.0) * odd
    even = 1.0 - r2 * (1.0 / 90.0)
    even = 1.0 - r2 * (1.0 / 56.0) * even
    even = 1.0 - r2 * (1.0 / 30.0) * even
    even = 1.0 - r2 * (1.0 / 12.0) * even
    even = 1.0 - r2 * 0.5 * even
    quarter = quarters.to(tl.int32)
    is_turned = (quarter & 1) != 0
    sine, cosine = tl.where(is_turned, even, odd), tl.where(is_turned, odd, even)
    sine = tl.where((quarter & 2) != 0, -sine, sine)
    cosine = tl.where(((quarter + 1) & 2) != 0, -cosine, cosine)
    return sine, cosine


@triton.jit
def read_halves(pointer, place, mask, N_PAIRS: tl.constexpr):
    """First and second halves of some heads."""
    first = tl.load(pointer + place, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(pointer + place + N_PAIRS, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def write_turned(pointer, place, first, second, sine, cosine, mask, N_PAIRS: tl.constexpr):
    """Both halves rotated."""
    dtype = pointer.dtype.element_ty
    tl.store(pointer + place, (first * cosine - second * sine).to(dtype), mask=mask)
    tl.store(pointer + place + N_PAIRS, (second * cosine + first * sine).to(dtype), mask=mask)


@triton.jit
def rope_kernel(
    q_pointer, k_pointer, pos_pointer, q_out_pointer, k_out_pointer, n_tokens, T, n_heads, n_steps,
    q_batch_stride, q_token_stride, q_head_stride, k_batch_stride, k_token_stride, k_head_stride,
    pos_batch_stride, pos_token_stride,
    OCTAVES: tl.constexpr, N_PAIRS: tl.constexpr, PAIRS: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    BACK: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, TOKENS * HEADS)
    pair = tl.arange(0, PAIRS)
    token = tl.program_id(0).to(tl.int64) * TOKENS + row // HEADS
    # Tokens are counted in 32 bits, their places in 64.
    batch = (token.to(tl.int32) // T).to(tl.int64)
    within = token - batch * T
    live = token < n_tokens
    pos = tl.load(pos_pointer + batch * pos_batch_stride + within * pos_token_stride, mask=live, other=0)
    frequency = tl.exp2(pair.to(tl.float64) * -OCTAVES).to(tl.float32)
    sine, cosine = sine_cosine(pos.to(tl.float32)[:, None] * frequency[None, :])
    if BACK:
        sine = -sine
    q_row = batch * q_batch_stride + within * q_token_stride
    k_row = batch * k_batch_stride + within * k_token_stride
    first_step = tl.program_id(1).to(tl.int64) * n_steps
    for step in range(n_steps):
        head = (first_step + step) * HEADS + row % HEADS
        mask = (live & (head < n_heads))[:, None] & (pair < N_PAIRS)[None, :]
        q_place = (q_row + head * q_head_stride)[:, None] + pair[None, :]
        k_place = (k_row + head * k_head_stride)[:, None] + pair[None, :]
        out_place = ((token * n_heads + head) * (2 * N_PAIRS))[:, None] + pair[None, :]
        # All reads before the first write: the compiler may not move one past the other.
        q_first, q_second = read_halves(q_pointer, q_place, mask, N_PAIRS)
        k_first, k_second = read_halves(k_pointer, k_place, mask, N_PAIRS)
        write_turned(q_out_pointer, out_place, q_first, q_second, sine, cosine, mask, N_PAIRS)
        write_turned(k_out_pointer, out_place, k_first, k_second, sine, cosine, mask, N_PAIRS)


def turn_heads(q_BTHN: Tensor, k_BTHN: Tensor, pos_BT: Tensor, theta: float, *, back: bool) -> tuple[Tensor, Tensor]:
    """Both rotated by their positions' angles, or `back` by as much; new contiguous tensors."""
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_BTHN, k_BTHN))
    n_rows, n_per_row, n_heads, width = q.shape
    q_out, k_out = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(2))
    if not q.numel():
        return q_out, k_out
    n_pairs, n_tokens = width // 2, n_rows * n_per_row
    pairs, heads = (1 << (size - 1).bit_length() for size in (n_pairs, min(n_heads, HEADS_PER_TILE)))
    tokens = max(PAIRS_PER_TILE // (pairs * heads), 1)
    n_blocks, n_steps = triton.cdiv(n_tokens, tokens), triton.cdiv(n_heads, heads)
    n_steps = triton.cdiv(n_steps, min(n_steps, triton.cdiv(ENOUGH_PROGRAMS, n_blocks)))
    rope_kernel[(n_blocks, triton.cdiv(n_heads, heads * n_steps))](
        q, k, pos_BT, q_out, k_out, n_tokens, n_per_row, n_heads, n_steps,
        *q.stride()[:3], *k.stride()[:3], *pos_BT.stride(),
        OCTAVES=math.log2(theta) / n_pairs, N_PAIRS=n_pairs, PAIRS=pairs, TOKENS=tokens, HEADS=heads, BACK=back,
    )  # fmt: skip
    return q_out, k_out
