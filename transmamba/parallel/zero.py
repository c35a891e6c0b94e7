"""The optimiser and its state: DeepSpeed ZeRO behind one door, plain AdamW as its oracle."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from transmamba.config import OptimConfig
from transmamba.parallel.gradients import average_gradients, clip_gradients, gradient_norm, is_copy, sum_between_stages
from transmamba.parallel.shards import shard_dim
from transmamba.parallel.topology import Mpu, Topology

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StateSlice:
    """A contiguous piece of the training state of this rank's flattened tensor, as live views."""

    name: str  # of the global tensor
    shape: tuple[int, ...]  # of this rank's tensor: a slice of the global one along `dim`, or all of it
    dim: int | None
    is_copy: bool  # another pipeline stage holds it too
    start: int
    views: dict[str, Tensor]  # "master" and the two moments, float32


class Optimizer:
    """AdamW with decoupled decay over fp32 masters, its state sharded by the ZeRO stage."""

    def __init__(
        self,
        module: nn.Module,
        names: Mapping[str, nn.Parameter],
        decayed: set[str],
        config: OptimConfig,
        topology: Topology,
        *,
        stage: int,
        bf16: bool,
        micro_batch: int,
        shared: nn.Parameter | None = None,
    ):
        """Take over `module`'s parameters.

        Args:
            module: holds the weights in float32; with `bf16` they are cast, and the masters keep the float32 values.
            names: its parameters by global name.
            decayed: names of those that weight decay shrinks.
            config: learning rate, moments, clipping.
            stage: 0 is torch's AdamW in fp32, without DeepSpeed; 1 to 3 are ZeRO's.
            bf16: weights and activations in bf16, gradients accumulated in fp32.
            micro_batch: rows per forward pass.
            shared: the weight that the first and the last pipeline stage both hold, if this is one of them.
        """
        self.names = {id(parameter): name for name, parameter in names.items()}
        self.topology, self.shared = topology, shared
        parameters = dict(names)
        groups = [
            {
                "params": [p for n, p in parameters.items() if n in decayed],
                "weight_decay": config.weight_decay,
            },
            {"params": [p for n, p in parameters.items() if n not in decayed], "weight_decay": 0.0},
        ]
        self.parameters = list(parameters.values())
        self.clip = config.clip
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.lr,
            betas=(config.betas[0], config.betas[1]),
            eps=config.eps,
            fused=True,
        )
        self.engine: Any = None
        if stage > 0:
            masters = {name: p.detach().clone() for name, p in parameters.items()} if bf16 else {}
            self.engine = _start_engine(module, self.adamw, self.parameters, config, stage, bf16, micro_batch)
            if masters:
                self._fill_masters(masters)
        # Stages 2 and 3 follow the gradients by hooks on the engine's forward.
        self.module: nn.Module = self.engine if stage >= 2 else module

    def step(self, lr: float) -> float:
        """Clip, update and clear the gradients; returns the gradient norm before clipping."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        if self.shared is not None:
            sum_between_stages(self.shared)
        if self.engine is not None:
            self.engine.step()
            return float(self.engine.get_global_grad_norm())
        average_gradients(self.parameters, self.topology)
        norm = gradient_norm(self.parameters, self.topology)
        clip_gradients(self.parameters, norm, self.clip)
        self.adamw.step()
        self.adamw.zero_grad()
        return norm

    def slices(self, step: int) -> Iterator[StateSlice]:
        """This rank's pieces of the training state after `step` updates; moments are made if there are none yet."""
        if self.engine is None:
            yield from self._plain_slices(step)
            return
        zero = self.engine.optimizer
        flats = _flat_masters(zero)
        for flat in flats:
            _ensure_moments(self.adamw.state[flat], flat, step)
        for parameter in self.parameters:
            place = _place(zero, parameter)
            if place is None:
                continue
            group, offset, length, start = place
            state = self.adamw.state[flats[group]]
            views = {key: state[key].narrow(0, offset, length) for key in MOMENTS}
            views["master"] = flats[group].detach().narrow(0, offset, length)
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            name, copy = self.names[id(parameter)], is_copy(parameter)
            yield StateSlice(name, shape, shard_dim(parameter), copy, start, views)

    @torch.no_grad()
    def restore(self, values: Callable[[str, str, int | None, int, int], Tensor], step: int) -> None:
        """Fill the state with `values(name, kind, dim, start, length)`.

        That is the range from `start` of this rank's flattened slice along `dim` of a global tensor, of the kind
        "master", "exp_avg" or "exp_avg_sq".
        """
        if self.engine is not None and _is_stage3(self.engine.optimizer):
            self.engine.optimizer.checkpoint_event_prologue()
        for piece in self.slices(step):
            for kind, view in piece.views.items():
                view.copy_(values(piece.name, kind, piece.dim, piece.start, view.numel()))
        self._refresh_weights()

    def _fill_masters(self, masters: dict[str, Tensor]) -> None:
        """DeepSpeed starts its masters from the bf16 weights; ours are the float32 ones, whatever the precision."""
        with torch.no_grad():
            for piece in self.slices(step=0):
                view = piece.views["master"]
                view.copy_(masters[piece.name].flatten()[piece.start : piece.start + view.numel()])
        self._refresh_weights()

    def _plain_slices(self, step: int) -> Iterator[StateSlice]:
        for parameter in self.parameters:
            state = self.adamw.state[parameter]
            _ensure_moments(state, parameter, step)
            views = {key: state[key].view(-1) for key in MOMENTS}
            views["master"] = parameter.detach().view(-1)
            name, shape, dim = self.names[id(parameter)], tuple(parameter.shape), shard_dim(parameter)
            yield StateSlice(name, shape, dim, is_copy(parameter), 0, views)

    def _refresh_weights(self) -> None:
        """Copy the masters into the model's weights (never the other way round: that would round the masters)."""
        if self.engine is None:
            return
        zero = self.engine.optimizer
        if not _is_stage3(zero):
            zero.update_lp_params()
            return
        for weights, master in zip(zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True):
            weights.data.copy_(master.data)
        zero.checkpoint_event_epilogue()


def _start_engine(
    module: nn.Module,
    adamw: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    config: OptimConfig,
    stage: int,
    bf16: bool,
    micro_batch: int,
) -> Any:
    import deepspeed
    import deepspeed.runtime.bf16_optimizer as bf16_optimizer

    deepspeed.utils.logger.setLevel(logging.ERROR)
    # Built at run time by a compiler (half a minute), for a shared-memory collective that one process does not need.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    bf16_optimizer.see_memory_usage = lambda *args, **kwargs: None  # prints unasked
    deepspeed.init_distributed(dist.get_backend(), verbose=False)
    mpu = Mpu()
    # A contiguous copy of the gradients is for the reduction; alone, there is nothing to reduce.
    sharding = {"stage": stage, "overlap_comm": False, "contiguous_gradients": mpu.get_data_parallel_world_size() > 1}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.clip or 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "zero_optimization": sharding,
        "bf16": {"enabled": bf16, "immediate_grad_update": bf16},
    }
    if bf16:
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=parameters,  # pyright: ignore[reportArgumentType]  # annotated too narrowly
        optimizer=adamw,
        config=settings,
        mpu=mpu,
    )
    return engine


def _is_stage3(zero: Any) -> bool:
    return hasattr(zero, "fp32_partitioned_groups_flat")


def _flat_masters(zero: Any) -> list[Tensor]:
    """This rank's flat fp32 partitions: per sub-group (stage 3), or per parameter group."""
    for name in (
        "fp32_partitioned_groups_flat",
        "fp32_groups_flat_partition",
        "single_partition_of_fp32_groups",
    ):
        if hasattr(zero, name):
            return getattr(zero, name)
    raise AssertionError(f"unknown ZeRO optimizer {type(zero).__name__}")


def _place(zero: Any, parameter: nn.Parameter) -> tuple[int, int, int, int] | None:
    """(flat, offset in it, length, start in the flattened tensor) of this rank's piece; None when it has none."""
    if hasattr(parameter, "ds_id"):  # stage 3: equal padded pieces of every parameter
        ds: Any = parameter
        group, offset, padded = zero.grad_position[zero.get_param_id(parameter)]
        start = dist.get_rank(ds.ds_process_group) * padded
        length = min(padded, ds.ds_numel - start)
        return (group, offset, length, start) if length > 0 else None
    mapping = getattr(parameter, "_hp_mapping", None)
    if mapping is None:
        return None
    here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
    return mapping.param_group_index, here.start, there.numel, there.start


def _ensure_moments(state: dict[str, Any], master: Tensor, step: int) -> None:
    for key in MOMENTS:
        if key not in state:
            state[key] = torch.zeros_like(master, requires_grad=False)
    state["step"] = torch.tensor(float(step))
