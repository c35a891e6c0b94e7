"""Continuing a run: which checkpoint, whether it belongs to this configuration, and what goes in and out of it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transmamba.batches import data_step_of
from transmamba.checkpoint import Checkpoint, newest_valid, published, set_aside
from transmamba.config import Config, tokens_per_step
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

# What a resumed run may change. Every key of the schema, or the section it is in, stands in one of the four.
FIXED = (  # what the run is: exit code 23
    *("seed", "precision", "model", "train.global_batch"),
    *("data.blend", "data.document_mask", "data.shuffle_shards"),
)
TO_COME = ("data.skip", "data.stages")  # for data that the checkpoint has not come to; else exit code 23
ALLOWED_BY = {"data.seq_len": "seq_len", "transpoint": "transpoint"}  # with this word in resume.allow
FREE = (  # how, where and how long it trains: noted in events.jsonl
    *("train.steps", "train.tokens", "train.micro_batch", "train.recompute", "train.threads"),
    *("train.replica_check_every", "train.layer_stats_every"),
    *("optim", "parallel", "zero", "validation", "checkpoint", "resume", "sample", "watchdog", "wandb", "run"),
    # Where the data lies: its tokens are compared by fingerprint.
    *("data.path", "data.sources", "data.prefetch", "data.ledger", "data.cache_dir", "data.cache_gib"),
)


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
    then, now = flatten(checkpoint.manifest["config"]), flatten(config.model_dump(mode="json"))
    defaults = flatten(Config().model_dump(mode="json"))  # of keys that came after the checkpoint
    then |= {key: defaults[key] for key in now.keys() - then.keys() if key in defaults}
    differing = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
    past = _changed_past(checkpoint, config, then)
    for key in differing:
        if _under(key, TO_COME) and key not in past:
            continue
        allowance = next((word for prefix, word in ALLOWED_BY.items() if _under(key, (prefix,))), None)
        if _under(key, FREE) or (allowance or "nothing") in config.resume.allow:
            continue
        fix = f"set it back to {then.get(key)!r}, or start anew with another run.dir"
        if key in past:
            fix = (
                f"keep what was before data step {past[key]} as it was ({then.get(key)!r}) and change only what follows"
            )
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


def _changed_past(checkpoint: Checkpoint, config: Config, then: dict[str, Any]) -> dict[str, int]:
    """Keys of `TO_COME` that would change which data came before the checkpoint, and the data step it had come to."""
    position = data_step_of(checkpoint.step - 1, then["data.skip"]) + 1 if checkpoint.step else 0

    def skipped(skip: Sequence[str]) -> list[tuple[int, int]]:
        ranges = [tuple(int(end) for end in text.split(":")) for text in skip]
        return sorted((first, min(last, position)) for first, last in ranges if first < position)

    now = [stage.model_dump(mode="json") for stage in config.data.stages if stage.step < position]
    faults = {
        "data.skip": skipped(then["data.skip"]) != skipped(config.data.skip),
        "data.stages": [stage for stage in then["data.stages"] if stage["step"] < position] != now,
    }
    return {key: position for key, is_changed in faults.items() if is_changed}


def surplus_tokens(checkpoint: Checkpoint, config: Config) -> int:
    """Tokens that a run has read beyond steps x tokens per step, because its windows had another length."""
    return checkpoint.manifest["tokens_seen"] - checkpoint.step * tokens_per_step(config)


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


def record(config: Config, step: int, data: dict[str, Any], topology: Topology, tokens_seen: int) -> dict[str, Any]:
    """What the manifest says beside the tensors; `data` names the tokens and the position in them."""
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
