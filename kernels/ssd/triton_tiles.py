"""What the Triton kernels of the scan share: step sizes, decays and masks of one chunk."""

# L tokens per chunk. Vectors of a chunk have one entry a token.
# Jitted functions return values, which their annotations cannot say.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false

from typing import NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def softplus(logit):
    """log(1 + exp(logit)) to float32 precision, and its derivative.

    log(1 + e) = 2 artanh(e / (2 + e)), as a series: a logarithm of 1 + e would have lost the digits of a small e.
    """
    small = tl.exp(-tl.abs(logit))
    s = small / (2.0 + small)
    s2 = s * s
    series = 1.0 / 15.0 + s2 * (1.0 / 17.0)
    series = 1.0 / 13.0 + s2 * series
    series = 1.0 / 11.0 + s2 * series
    series = 1.0 / 9.0 + s2 * series
    series = 1.0 / 7.0 + s2 * series
    series = 1.0 / 5.0 + s2 * series
    series = 1.0 / 3.0 + s2 * series
    log1p = 2.0 * s * (1.0 + s2 * series)
    slope = tl.where(logit >= 0, 1.0, small) / (1.0 + small)
    return tl.maximum(logit, 0.0) + log1p, slope


@triton.jit
def load_steps(dt_pointer, bias_pointer, token, head, n_tokens, stride_t):
    """Step sizes of a chunk, 0 past the row's end, and their derivative by what was loaded."""
    inside = token < n_tokens
    loaded = tl.load(dt_pointer + token.to(tl.int64) * stride_t, mask=inside, other=0.0).to(tl.float32)
    if bias_pointer is None:
        dt, slope = loaded, tl.full(loaded.shape, 1.0, tl.float32)
    else:
        dt, slope = softplus(loaded + tl.load(bias_pointer + head).to(tl.float32))
        dt = tl.where(inside, dt, 0.0)
        slope = tl.where(inside, slope, 0.0)
    return dt, slope


@triton.jit
def add_inside(total, has_edge, value, is_edge):
    """Operator of a scan that starts anew at every edge: what lies behind one leaves no trace, not even of rounding."""
    return tl.where(is_edge != 0, value, total + value), has_edge | is_edge


@triton.jit
def sum_up_to(value, start, token):
    """Sum over each token and those before it in its chunk and document."""
    total, _ = tl.associative_scan((value, (token == start).to(tl.int32)), 0, add_inside)
    return total


@triton.jit
def sum_from(value, start, next_start):
    """Sum over each token and those after it in its chunk and document."""
    total, _ = tl.associative_scan((value, (start != next_start).to(tl.int32)), 0, add_inside, reverse=True)
    return total


class Decays(NamedTuple):
    """How far a chunk's tokens see each other and the states at its ends, in powers of 2.

    Attributes:
        log_decay: sum of dt * rate from the chunk's or the document's start up to each token.
        log_rest: the same over what follows each token in its chunk and document.
        log_carry: what the entering state decays by until it leaves.
        start, next_start: column at which the document of each token, and of the one after it, starts; 0 where there
            are no documents.
        reads, writes: whether the token sees the entering state, and the leaving state the token.
        gives: whether the token has an output.
    """

    log_decay: tl.tensor
    log_rest: tl.tensor
    log_carry: tl.tensor
    start: tl.tensor
    next_start: tl.tensor
    reads: tl.tensor
    writes: tl.tensor
    gives: tl.tensor


@triton.jit
def decays(dt, rate, start_pointer, token, n_tokens, first_output, transpoint, L: tl.constexpr):
    """The `Decays` of the chunk whose tokens stand in the columns `token`."""
    da = dt * (rate * LOG2_E)
    if start_pointer is None:
        log_decay = tl.cumsum(da, 0)
        log_rest = tl.cumsum(da, 0, reverse=True) - da
        log_carry = tl.sum(da, 0)
        start = tl.zeros((L,), tl.int32)
        next_start = start
        reads = token >= 0
        writes = reads
        gives = token >= first_output
    else:
        first = tl.min(token, 0)
        last = tl.minimum(first + L, n_tokens) - 1
        start = tl.load(start_pointer + token, mask=token < n_tokens, other=-1)
        next_start = tl.load(start_pointer + token + 1, mask=token + 1 < n_tokens, other=-1)
        end_start = tl.load(start_pointer + last)
        log_decay = sum_up_to(da, start, token)
        log_rest = sum_from(da, start, next_start) - da
        log_carry = tl.where(end_start < first, tl.sum(da, 0), float("-inf"))
        reads = start < first
        writes = start == end_start
        gives = token - start >= transpoint
    return Decays(log_decay, log_rest, log_carry, start, next_start, reads, writes, gives)
