"""Every micro-batch of a step, forward and backward, through megatron-core's schedules."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class StageOutput(NamedTuple):
    """What the last stage makes of a micro-batch."""

    loss: Tensor  # scalar whose gradient is wanted; summed, not averaged, over the step
    report: Tensor  # detached numbers to hand back to the loop


class Stage:
    """The part of the model on this rank, as megatron-core's schedules expect to meet it."""

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[[Any], StageOutput],
        *,
        hidden_size: int,
        dtype: torch.dtype,
    ):
        """`forward` takes one micro-batch; `module` is what it computes with."""
        from megatron.core import ModelParallelConfig
        from megatron.core.enums import ModelType

        self.module, self.forward = module, forward
        self.model_type = ModelType.encoder_or_decoder
        self.config = ModelParallelConfig(pipeline_dtype=dtype)
        # Fields that the schedules read although only the transformer's own config has them.
        extra = {
            "hidden_size": hidden_size,
            "fine_grained_activation_offloading": False,
            "calculate_per_token_loss": False,
            "num_moe_experts": None,
            "mtp_num_layers": None,
        }
        for name, value in extra.items():
            setattr(self.config, name, value)

    def set_input_tensor(self, _inputs: list[Tensor | None]) -> None:
        """A stage that is first and last takes its input from the micro-batch."""

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.module.parameters()


def run_schedule(
    stage: Stage, micro_batches: Sequence[Any], *, n_tokens: int, forward_only: bool = False
) -> list[Tensor]:
    """Run every micro-batch forward and, unless `forward_only`, backward; gradients are left on the parameters.

    Returns:
        The micro-batches' reports, in order.
    """
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    count = torch.ones((), dtype=torch.int)
    n_micro = len(micro_batches)

    def forward_step(batches: Iterator[Any], model: Stage) -> tuple[Tensor, Callable[[Tensor], tuple]]:
        loss, report = model.forward(next(batches))
        # The schedule divides the loss by the number of micro-batches in place; ours are sums already.
        return loss * n_micro, lambda loss: (loss, count, report)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(micro_batches),
        model=stage,  # pyright: ignore[reportArgumentType]  # a stage need not be a module, only look like one
        num_microbatches=n_micro,
        seq_length=n_tokens,
        micro_batch_size=1,
        forward_only=forward_only,
    )
