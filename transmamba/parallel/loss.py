"""Cross entropy over a vocabulary whose entries are spread over the tensor-parallel ranks."""
# T tokens, B batch, D model width, E this rank's vocabulary entries.

from typing import NamedTuple

from torch import Tensor

from transmamba.kernels.cross_entropy import cross_entropy
from transmamba.parallel.shards import Shards


class TokenLosses(NamedTuple):
    """Per token, float32 (float64 for float64 hidden states), in nats."""

    nll_TB: Tensor  # negative log-likelihood of the target
    log_partition_TB: Tensor  # log of the sum of exponentials


def vocab_cross_entropy(
    x_TBD: Tensor, weight_ED: Tensor, targets_TB: Tensor, shards: Shards, *, n_known: int | None = None
) -> TokenLosses:
    """Loss of every token, from final hidden states that all ranks hold; the logits x w^T are never there at once.

    Ranks exchange three numbers a token: the largest logit, the sum of exponentials and the target's logit. The
    gradient of `x_TBD` is this rank's part of a sum over them.

    Args:
        weight_ED: this rank's rows of the vocabulary.
        targets_TB: global target ids.
        n_known: the rows of `weight_ED` from here on are padding, with logits of -inf. Default: none are.
    """
    entry_TB = targets_TB - shards.tp_rank * weight_ED.shape[0]
    nll_T, log_partition_T = cross_entropy(
        x_TBD.flatten(0, 1),
        weight_ED,
        entry_TB.flatten(),
        n_known=n_known,
        max_over_ranks=shards.max_over_tp,
        sum_over_ranks=shards.sum_over_tp,
    )
    return TokenLosses(nll_T.view(targets_TB.shape), log_partition_T.view(targets_TB.shape))
