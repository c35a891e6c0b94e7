"""The loss of tokens against a vocabulary of which each rank has some rows: public operation and autograd node."""

# T tokens, D model width, E vocabulary entries of this rank.

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from transmamba.kernels.cross_entropy.local import gradients, statistics

Combine = Callable[[Tensor], Tensor]


def own(values: Tensor) -> Tensor:
    """Combination of one rank's numbers with nobody's."""
    return values


def cross_entropy(
    x_TD: Tensor,
    weight_ED: Tensor,
    entry_T: Tensor,
    *,
    n_known: int | None = None,
    max_over_ranks: Combine = own,
    sum_over_ranks: Combine = own,
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of every token's target, and the log-partition, from logits x w^T.

    At most about an eighth of the logits is in memory at once, unless there are few of them (`local.py`). Where other
    ranks hold the other rows of the vocabulary, all hold the same `x_TD`, whose gradient is a part of a sum over them.

    Args:
        x_TD: hidden states.
        weight_ED: this rank's rows of the vocabulary, of the same dtype.
        entry_T: the targets as rows of `weight_ED`; what is outside 0..E is on another rank, or has logit 0.
        n_known: rows from here on are padding, with logits of -inf and gradients of exactly 0. Default: none are.
        max_over_ranks, sum_over_ranks: combine a number per token over the ranks; called once and twice.

    Returns:
        nll_T and log_partition_T in nats, float32 (float64 for float64 inputs).

    Raises:
        ValueError: widths, dtypes or token counts disagree, or `n_known` is not in 0..E.
    """
    return _CrossEntropy.apply(x_TD, weight_ED, entry_T, n_known, max_over_ranks, sum_over_ranks)


class _Gradients(NamedTuple):
    x_TD: Tensor
    weight_ED: Tensor
    entry_T: None = None
    n_known: None = None
    max_over_ranks: None = None
    sum_over_ranks: None = None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_ED: Tensor,
        entry_T: Tensor,
        n_known: int | None,
        max_over_ranks: Combine,
        sum_over_ranks: Combine,
    ) -> tuple[Tensor, Tensor]:
        local = statistics(x_TD, weight_ED, entry_T, n_known)
        # A logit has the dtype of x, so the largest one loses nothing in it.
        largest_T = max_over_ranks(local.largest_T.to(x_TD.dtype)).to(local.largest_T.dtype)
        scale_T = (local.largest_T - largest_T).exp_()
        total_T = sum_over_ranks(local.total_T * scale_T)
        target_T = sum_over_ranks(local.target_T)
        # The weight itself, not a view of it: ZeRO-3 takes its memory away and gives it back before the backward.
        ctx.save_for_backward(x_TD, weight_ED, entry_T, local.largest_T, scale_T / total_T)
        ctx.n_known, ctx.kept_TE = n_known, local.kept_TE
        log_total_T = total_T.log()
        return log_total_T + (largest_T - target_T), log_total_T + largest_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> _Gradients:  # pyright: ignore[reportIncompatibleMethodOverride]
        kept_TE, ctx.kept_TE = ctx.kept_TE, None  # overwritten now; another backward computes it again
        return _Gradients(*gradients(*ctx.saved_tensors, *grads, n_known=ctx.n_known, kept_TE=kept_TE))
