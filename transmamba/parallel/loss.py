"""Cross entropy over a vocabulary whose entries are spread over the tensor-parallel ranks."""
# T tokens, B batch, E this rank's vocabulary entries.

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from transmamba.parallel.shards import Shards


class TokenLosses(NamedTuple):
    """Per token, float32 (float64 for float64 logits), in nats."""

    nll_TB: Tensor  # negative log-likelihood of the target
    log_partition_TB: Tensor  # log of the sum of exponentials


def vocab_cross_entropy(logits_TBE: Tensor, targets_TB: Tensor, shards: Shards) -> TokenLosses:
    """Loss of every token, from local logits and global target ids.

    Ranks exchange three numbers a token: the largest logit, the sum of exponentials and the target's logit.
    """
    return TokenLosses(*_CrossEntropy.apply(logits_TBE, targets_TB, shards))


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TBE: Tensor, targets_TB: Tensor, shards: Shards) -> tuple[Tensor, Tensor]:
        n_entries = logits_TBE.shape[-1]
        largest_TB = shards.max_over_tp(logits_TBE.amax(-1)).to(torch.promote_types(logits_TBE.dtype, torch.float32))
        shifted_TBE = logits_TBE - largest_TB[..., None]
        entry_TB = targets_TB - shards.tp_rank * n_entries
        is_here_TB = (entry_TB >= 0) & (entry_TB < n_entries)
        entry_TB = entry_TB.where(is_here_TB, 0)
        target_TB = shifted_TBE.gather(-1, entry_TB[..., None])[..., 0].where(is_here_TB, 0)
        target_TB = shards.sum_over_tp(target_TB)
        shares_TBE = shifted_TBE.exp_()
        total_TB = shards.sum_over_tp(shares_TBE.sum(-1))
        shares_TBE /= total_TB[..., None]
        ctx.save_for_backward(shares_TBE, entry_TB, is_here_TB)
        ctx.dtype = logits_TBE.dtype
        log_total_TB = total_TB.log()
        return log_total_TB - target_TB, log_total_TB + largest_TB

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dnll_TB, dlog_partition_TB = grads
        shares_TBE, entry_TB, is_here_TB = ctx.saved_tensors
        dlogits_TBE = shares_TBE * (dnll_TB + dlog_partition_TB)[..., None]
        dlogits_TBE.scatter_add_(-1, entry_TB[..., None], -(dnll_TB * is_here_TB)[..., None])
        return dlogits_TBE.to(ctx.dtype), None, None
