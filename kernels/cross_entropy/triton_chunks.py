"""Logits of a chunk into statistics, and into their gradient, in Triton."""

# T tokens, C vocabulary entries of a chunk.
# Python numbers become constexpr and jitted functions return values, which their annotations cannot say.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl
from torch import Tensor

from transmamba.kernels.cross_entropy.torch_chunks import Chunk, Running

# Most logits of a token at once: 16 a thread at 8 warps, two loads of 16 bytes in bfloat16. Powers of two below
# serve narrow vocabularies.
WIDEST_BLOCK, NARROWEST_BLOCK = 4096, 256


@triton.jit
def known_logits(line, column, n_known, n_columns):
    """Logits in float32, -inf for padding; the load is masked at a round number, so that it may be 16 bytes wide."""
    logits = tl.load(line + column, mask=column < n_columns, other=0.0).to(tl.float32)
    return tl.where(column < n_known, logits, float("-inf"))


@triton.jit
def add_chunk_kernel(
    logits_pointer,
    entry_pointer,
    largest_pointer,
    total_pointer,
    target_pointer,
    first_entry,
    n_known,
    n_columns,
    stride,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    line = logits_pointer + token * stride
    lane = tl.arange(0, BLOCK).to(tl.int64)
    largest = tl.load(largest_pointer + token)
    total = tl.load(total_pointer + token)
    for first in range(0, n_columns, BLOCK):
        column = first + lane
        logits = known_logits(line, column, n_known, n_columns)
        larger = tl.maximum(largest, tl.max(logits, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(logits - larger), 0)
        largest = larger
    entry = tl.load(entry_pointer + token) - first_entry
    is_here = (entry >= 0) & (entry < n_known)
    target = tl.load(line + entry, mask=is_here, other=0.0).to(tl.float32)
    tl.store(largest_pointer + token, largest)
    tl.store(total_pointer + token, total)
    tl.store(target_pointer + token, target, mask=is_here)


@triton.jit
def to_gradient_kernel(
    logits_pointer,
    entry_pointer,
    largest_pointer,
    factor_pointer,
    dnll_pointer,
    first_entry,
    n_known,
    n_columns,
    stride,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    line = logits_pointer + token * stride
    logits = known_logits(line, column, n_known, n_columns)
    largest = tl.load(largest_pointer + token)
    factor = tl.load(factor_pointer + token)
    dnll = tl.load(dnll_pointer + token)
    entry = tl.load(entry_pointer + token) - first_entry
    dlogits = tl.exp(logits - largest) * factor
    dlogits = tl.where((column == entry) & (column < n_known), dlogits - dnll, dlogits)
    tl.store(line + column, dlogits.to(logits_pointer.dtype.element_ty), mask=column < n_columns)


def add_chunk(logits_TC: Tensor, entry_T: Tensor, chunk: Chunk, running: Running) -> None:
    """Count the logits of a chunk in."""
    n_columns, options = _columns(logits_TC)
    add_chunk_kernel[(logits_TC.shape[0],)](
        logits_TC,
        entry_T.contiguous(),
        *running,
        chunk.first,
        chunk.n_known,
        n_columns,
        logits_TC.stride(0),
        **options,
    )


def to_gradient(
    logits_TC: Tensor, entry_T: Tensor, chunk: Chunk, largest_T: Tensor, factor_T: Tensor, dnll_T: Tensor
) -> Tensor:
    """exp(logit - largest) times the token's factor, less dnll at the target, in place; 0 for padding."""
    n_columns, options = _columns(logits_TC)
    to_gradient_kernel[(logits_TC.shape[0], -(-n_columns // options["BLOCK"]))](
        logits_TC,
        entry_T.contiguous(),
        largest_T,
        factor_T,
        dnll_T,
        chunk.first,
        chunk.n_known,
        n_columns,
        logits_TC.stride(0),
        **options,
    )
    return logits_TC


def _columns(logits_TC: Tensor) -> tuple[int, dict[str, int]]:
    """Columns to read and write, and compile-time arguments: at most 16 columns a thread.

    The columns are the chunk's, and of its lines' own padding what makes them a multiple of 16. The arguments are the
    same for all chunks in one buffer.
    """
    line = logits_TC.stride(0)
    block = min(max(1 << (line - 1).bit_length(), NARROWEST_BLOCK), WIDEST_BLOCK)
    return min(-(-logits_TC.shape[1] // 16) * 16, line), {"BLOCK": block, "num_warps": max(block // 512, 2)}
