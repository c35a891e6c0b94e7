"""Gradients between backward and update, for ranks that DeepSpeed does not serve: stage 0 and tied embeddings."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from transmamba.parallel.shards import shard_dim
from transmamba.parallel.topology import Topology

# DeepSpeed's name for a weight that another pipeline stage holds too: it counts once in the gradient norm.
COPY_FLAG = "ds_pipe_replicated"


def mark_copy(parameter: nn.Parameter) -> None:
    """Note that the first pipeline stage holds this weight too."""
    setattr(parameter, COPY_FLAG, True)


def is_copy(parameter: nn.Parameter) -> bool:
    """Whether the first pipeline stage holds this weight too."""
    return getattr(parameter, COPY_FLAG, False)


def sum_between_stages(parameter: nn.Parameter) -> None:
    """Add up the gradients of the tied embedding on the first and the last stage, wherever they are accumulated."""
    from megatron.core import parallel_state

    accumulated = getattr(parameter, "_hp_grad", None)  # bf16: DeepSpeed's float32 sum
    gradient = parameter.grad if accumulated is None else accumulated
    dist.all_reduce(gradient, group=parallel_state.get_embedding_group())


def average_gradients(parameters: Sequence[nn.Parameter], topology: Topology) -> None:
    """Mean over the ranks that hold the same weights; the loss is scaled so that this is the sum over all tokens."""
    if topology.replicas == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad, group=topology.replica_group)
        parameter.grad /= topology.replicas


def gradient_norm(parameters: Sequence[nn.Parameter], topology: Topology) -> float:
    """Norm of the whole model's gradient: every global tensor counts once, whoever holds it."""
    from megatron.core import parallel_state

    squares = torch.zeros((), dtype=torch.float64, device=topology.device)
    for parameter in parameters:
        is_counted = shard_dim(parameter) is not None or topology.shards.tp_rank == 0
        if parameter.grad is not None and is_counted and not is_copy(parameter):
            squares += _square(parameter.grad)
    if topology.shards.tp * topology.pp > 1:
        dist.all_reduce(squares, group=parallel_state.get_model_parallel_group())
    return float(squares.sqrt())


def clip_gradients(parameters: Sequence[nn.Parameter], norm: float, largest: float | None) -> None:
    """Scale all gradients so that their norm is at most `largest`; None leaves them."""
    if largest is None:
        return
    scale = min(1.0, largest / (norm + 1e-6))
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad *= scale


def _square(gradient: Tensor) -> Tensor:
    return torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
