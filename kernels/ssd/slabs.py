"""Rows of tokens cut into slabs of chunks, with the decays inside every chunk."""

# B batch, T tokens, C chunks of a slab, L tokens per chunk, H heads, G groups of B and C, N key/state width,
# V value width.

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from transmamba.kernels.documents import Documents

OUTPUT_CHUNK = 64  # tokens per chunk where outputs are wanted: its L x L part costs as much as its states
STATE_CHUNK = (
    256  # tokens per chunk that only builds state: the longest whose decay sum stays accurate in float32
)
SLAB_ELEMENTS = 1 << 18  # of an L x L matrix over all chunks, rows and heads of a slab: 1 MiB in float32


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
    """One slab in chunks, in the working precision; padded tokens have dt, b, c and x equal to 0 and do nothing.

    `read` is the decay from the entering state to a token, `write` that from a token to the leaving state,
    `carry` that of the whole chunk; all are 0 where a document starts in between. `barrier` is added to the
    log of the decay between two tokens of a chunk: -inf where the second may not see the first.
    """

    c_CBHLN: Tensor
    b_CBHLN: Tensor
    x_CBHLV: Tensor
    u_CBHLV: Tensor
    dt_CBHL: Tensor
    decay_sum_CBHL: Tensor
    read_CBHL: Tensor
    write_CBHL: Tensor
    carry_CBH: Tensor
    barrier: Tensor


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Precision of decays, states and sums for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def spans(n_tokens: int, n_streams: int, first_output: int) -> list[Span]:
    """Slabs of a row: those that only build state, up to `first_output`, then those with outputs.

    Args:
        n_streams: rows times heads.
    """
    result: list[Span] = []
    for start, stop, length, wants_output in (
        (0, first_output, STATE_CHUNK, False),
        (first_output, n_tokens, OUTPUT_CHUNK, True),
    ):
        step = length * max(SLAB_ELEMENTS // (n_streams * OUTPUT_CHUNK * length), 1)
        result.extend(Span(at, min(at + step, stop), length, wants_output) for at in range(start, stop, step))
    return result


def load_slab(streams: Streams, span: Span, documents: Documents | None) -> Slab:
    """Bring one slab into chunks and compute its decays; step 1 of README.md."""
    work = working_dtype(streams.x_BTHV.dtype)
    n_heads = streams.x_BTHV.shape[2]
    x, dt = chunked(streams.x_BTHV, span, work), chunked(streams.dt_BTH, span, work)
    b = to_heads(chunked(streams.b_BTGN, span, work), n_heads)
    c = to_heads(chunked(streams.c_BTGN, span, work), n_heads) if span.wants_output else b
    decay_sum = (dt * streams.A_H.to(work)[:, None]).cumsum(-1)
    to_end = decay_sum[..., -1:] - decay_sum
    from_start = decay_sum
    length = span.n_chunk_tokens
    ones = torch.ones(length, length, dtype=torch.bool, device=x.device)
    barrier = torch.zeros(length, length, dtype=work, device=x.device)
    if documents is not None and _starts_inside(documents, span):
        part_CBL = chunked(documents.reset_BT, span, torch.int32).cumsum(-1)[:, :, None]
        to_end = to_end.masked_fill(part_CBL != part_CBL[..., -1:], -torch.inf)
        from_start = decay_sum.masked_fill(part_CBL != 0, -torch.inf)
        ones = part_CBL[..., :, None] == part_CBL[..., None, :]
        barrier = torch.zeros(ones.shape, dtype=work, device=x.device)
    barrier = barrier.masked_fill_(~ones.tril(), -torch.inf) if span.wants_output else barrier
    read = from_start.exp()
    return Slab(c, b, x, x * dt[..., None], dt, decay_sum, read, to_end.exp(), read[..., -1], barrier)


def chunked(stream: Tensor, span: Span, dtype: torch.dtype) -> Tensor:
    """[B, T, H, ...] to contiguous [C, B, H, L, ...] of `dtype`, zero padded; [B, T] to [C, B, L]."""
    part = stream[:, span.start : span.stop]
    missing = -part.shape[1] % span.n_chunk_tokens
    if missing:
        part = pad(part, (0, 0) * (part.dim() - 2) + (0, missing))
    part = part.unflatten(1, (-1, span.n_chunk_tokens)).movedim(1, 0)
    part = part.movedim(2, 3) if part.dim() > 3 else part
    return torch.empty(part.shape, dtype=dtype, device=part.device).copy_(part)


def unchunked(target: Tensor, chunks: Tensor, span: Span) -> None:
    """Write [C, B, H, L, ...] to the tokens of `span` in `target` [B, T, H, ...]; undoes `chunked`."""
    full, rest = divmod(span.stop - span.start, span.n_chunk_tokens)
    tokens = chunks.movedim(3, 2).movedim(0, 1)
    middle = span.start + full * span.n_chunk_tokens
    target[:, span.start : middle].unflatten(1, (full, span.n_chunk_tokens)).copy_(tokens[:, :full])
    if rest:
        target[:, middle : span.stop].copy_(tokens[:, full, :rest])


def to_heads(chunks_CBGLN: Tensor, n_heads: int) -> Tensor:
    """Repeat every group for its heads."""
    n_shared = n_heads // chunks_CBGLN.shape[2]
    return chunks_CBGLN if n_shared == 1 else chunks_CBGLN.repeat_interleave(n_shared, 2)


def to_groups(chunks_CBHLN: Tensor, n_groups: int) -> Tensor:
    """Sum over the heads of every group: the adjoint of `to_heads`."""
    if chunks_CBHLN.shape[2] == n_groups:
        return chunks_CBHLN
    return chunks_CBHLN.unflatten(2, (n_groups, -1)).sum(3)


def _starts_inside(documents: Documents, span: Span) -> bool:
    """A start at column 0 does not count: the state before a row is already zero there."""
    return any(span.start <= start < span.stop for row in documents.starts for start in row[1:])
