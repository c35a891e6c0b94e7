"""Statistics of logits and the gradients through them, chunk by chunk over the vocabulary of one rank."""

# T tokens, D model width, E vocabulary entries of this rank, C of them in a chunk.

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from transmamba.kernels import backend
from transmamba.kernels.cross_entropy import torch_chunks, triton_chunks
from transmamba.kernels.cross_entropy.torch_chunks import Chunk, Running

# Where all logits are at most this many (64 MiB in float32), they are one chunk, and torch's exponentials of it stay
# for the backward: recomputing them would cost a third of the head's time, which is much of a tiny model's.
KEPT = 1 << 24
# Else there are at least so many chunks, unless they became narrower than what makes a good matrix product.
N_CHUNKS, NARROWEST = 8, 512
# Tensor cores want sizes and lines that are multiples of 16 bytes, and a line of 128 bytes is one transaction.
ALIGNED = 64


class Statistics(NamedTuple):
    """Of every token, over this rank's entries; float32, or float64 for float64 inputs."""

    largest_T: Tensor  # largest logit, -inf without entries
    total_T: Tensor  # sum of exp(logit - largest)
    target_T: Tensor  # the target's logit; 0 where the target is not here, -inf where it is padding
    kept_TE: Tensor | None  # for `gradients`


def statistics(x_TD: Tensor, weight_ED: Tensor, entry_T: Tensor, n_known: int | None) -> Statistics:
    """What the loss needs of the logits, outside autograd; arguments as for `cross_entropy`.

    Logits have the dtype of `x_TD` (a matrix product with float32 sums); maxima and sums are float32. Online softmax:
    arXiv 1805.02867; over chunks of the vocabulary: arXiv 2411.09009.
    """
    n_known = _check(x_TD, weight_ED, entry_T, n_known)
    n_tokens, n_entries = x_TD.shape[0], weight_ED.shape[0]
    work = torch.promote_types(x_TD.dtype, torch.float32)
    is_padding_T = (entry_T >= n_known) & (entry_T < n_entries)
    target_T = torch.zeros(n_tokens, dtype=work, device=x_TD.device).masked_fill_(is_padding_T, -torch.inf)
    running = Running(torch.full_like(target_T, -torch.inf), torch.zeros_like(target_T), target_T)
    chunks = list(chunks_of(n_tokens, n_entries, n_known))
    is_kept = len(chunks) == 1 and n_tokens * chunks[0].width <= KEPT
    buffer, kept_TE, on_triton = _buffer(x_TD, chunks), None, backend.runs_triton(x_TD)
    for chunk in chunks:
        logits_TC = _logits(x_TD, weight_ED, chunk, buffer)
        if on_triton:
            triton_chunks.add_chunk(logits_TC, entry_T, chunk, running)
        else:
            exps_TC = torch_chunks.add_chunk(logits_TC, entry_T, chunk, running)
            kept_TE = exps_TC if is_kept else None
    return Statistics(*running, kept_TE)


def gradients(
    x_TD: Tensor,
    weight_ED: Tensor,
    entry_T: Tensor,
    largest_T: Tensor,
    share_T: Tensor,
    dnll_T: Tensor,
    dlog_partition_T: Tensor,
    *,
    n_known: int | None,
    kept_TE: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of x (from these entries) and of the weight, outside autograd.

    Logits are computed again, unless they were few enough to be kept. The sum over chunks is float32.

    Args:
        x_TD, weight_ED, entry_T, n_known: as for `statistics`.
        largest_T, kept_TE: its results; `kept_TE` is overwritten.
        share_T: exp(largest - log-partition over all ranks): in this form nothing is lost to large logits.
        dnll_T, dlog_partition_T: gradients of the negative log-likelihood and of the log-partition.
    """
    n_known = _check(x_TD, weight_ED, entry_T, n_known)
    factor_T = share_T * (dnll_T + dlog_partition_T)
    dnll_T = dnll_T.contiguous()
    dx_TD, dweight_ED = torch.zeros_like(x_TD, dtype=factor_T.dtype), torch.empty_like(weight_ED)
    chunks = list(chunks_of(x_TD.shape[0], weight_ED.shape[0], n_known))
    buffer, on_triton = _buffer(x_TD, [] if kept_TE is not None else chunks), backend.runs_triton(x_TD)
    for chunk in chunks:
        entries = slice(chunk.first, chunk.first + chunk.width)
        values_TC = _logits(x_TD, weight_ED, chunk, buffer) if kept_TE is None else kept_TE
        if on_triton:
            triton_chunks.to_gradient(values_TC, entry_T, chunk, largest_T, factor_T, dnll_T)
        else:
            if kept_TE is None:
                values_TC = torch_chunks.exponentials(values_TC, largest_T, chunk)
            values_TC = torch_chunks.to_gradient(values_TC, entry_T, chunk, factor_T, dnll_T).to(x_TD.dtype)
        dx_TD += torch.matmul(values_TC, weight_ED[entries])
        torch.matmul(values_TC.T, x_TD, out=dweight_ED[entries])
    dweight_ED[sum(chunk.width for chunk in chunks) :] = 0
    return dx_TD.to(x_TD.dtype), dweight_ED


def chunks_of(n_tokens: int, n_entries: int, n_known: int) -> Iterator[Chunk]:
    """The known entries in chunks of equal width, the last one perhaps narrower, and padding up to a round number."""
    n_columns = min(_round_up(n_known, ALIGNED), n_entries)
    width = n_columns
    if n_tokens * n_columns > KEPT:
        widest = max(n_columns // N_CHUNKS // ALIGNED * ALIGNED, NARROWEST)
        width = _round_up(_ceil_div(n_columns, _ceil_div(n_columns, widest)), ALIGNED)
    for first in range(0, n_columns, max(width, 1)):
        stop = min(first + width, n_columns)
        yield Chunk(first, stop - first, min(n_known, stop) - first)


def _logits(x_TD: Tensor, weight_ED: Tensor, chunk: Chunk, buffer: Tensor) -> Tensor:
    weight_CD = weight_ED[chunk.first : chunk.first + chunk.width]
    return torch.matmul(x_TD, weight_CD.T, out=buffer[:, : chunk.width])


def _buffer(x_TD: Tensor, chunks: list[Chunk]) -> Tensor:
    """Room for the logits of the widest chunk."""
    width = _round_up(max((chunk.width for chunk in chunks), default=0), ALIGNED)
    return x_TD.new_empty(x_TD.shape[0], width)


def _check(x_TD: Tensor, weight_ED: Tensor, entry_T: Tensor, n_known: int | None) -> int:
    n_known = weight_ED.shape[0] if n_known is None else n_known
    if x_TD.shape[1:] != weight_ED.shape[1:] or entry_T.shape != x_TD.shape[:1] or x_TD.dtype != weight_ED.dtype:
        shapes = f"x {tuple(x_TD.shape)} {x_TD.dtype}, weight {tuple(weight_ED.shape)} {weight_ED.dtype}"
        raise ValueError(f"{shapes} and targets {tuple(entry_T.shape)} do not match")
    if not 0 <= n_known <= weight_ED.shape[0]:
        raise ValueError(f"{n_known} known entries of {weight_ED.shape[0]}")
    return n_known


def _round_up(n: int, unit: int) -> int:
    return _ceil_div(n, unit) * unit


def _ceil_div(n: int, unit: int) -> int:
    return -(-n // unit)
