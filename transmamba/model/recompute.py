"""Trading time for memory: computing a part of the forward again in the backward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def run_or_recompute(again: bool, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """`function(*inputs)`; with `again` its intermediate results are not kept but computed anew in the backward.

    There is nothing random in the model, so the random state need not be saved.
    """
    if again and torch.is_grad_enabled():
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return function(*inputs)
