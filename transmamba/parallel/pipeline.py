"""Every micro-batch of a step, forward and backward, through megatron-core's schedules."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transmamba.config import ParallelConfig
from transmamba.parallel.topology import Topology


class StageOutput(NamedTuple):
    """What the last stage makes of a micro-batch."""

    loss: Tensor  # scalar whose gradient is wanted; summed, not averaged, over micro-batches, rows and tokens
    report: Tensor  # detached numbers to hand back to the loop


Forward = Callable[[nn.Module, Any, Tensor | None], StageOutput | Tensor]


class Chunk(nn.Module):
    """A piece of the model on this rank, as megatron-core's schedules expect to meet it."""

    def __init__(self, module: nn.Module, forward: Forward, config: Any):
        from megatron.core.enums import ModelType

        super().__init__()
        self.module, self.config = module, config
        self.model_type = ModelType.encoder_or_decoder
        self._forward = forward
        self._received: Tensor | None = None

    def set_input_tensor(self, inputs: list[Tensor | None]) -> None:
        """What the stage before sent; None on the first, which reads the micro-batch."""
        self._received = inputs[0]

    def forward(self, batch: Any) -> StageOutput | Tensor:
        return self._forward(self.module, batch, self._received)


class Stage:
    """The chunks on this rank, in the order in which a micro-batch meets them."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        forward: Forward,
        topology: Topology,
        parallel: ParallelConfig,
        *,
        hidden_size: int,
        dtype: torch.dtype,
    ):
        """Wrap the chunks.

        Args:
            modules: `parallel.vpp` chunks.
            forward: takes a chunk, a micro-batch and what the chunk before sent; returns the hidden states for the
                next one, or on the last chunk the loss.
            topology, parallel: where this rank stands.
            hidden_size, dtype: of what stages send each other.
        """
        config = _schedule_config(parallel, hidden_size, dtype)
        self.chunks = [Chunk(module, forward, config) for module in modules]
        # ZeRO averages gradients over the replicas; the loss is a sum over all tokens.
        self.replicas = topology.replicas

    def train(self, mode: bool = True) -> None:
        """As `nn.Module.train`."""
        for chunk in self.chunks:
            chunk.train(mode)


def run_schedule(
    stage: Stage, micro_batches: Sequence[Any], *, n_rows: int, n_tokens: int, forward_only: bool = False
) -> list[Tensor]:
    """Run every micro-batch forward and, unless `forward_only`, backward; gradients are left on the parameters.

    Args:
        micro_batches: each of `n_rows` windows of `n_tokens` tokens.

    Returns:
        The micro-batches' reports, in order, on the last stage; nothing elsewhere.
    """
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    count = torch.ones((), dtype=torch.int)
    # The schedule divides the loss by the number of micro-batches in place.
    factor = len(micro_batches) * stage.replicas

    def forward_step(batches: Iterator[Any], chunk: Chunk) -> tuple[Tensor, Callable[[Tensor], tuple]]:
        output = chunk(next(batches))
        if isinstance(output, Tensor):
            return output, lambda output: (output, count, output)  # not called: only the last chunk has a loss
        return output.loss * factor, lambda loss: (loss, count, output.report)

    iterators = [iter(micro_batches) for _ in stage.chunks]
    is_interleaved = len(stage.chunks) > 1
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if is_interleaved else iterators[0],
        model=stage.chunks if is_interleaved else stage.chunks[0],  # pyright: ignore[reportArgumentType]
        num_microbatches=len(micro_batches),
        seq_length=n_tokens,
        micro_batch_size=n_rows,
        forward_only=forward_only,
    )


def _schedule_config(parallel: ParallelConfig, hidden_size: int, dtype: torch.dtype) -> Any:
    from megatron.core import ModelParallelConfig

    config = ModelParallelConfig(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        sequence_parallel=parallel.sp,
        pipeline_dtype=dtype,
        # With two stages both neighbours are one rank, and batched messages of the interleaved schedule cross.
        batch_p2p_comm=not (parallel.vpp > 1 and parallel.pp == 2),
    )
    # Fields that the schedules read although only the transformer's own config has them.
    extra = {
        "hidden_size": hidden_size,
        "fine_grained_activation_offloading": False,
        "calculate_per_token_loss": False,
        "num_moe_experts": None,
        "mtp_num_layers": None,
    }
    for name, value in extra.items():
        setattr(config, name, value)
    return config
