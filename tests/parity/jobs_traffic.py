"""What forked ranks do to show what they send: a training step under a mode that sees all that c10d dispatches."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.parity import rig
from transmamba.config import ParallelConfig
from transmamba.loop import train_step
from transmamba.parallel import topology as groups
from transmamba.parallel.pipeline import Stage, StageOutput, run_schedule
from transmamba.parallel.zero import MOMENTS
from transmamba.run import Run, build_chunks, build_optimizer, build_stage
from transmamba.stages import Event, partition
from transmamba.transpoint import effective_points

# The dispatcher's operator -> ours, and which argument's bytes count: what goes in, of a gather what comes out.
_OPERATORS = {
    "allreduce_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
    "reduce_": ("reduce", 0),
    "send": ("send", 0),
}
Counts = dict[tuple[str, str], tuple[int, int]]  # (group, operation) -> calls, bytes


class Sent(NamedTuple):
    """One rank's step; everything that `communication.traffic` asks for besides the configuration."""

    pipeline_rank: int
    layers: list[int]
    dp: int
    counts: Counts


def build(options: dict[str, Any]) -> tuple[Run, list[range]]:
    """The rig's model in the layout of this process's group, and the layers of this rank's chunks."""
    config = rig.config_of(**options)
    topology = groups.start(config.parallel)
    n_chunks = config.parallel.pp * config.parallel.vpp
    layers = partition(rig.LAYER_COSTS[: config.model.n_layers], n_chunks, last_extra=0.3)
    chunks = build_chunks(config, rig.VOCAB, topology, layers)
    optimizer = build_optimizer(chunks, config, topology)
    stage = build_stage(chunks, optimizer, config, topology)
    manifest: Any = None  # of data on disk
    batches = rig.batches_of(config, topology)
    run = Run(config, topology, Path(), manifest, chunks, optimizer, stage, batches, [])
    return run, layers[topology.pp_rank :: topology.pp]


def step(options: dict[str, Any]) -> Sent:
    """What this rank sends in the third step, when ZeRO knows the order of the weights, and in agreeing to go on."""
    run, layers = build(options)
    for number in range(2):
        train_step(run, number)
    recorder = Recorder()
    with recorder:
        train_step(run, 2)
        run.topology.agree(0)
    own = [layer for part in layers for layer in part]
    return Sent(run.topology.pp_rank, own, run.topology.dp, recorder.counts)


class Recorder(TorchDispatchMode):
    """Counts this rank's calls and bytes while it is active, in groups of several ranks; receiving is not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counts = {}
        self._names = _group_names()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func._schema.name.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, operator: str, arguments: Any) -> None:
        group = dist.ProcessGroup.unbox(next(a for a in arguments if isinstance(a, torch.ScriptObject)))
        if operator == "recv_" or group.size() == 1:
            return
        operation, position = _OPERATORS[operator]
        # Pairs of stages use the group of all ranks for one of the two directions.
        name = "pp" if operation == "send" else self._names[group.group_name]
        calls, total = self.counts.get((name, operation), (0, 0))
        self.counts[name, operation] = calls + 1, total + _bytes(arguments[position])


def _group_names() -> dict[str, str]:
    from megatron.core import parallel_state as state

    found = {
        "tp": state.get_tensor_model_parallel_group(),
        "cp": state.get_context_parallel_group(),
        "pp": state.get_pipeline_model_parallel_group(),
        "dp": state.get_data_parallel_group(),
        "dp_cp": state.get_data_parallel_group(with_context_parallel=True),
        "tp_pp": state.get_model_parallel_group(),
        "world": dist.group.WORLD,
    }
    embedding = state.get_embedding_group(check_initialized=False)
    if embedding is not None:
        found["embedding"] = embedding
    names = {group.group_name: name for name, group in found.items()}
    assert len(names) == len(found), "two of our groups are one"
    return names


def _bytes(value: Tensor | list[Tensor]) -> int:
    tensors = [value] if isinstance(value, Tensor) else value
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def events(parallel: dict[str, int], n_micro: int) -> list[Event]:
    """The order in which the schedule runs forwards and backwards on this pipeline rank; chunks are one product."""
    config = ParallelConfig.model_validate(parallel)
    topology = groups.start(config)
    modules = [nn.Linear(2, 2) for _ in range(config.vpp)]
    chunks = range(topology.pp_rank, config.pp * config.vpp, config.pp)
    chunk_of: dict[nn.Module, int] = dict(zip(modules, chunks, strict=True))
    last = config.pp * config.vpp - 1
    found: list[Event] = []

    def forward(module: nn.Module, micro_batch: int, received_TBD: Tensor | None) -> StageOutput | Tensor:
        chunk = chunk_of[module]
        found.append(("F", micro_batch, chunk))
        output_TBD = module(torch.ones(1, 1, 2) if received_TBD is None else received_TBD)
        output_TBD.register_hook(lambda _: found.append(("B", micro_batch, chunk)))
        return StageOutput(output_TBD.sum(), torch.zeros(())) if chunk == last else output_TBD

    stage = Stage(modules, forward, topology, config, hidden_size=2, dtype=torch.float32)
    run_schedule(stage, range(n_micro), n_rows=1, n_tokens=1)
    return found


def held_bytes(options: dict[str, Any]) -> tuple[dict[str, int], list[int]]:
    """Bytes of this rank's state between the backward and the update of the second step, and sizes of weights.

    Every storage counts once, for the first kind that has it; buffers that collectives work in do not count.
    """
    run, _ = build(options)
    parameters = [parameter for chunk in run.chunks for parameter in chunk.parameters()]
    sizes = [getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters]
    train_step(run, 0)
    batches = run.batches.of_step(1, effective_points(run.config, 1))
    run_schedule(run.stage, batches, n_rows=run.config.train.micro_batch, n_tokens=run.config.data.seq_len)
    zero = None if run.optimizer.engine is None else run.optimizer.engine.optimizer
    seen: set[int] = set()
    found = {}
    names = {
        "moments": [],
        "masters": ["fp32_partitioned_groups_flat", "fp32_groups_flat_partition", "single_partition_of_fp32_groups"],
        "weights": ["bit16_groups_flat", "bf16_groups_flat", "fp16_partitioned_groups_flat"],
        "gradients": [
            "averaged_gradients",
            "all_grad_tensors",
            "fp32_groups_gradients_flat",
            "grad_partitions_flat_buffer",
        ],
    }
    own = {
        "moments": [state[key] for state in run.optimizer.adamw.state.values() for key in MOMENTS],
        "weights": [[parameter.data, getattr(parameter, "ds_tensor", None)] for parameter in parameters],
        "gradients": [parameter.grad for parameter in parameters],
    }
    for kind, attributes in names.items():
        values = [own.get(kind), *(getattr(zero, name, None) for name in attributes)]
        found[kind] = sum(_new_storages(values, seen))
    return found, sizes


def _new_storages(value: Any, seen: set[int]) -> Iterator[int]:
    """Sizes of the storages behind the tensors in nested lists and dictionaries, unless seen before."""
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            yield storage.nbytes()
    elif isinstance(value, list | dict | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _new_storages(item, seen)
