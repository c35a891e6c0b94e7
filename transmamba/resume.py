"""Continuing a run: which checkpoint, whether it belongs to this configuration, and what goes in and out of it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transmamba.checkpoint import Checkpoint, Piece, Shard, newest_valid, published, read
from transmamba.config import Config, tokens_per_step
from transmamba.errors import EXIT_CHECKPOINT_MISMATCH, EXIT_NO_VALID_CHECKPOINT, RunError
from transmamba.machine import versions
from transmamba.metrics import Journal
from transmamba.model.norm import PerHead
from transmamba.optimizer import learning_rate
from transmamba.parallel.shards import Shards, global_shape
from transmamba.parallel.topology import Topology
from transmamba.parallel.zero import Optimizer
from transmamba.transpoint import effective_points

# Keys that decide what the run is. Any other may change on resume; the change is written to events.jsonl.
FIXED = ("seed", "precision", "model", "transpoint", "data", "train.global_batch")
# Where a data folder lies may change: what is in it is compared by fingerprint.
MOVABLE = ("data.path",)
ALLOWED_BY = {"data.seq_len": "seq_len", "transpoint": "transpoint"}


def find_checkpoint(folder: Path, config: Config, topology: Topology) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to continue from, the same on every rank, and one line for every newer one that does not verify.

    Raises:
        RunError: there are checkpoints and none of them verifies (exit 21).
    """
    if config.resume.mode == "never" or not published(folder):
        return None, []
    checkpoint, rejected = newest_valid(folder) if topology.is_first else (None, [])
    path, rejected = topology.share((checkpoint and checkpoint.path, rejected))
    if path is None:
        raise RunError(
            EXIT_NO_VALID_CHECKPOINT,
            f"resume: none of the {len(rejected)} checkpoints in {folder} verifies ({rejected[0]}). "
            "Fix: restore one from a copy, or start anew with another run.dir",
        )
    return checkpoint or read(path), rejected


def check_belongs(checkpoint: Checkpoint, config: Config, fingerprint: str) -> list[str]:
    """Compare a checkpoint's configuration with this one; returns the keys that differ and may.

    Raises:
        RunError: a key that must stay differs, or the data does (exit 23).
    """
    then, now = flatten(checkpoint.manifest["config"]), flatten(config.model_dump(mode="json"))
    differing = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
    for key in differing:
        if not _under(key, FIXED) or key in MOVABLE:
            continue
        allowance = next((word for prefix, word in ALLOWED_BY.items() if _under(key, (prefix,))), None)
        if allowance in config.resume.allow:
            continue
        fix = f"set it back to {then.get(key)!r}, or start anew with another run.dir"
        if allowance:
            fix += f", or allow the change with resume.allow=[{allowance}]"
        raise RunError(
            EXIT_CHECKPOINT_MISMATCH,
            f"{key}: {checkpoint.path} was written with {then.get(key)!r} (got {now.get(key)!r}). Fix: {fix}",
        )
    if checkpoint.manifest["data"]["fingerprint"] != fingerprint:
        raise RunError(
            EXIT_CHECKPOINT_MISMATCH,
            f"data.path: {checkpoint.path} was trained on other tokens or another tokenizer "
            f"(got {config.data.path}). Fix: point data.path at this run's data, or start anew with another run.dir",
        )
    return differing


def restore(checkpoint: Checkpoint, chunks: Sequence[nn.Module], optimizer: Optimizer, shards: Shards) -> None:
    """Fill this rank's weights, masters, moments and buffers from a checkpoint of any layout."""

    def own_slice(name: str, kind: str, dim: int | None) -> Tensor:
        return shards.slice_of(checkpoint.shaped(name, kind), dim)

    with torch.no_grad():
        for chunk in chunks:
            for name, buffer in chunk.named_buffers():
                buffer.copy_(own_slice(name, "buffer", 0))
    optimizer.restore(own_slice, checkpoint.step)


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


def record(config: Config, step: int, data: dict[str, Any], topology: Topology) -> dict[str, Any]:
    """What the manifest says beside the tensors; `data` names the tokens and the position in them."""
    return {
        "config": config.model_dump(mode="json"),
        "tokens_seen": step * tokens_per_step(config),
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


def log_choice(journal: Journal, checkpoint: Checkpoint | None, rejected: list[str], changed: list[str]) -> None:
    """Put the choice on record, the refused checkpoints first."""
    for reason in rejected:
        journal.event("checkpoint.rejected", reason=reason)
    if checkpoint is not None:
        journal.event("resume", path=str(checkpoint.path), step=checkpoint.step, changed=changed)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _under(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)
