"""Ranks, devices and process groups: the only room that makes them."""

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from transmamba.config import ParallelConfig


@dataclass(frozen=True)
class Topology:
    """Where this process stands. Sizes multiply to the world size."""

    device: torch.device
    rank: int
    world_size: int
    dp: int
    dp_rank: int

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the one that writes what is written once."""
        return self.rank == 0


def start(config: ParallelConfig) -> Topology:
    """Join the process group (nccl on GPUs, gloo on CPUs) and build megatron-core's groups in the order tp-cp-dp-pp."""
    from megatron.core import parallel_state

    from transmamba.parallel.cpu import adapt_megatron

    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if has_gpu else torch.device("cpu")
    # DeepSpeed looks for accelerators on its own; it must not find another one than we did.
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it, also for one process
    if has_gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if has_gpu else "gloo"
        store = dist.HashStore() if world_size == 1 else None  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, rank=rank, world_size=world_size, store=store)
    adapt_megatron()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            config.tp, config.pp, context_parallel_size=config.cp, order="tp-cp-ep-dp-pp"
        )
    return Topology(
        device=device,
        rank=rank,
        world_size=world_size,
        dp=parallel_state.get_data_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
    )


def stop() -> None:
    """Leave every group."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


class Mpu:
    """Megatron's groups in the form that DeepSpeed asks for.

    The data parallel group of ZeRO is dp x cp, its model parallel group tp x pp.
    """

    def __init__(self) -> None:
        from megatron.core import parallel_state

        self._state = parallel_state
        self.get_tensor_model_parallel_group = parallel_state.get_tensor_model_parallel_group
        self.get_tensor_model_parallel_rank = parallel_state.get_tensor_model_parallel_rank
        self.get_tensor_model_parallel_world_size = parallel_state.get_tensor_model_parallel_world_size
        self.get_pipeline_model_parallel_group = parallel_state.get_pipeline_model_parallel_group
        self.get_pipeline_model_parallel_rank = parallel_state.get_pipeline_model_parallel_rank
        self.get_pipeline_model_parallel_world_size = parallel_state.get_pipeline_model_parallel_world_size

    def get_data_parallel_group(self) -> Any:
        """The group that shares one shard of the weights."""
        return self._state.get_data_parallel_group(with_context_parallel=True)

    def get_data_parallel_rank(self) -> int:
        """Rank in that group."""
        return self._state.get_data_parallel_rank(with_context_parallel=True)

    def get_data_parallel_world_size(self) -> int:
        """Size of that group."""
        return self._state.get_data_parallel_world_size(with_context_parallel=True)

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks of that group."""
        return dist.get_process_group_ranks(self.get_data_parallel_group())

    def get_model_parallel_group(self) -> Any:
        """The tp x pp group: together these ranks hold one model."""
        return self._state.get_model_parallel_group()

    def get_model_parallel_rank(self) -> int:
        """Rank in the tp x pp group."""
        return dist.get_rank(self.get_model_parallel_group())

    def get_model_parallel_world_size(self) -> int:
        """Size of the tp x pp group."""
        return dist.get_world_size(self.get_model_parallel_group())
