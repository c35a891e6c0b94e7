"""Continuing a run: which checkpoint, whether it belongs to this configuration, and what goes in and out of it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transmamba.changes import allowance, changed_past, differing, flatten, may_change, with_defaults
from transmamba.checkpoint import Checkpoint, newest_valid, published, set_aside
from transmamba.config import Config, tokens_per_step, total_steps
from transmamba.data_pipeline.mixture import Length
from transmamba.errors import EXIT_CHECKPOINT_MISMATCH, EXIT_NO_VALID_CHECKPOINT, RunError
from transmamba.machine import versions
from transmamba.metrics import Journal
from transmamba.model.norm import PerHead
from transmamba.optimizer import learning_rate
from transmamba.parallel.shards import Shards, global_shape
from transmamba.parallel.topology import Topology
from transmamba.parallel.zero import Optimizer
from transmamba.slices import Piece, Shard
from transmamba.transpoint import effective_points


def find_checkpoint(folder: Path, config: Config, topology: Topology) -> tuple[Checkpoint | None, dict[Path, str]]:
    """The checkpoint to continue from, the same on every rank, and why every newer one does not verify.

    Raises:
        RunError: there are checkpoints and none of them verifies (exit 21).
    """
    if config.resume.mode == "never" or not topology.share(published(folder)):
        return None, {}
    checkpoint, rejected = newest_valid(folder, topology, show=topology.is_first)
    if checkpoint is None:
        raise RunError(
            EXIT_NO_VALID_CHECKPOINT,
            f"resume: none of the {len(rejected)} checkpoints in {folder} verifies ({next(iter(rejected.values()))}). "
            "Fix: restore one from a copy, or start anew with another run.dir",
        )
    return checkpoint, rejected


def check_belongs(checkpoint: Checkpoint, config: Config, fingerprint: str) -> list[str]:
    """Compare a checkpoint's configuration with this one; returns the keys that differ and may.

    Raises:
        RunError: a key that must stay differs, or the data does (exit 23).
    """
    now = flatten(config.model_dump(mode="json"))
    then = with_defaults(flatten(checkpoint.manifest["config"]), now)
    past = changed_past(then, config, checkpoint.step)
    changed = differing(then, now)
    for key in changed:
        if not may_change(key, config, past, has_checkpoint=True):
            raise RunError(EXIT_CHECKPOINT_MISMATCH, _refusal(key, then.get(key), now.get(key), checkpoint, past))
    if checkpoint.manifest["data"]["fingerprint"] != fingerprint:
        raise RunError(
            EXIT_CHECKPOINT_MISMATCH,
            f"data.path: {checkpoint.path} was trained on other tokens, another tokenizer or by a version that cut "
            f"windows otherwise (got {config.data.path}). Fix: point data.path at this run's data, end the run with "
            "the version that began it, or start anew with another run.dir",
        )
    return changed


def _refusal(key: str, then: Any, now: Any, checkpoint: Checkpoint, past: dict[str, int]) -> str:
    fix = f"set it back to {then!r}, or start anew with another run.dir"
    if key in past:
        fix = f"keep what was before data step {past[key]} as it was ({then!r}) and change only what follows"
    if allowance(key):
        fix += f", or allow the change with resume.allow=[{allowance(key)}]"
    return f"{key}: {checkpoint.path} was written with {then!r} (got {now!r}). Fix: {fix}"


def surplus_tokens(checkpoint: Checkpoint, config: Config) -> int:
    """Tokens that a run has read beyond steps x tokens per step, because its windows had another length."""
    return checkpoint.manifest["tokens_seen"] - checkpoint.step * tokens_per_step(config)


def count_tokens(checkpoint: Checkpoint, config: Config) -> None:
    """Give a run of so many tokens its number of steps, when its windows had another length before."""
    surplus = surplus_tokens(checkpoint, config)
    if config.train.steps is None and surplus:
        config.train.steps, config.train.tokens = total_steps(config, surplus), None


def restore(checkpoint: Checkpoint, chunks: Sequence[nn.Module], optimizer: Optimizer, shards: Shards) -> None:
    """Fill this rank's weights, masters, moments and buffers from a checkpoint of any layout."""

    def own(name: str, kind: str, dim: int | None, start: int, length: int) -> Tensor:
        shard = None if dim is None or shards.tp == 1 else Shard(dim, shards.tp_rank, shards.tp)
        return checkpoint.part(name, kind, shard, start, length)

    with torch.no_grad():
        for chunk in chunks:
            for name, buffer in chunk.named_buffers():
                buffer.copy_(own(name, "buffer", 0, 0, buffer.numel()).view(buffer.shape))
    optimizer.restore(own, checkpoint.step)


def load_weights(checkpoint: Checkpoint, module: nn.Module) -> None:
    """Fill a model for inference: the float32 masters and the buffers, no optimiser."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(checkpoint.shaped(name, "master"))
        for name, buffer in module.named_buffers():
            buffer.copy_(checkpoint.shaped(name, "buffer"))


def pieces(chunks: Sequence[nn.Module], optimizer: Optimizer, step: int, topology: Topology) -> Iterator[Piece]:
    """This rank's part of a checkpoint of `step`: what no other rank writes."""
    shards, is_sharded = topology.shards, optimizer.engine is not None
    is_first_replica = topology.dp_rank == 0 and shards.cp_rank == 0
    heads = {
        f"{name}.offset": part for chunk in chunks for name, part in chunk.named_modules() if isinstance(part, PerHead)
    }
    for state in optimizer.slices(step):
        is_elsewhere = state.is_copy or (state.dim is None and shards.tp_rank > 0)
        if is_elsewhere or not (is_sharded or is_first_replica):
            continue
        shard = None if state.dim is None or shards.tp == 1 else Shard(state.dim, shards.tp_rank, shards.tp)
        shape = global_shape(state.shape, state.dim, shards.tp)
        for kind, values in state.views.items():
            yield Piece(state.name, kind, shape, state.start, values, shard)
        if state.name in heads:
            offset = state.views["master"]
            whole = heads[state.name].start.flatten()[state.start : state.start + offset.numel()] + offset
            yield Piece(state.name.removesuffix(".offset"), "weight", shape, state.start, whole, shard)
    for chunk in chunks if is_first_replica else ():
        for name, buffer in chunk.named_buffers():
            shard = None if shards.tp == 1 else Shard(0, shards.tp_rank, shards.tp)
            yield Piece(name, "buffer", global_shape(buffer.shape, 0, shards.tp), 0, buffer, shard)


def record(
    config: Config,
    step: int,
    data: dict[str, Any],
    topology: Topology,
    tokens_seen: int,
    lengths: Sequence[Length] = (),
) -> dict[str, Any]:
    """What the manifest says beside the tensors; `data` names the tokens and the position in them.

    Args:
        lengths: that the run's windows had; noted once there are two of them.
    """
    if len(lengths) > 1:
        data = data | {"lengths": [list(length) for length in lengths]}
    return {
        "config": config.model_dump(mode="json"),
        "tokens_seen": tokens_seen,
        "data": data,
        "schedule": {
            "lr": learning_rate(config, step),
            "transpoints": [str(p) for p in effective_points(config, step)],
        },
        "random": {"seed": config.seed},  # weights and order are functions of it; there is no other state
        "threads": config.train.threads,
        "world_size": topology.world_size,
        "versions": versions(),
    }


def log_choice(journal: Journal, checkpoint: Checkpoint | None, rejected: dict[Path, str], changed: list[str]) -> None:
    """Put the choice on record, the refused checkpoints first."""
    for path, reason in rejected.items():
        journal.event("checkpoint.rejected", path=str(path), reason=reason)
    if checkpoint is not None:
        journal.event("resume", path=str(checkpoint.path), step=checkpoint.step, changed=changed)


def put_aside(rejected: dict[Path, str]) -> None:
    """Move damaged checkpoints where they are neither resumed from nor counted among those to keep."""
    for path in rejected:
        set_aside(path)
