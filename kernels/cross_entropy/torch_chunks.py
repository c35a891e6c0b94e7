"""Logits of a chunk into statistics, and into their gradient: torch formulas."""

# T tokens, C vocabulary entries of a chunk.

from typing import NamedTuple

import torch
from torch import Tensor


class Running(NamedTuple):
    """What the chunks so far say of every token; updated in place."""

    largest_T: Tensor  # largest logit
    total_T: Tensor  # sum of exp(logit - largest)
    target_T: Tensor  # the target's logit


class Chunk(NamedTuple):
    """Entries `first` to `first + width`; those from `first + n_known` on are padding."""

    first: int
    width: int
    n_known: int


def add_chunk(logits_TC: Tensor, entry_T: Tensor, chunk: Chunk, running: Running) -> Tensor:
    """Count the logits of a chunk in; returns `exponentials`."""
    column_T, is_here_T = _columns(entry_T, chunk)
    target_T = logits_TC.gather(1, column_T)[:, 0].to(running.target_T.dtype)
    torch.where(is_here_T, target_T, running.target_T, out=running.target_T)
    larger_T = torch.maximum(running.largest_T, logits_TC[:, : chunk.n_known].amax(-1).to(running.largest_T.dtype))
    exps_TC = exponentials(logits_TC, larger_T, chunk)
    running.total_T.mul_(running.largest_T.sub_(larger_T).exp_()).add_(exps_TC.sum(-1))
    running.largest_T.copy_(larger_T)
    return exps_TC


def exponentials(logits_TC: Tensor, largest_T: Tensor, chunk: Chunk) -> Tensor:
    """exp(logit - largest), 0 for padding, in the dtype of `largest_T`; logits of that dtype are overwritten."""
    exps_TC = logits_TC.to(largest_T.dtype).sub_(largest_T[:, None]).exp_()
    exps_TC[:, chunk.n_known :] = 0
    return exps_TC


def to_gradient(exps_TC: Tensor, entry_T: Tensor, chunk: Chunk, factor_T: Tensor, dnll_T: Tensor) -> Tensor:
    """Exponentials times the token's factor, less dnll at the target, in place."""
    column_T, is_here_T = _columns(entry_T, chunk)
    return exps_TC.mul_(factor_T[:, None]).scatter_add_(1, column_T, -(dnll_T * is_here_T)[:, None])


def _columns(entry_T: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor]:
    """The targets' columns [T, 1] in the chunk, 0 for those that are not in it; which ones are."""
    column_T = entry_T - chunk.first
    is_here_T = (column_T >= 0) & (column_T < chunk.n_known)
    return column_T.where(is_here_T, 0)[:, None], is_here_T
