"""Ranks, devices and process groups: the only room that makes them."""

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from transmamba.config import ParallelConfig
from transmamba.parallel.shards import Shards

RANK_ORDER = "tp-cp-ep-dp-pp"  # neighbours in tp are closest, then cp, dp and pp


@dataclass(frozen=True)
class Topology:
    """Where this process stands, and the few exchanges that are not the model's. Sizes multiply to the world size."""

    device: torch.device
    rank: int
    world_size: int
    shards: Shards
    dp: int
    dp_rank: int
    pp: int
    pp_rank: int
    rows_group: Any  # dp: these ranks hold different rows of the global batch
    replica_group: Any  # dp x cp: these ranks hold the same weights
    stages_group: Any  # pp: these ranks hold the stages of one model

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the one that writes what is written once."""
        return self.rank == 0

    @property
    def is_first_of_rows(self) -> bool:
        """Whether this is the first of the ranks that read the same rows."""
        return self.pp_rank == self.shards.tp_rank == self.shards.cp_rank == 0

    @property
    def replicas(self) -> int:
        """Ranks that hold the same weights and see other tokens."""
        return self.dp * self.shards.cp

    @property
    def is_last_stage(self) -> bool:
        """Whether the loss is computed here."""
        return self.pp_rank == self.pp - 1

    def sum_rows(self, values: Tensor) -> Tensor:
        """Sum of what the data-parallel ranks counted in their rows."""
        return _summed(values.to(self.device), self.rows_group, self.dp)

    def sum_tokens(self, values: Tensor) -> Tensor:
        """Sum over all tokens of what the last stages computed; other stages pass zeros."""
        values = _summed(values.to(self.device), self.replica_group, self.replicas)
        return _summed(values, self.stages_group, self.pp)

    def sum_all(self, values: Tensor) -> Tensor:
        """Sum over every rank."""
        return _summed(values.to(self.device), None, self.world_size)

    def agree(self, value: int) -> int:
        """The largest value that any rank has: how ranks decide alike."""
        if self.world_size == 1:
            return value
        largest = torch.tensor(value, device=self.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return int(largest)

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_first(self, action: Callable[[], Any]) -> Any:
        """Rank 0's result of `action` on every rank; an exception there is raised on every rank."""
        value, error = None, None
        if self.is_first:
            try:
                value = action()
            except Exception as found:
                error = found
        value, error = self.share((value, error))
        if error is not None:
            raise error
        return value

    def collect(self, value: Any) -> list[Any]:
        """Every rank's value in order of rank, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


@contextmanager
def joined(config: ParallelConfig) -> Iterator[Topology]:
    """Be in the process groups while the block runs."""
    try:
        yield start(config)
    finally:
        stop()


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
        dist.init_process_group(
            backend, rank=rank, world_size=world_size, store=store, timeout=datetime.timedelta(minutes=30)
        )
    adapt_megatron()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            config.tp,
            config.pp,
            config.vpp if config.vpp > 1 else None,
            context_parallel_size=config.cp,
            order=RANK_ORDER,
        )
    return Topology(
        device=device,
        rank=rank,
        world_size=world_size,
        shards=Shards(
            tp=config.tp,
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            cp=config.cp,
            cp_rank=parallel_state.get_context_parallel_rank(),
            cp_group=parallel_state.get_context_parallel_group(),
            sequence=config.sp,
        ),
        dp=parallel_state.get_data_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        pp=config.pp,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        rows_group=parallel_state.get_data_parallel_group(),
        replica_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        stages_group=parallel_state.get_pipeline_model_parallel_group(),
    )


def stop() -> None:
    """Leave every group."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _summed(values: Tensor, group: Any, size: int) -> Tensor:
    if size > 1:
        values = values.clone()
        dist.all_reduce(values, group=group)
    return values


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
