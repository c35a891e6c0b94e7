"""Definition of the loss over a whole vocabulary, for autograd: all logits at once."""

# T tokens, D model width, E vocabulary entries.

import torch
from torch import Tensor


def cross_entropy_reference(
    x_TD: Tensor, weight_ED: Tensor, entry_T: Tensor, *, n_known: int | None = None
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood and log-partition of every token, over the first `n_known` entries.

    The logit of a target that is not among the entries is 0.
    """
    logits_TE = x_TD @ weight_ED[:n_known].T
    log_partition_T = logits_TE.logsumexp(-1)
    is_target_TE = entry_T[:, None] == torch.arange(logits_TE.shape[1], device=x_TD.device)
    return log_partition_T - (logits_TE * is_target_TE).sum(-1), log_partition_T
