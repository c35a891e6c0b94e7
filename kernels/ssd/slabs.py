"""Rows of tokens cut into slabs of chunks, with the decays inside every chunk."""

# B batch, T tokens, C chunks of a slab, L tokens per chunk, H heads, G groups of B and C, N key/state width,
# V value width.

import math
from typing import NamedTuple

import torch
from torch import Tensor

from transmamba.kernels.documents import Documents

LOG2_E = math.log2(math.e)  # decays are powers of 2: torch's exp is far slower than exp2 on -inf and underflow
NARROW_CHUNK, WIDE_CHUNK = 32, 64  # tokens per chunk with outputs, for N + V up to 32, and wider
STATE_CHUNK = 256  # tokens per chunk that only builds state: the longest whose decay sum stays accurate in float32
SLAB_ELEMENTS = 1 << 19  # of a slab's largest matrix over all its chunks, rows and heads: 2 MiB in float32


class Span(NamedTuple):
    """Tokens of one slab."""

    start: int
    stop: int
    n_chunk_tokens: int
    wants_output: bool


class Streams(NamedTuple):
    """Inputs of the scan, whole rows."""

    c_BTGN: Tensor
    b_BTGN: Tensor
    x_BTHV: Tensor
    dt_BTH: Tensor
    A_H: Tensor
    D_H: Tensor | None


class Slab(NamedTuple):
    """One slab in chunks, in the working precision but for `x`, which is a view of the input.

    `log_decay` is the sum of dt * A from the start of a chunk, in units of log 2. `read` is the decay from
    the state that enters a chunk to a token, `write` that from a token to the state that leaves, `carry` that
    of the whole chunk; all are 0 where a document starts in between. `barrier` is added to the log of the
    decay between two tokens of a chunk: -inf where the first may not see the second. `together` [B, C, L, L]
    is 1 where it may; None if no document starts in the slab.
    """

    c_BGCLN: Tensor | None
    b_BGCLN: Tensor
    x_BHCLV: Tensor
    dt_BHCL: Tensor
    log_decay_BHCL: Tensor
    read_BHCL: Tensor
    write_BHCL: Tensor
    carry_BHC: Tensor
    barrier: Tensor
    together: Tensor | None


class Workspace:
    """Buffers that the slabs of one call share by name: fresh memory for each would cost more than the arithmetic."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        """Contiguous, with whatever the last user of this name left in it."""
        size = math.prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = torch.empty(size, dtype=self._dtype, device=self._device)
        return self._buffers[name][:size].view(shape)

    def copy(self, name: str, source: Tensor) -> Tensor:
        """The values of `source`, contiguous, in a buffer."""
        return self.take(name, *source.shape).copy_(source)

    def multiply(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """left * right in a buffer of the shape of `left`."""
        return torch.mul(left, right, out=self.take(name, *left.shape))

    def matmul(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """Product of contiguous stacks of matrices, or of their transposes, in a buffer."""
        product = self.take(name, *left.shape[:-1], right.shape[-1])
        torch.bmm(left.flatten(0, -3), right.flatten(0, -3), out=product.flatten(0, -3))
        return product


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision of decays, states and sums for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def spans(streams: Streams, first_output: int) -> list[Span]:
    """Slabs of a row: those that only build state, up to `first_output`, then those with outputs.

    Every slab holds whole chunks: what is left at the end of either part is a slab of one shorter chunk.
    """
    n_rows, n_tokens, n_heads, n_values = streams.x_BTHV.shape
    output_chunk = NARROW_CHUNK if streams.b_BTGN.shape[3] + n_values <= 32 else WIDE_CHUNK
    n_slab_tokens = SLAB_ELEMENTS // (n_rows * n_heads * WIDE_CHUNK)  # with narrow chunks slabs are better smaller
    result: list[Span] = []
    for start, stop, length, wants_output in (
        (0, first_output, STATE_CHUNK, False),
        (first_output, n_tokens, output_chunk, True),
    ):
        step = length * max(n_slab_tokens // length, 1)
        whole = stop - (stop - start) % length
        result.extend(Span(at, min(at + step, whole), length, wants_output) for at in range(start, whole, step))
        if whole < stop:
            result.append(Span(whole, stop, stop - whole, wants_output))
    return result


def load_slab(streams: Streams, span: Span, documents: Documents | None, space: Workspace) -> Slab:
    """Bring one slab into chunks and compute its decays; step 1 of README.md."""
    work = working_dtype(streams.x_BTHV.dtype)
    length = span.n_chunk_tokens
    dt = chunked(streams.dt_BTH, span).to(work)
    b = space.copy("b", chunked(streams.b_BTGN, span))
    c = space.copy("c", chunked(streams.c_BTGN, span)) if span.wants_output else None
    decay = dt * (streams.A_H.to(work) * LOG2_E)[:, None, None]
    barrier = torch.zeros(length, length, dtype=work, device=dt.device)
    if documents is not None and _starts_inside(documents, span):
        part_BCL = chunked(documents.reset_BT[..., None].to(work), span)[:, 0].cumsum(-1)
        visible_BCLL = (part_BCL[..., :, None] == part_BCL[..., None, :]).tril()
        together = visible_BCLL.to(work)
        log_decay = sum_before(decay, together)
        part_BHCL = part_BCL[:, None]
        from_start = log_decay.masked_fill(part_BHCL != 0, -torch.inf)
        to_end = (log_decay[..., -1:] - log_decay).masked_fill(part_BHCL != part_BHCL[..., -1:], -torch.inf)
        barrier = barrier.masked_fill(~visible_BCLL[:, None], -torch.inf)
    else:
        together = None
        from_start = log_decay = sum_before(decay, together)
        to_end = log_decay[..., -1:] - log_decay
        barrier.masked_fill_(torch.ones_like(barrier, dtype=torch.bool).triu(1), -torch.inf)
    read = from_start.exp2()
    x = chunked(streams.x_BTHV, span)
    return Slab(c, b, x, dt, log_decay, read, to_end.exp2(), read[..., -1], barrier, together)


def sum_before(values_BHCL: Tensor, together_BCLL: Tensor | None) -> Tensor:
    """Sum over a token and those before it in its chunk and document.

    A product with `together` keeps documents apart bit by bit, as differences of plain sums would not.
    """
    if together_BCLL is None:
        return values_BHCL.cumsum(-1)
    return torch.einsum("bcij,bhcj->bhci", together_BCLL, values_BHCL)


def sum_after(values_BHCL: Tensor, together_BCLL: Tensor | None) -> Tensor:
    """Sum over a token and those after it in its chunk and document: the adjoint of `sum_before`."""
    if together_BCLL is None:
        return values_BHCL.flip(-1).cumsum(-1).flip(-1)
    return torch.einsum("bcij,bhci->bhcj", together_BCLL, values_BHCL)


def chunked(stream: Tensor, span: Span) -> Tensor:
    """Tokens of a slab as a view: [B, T, H, ...] to [B, H, C, L, ...]."""
    return stream[:, span.start : span.stop].unflatten(1, (-1, span.n_chunk_tokens)).movedim(3, 1)


def per_group(heads: Tensor, n_groups: int) -> Tensor:
    """[B, H, ...] to [B, G, heads of a group, ...]; a tensor of groups follows by `[:, :, None]`."""
    return heads.unflatten(1, (n_groups, -1))


def _starts_inside(documents: Documents, span: Span) -> bool:
    """A start at column 0 does not count: the state before a row is already zero there."""
    return any(span.start <= start < span.stop for row in documents.starts for start in row[1:])
