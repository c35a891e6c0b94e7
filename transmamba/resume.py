"""Continuing a run: which checkpoint, whether it belongs to this configuration, and what goes in and out of it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from transmamba.checkpoint import Checkpoint, Piece, newest_valid, published
from transmamba.config import Config, tokens_per_step
from transmamba.errors import EXIT_CHECKPOINT_MISMATCH, EXIT_NO_VALID_CHECKPOINT, RunError
from transmamba.machine import versions
from transmamba.metrics import Journal
from transmamba.model.norm import PerHead
from transmamba.optimizer import learning_rate
from transmamba.parallel.zero import Optimizer
from transmamba.transpoint import effective_points

# Keys that decide what the run is. Any other may change on resume; the change is written to events.jsonl.
FIXED = ("seed", "precision", "model", "transpoint", "data", "train.global_batch")
# Where a data folder lies may change: what is in it is compared by fingerprint.
MOVABLE = ("data.path",)
ALLOWED_BY = {"data.seq_len": "seq_len", "transpoint": "transpoint"}


def find_checkpoint(folder: Path, config: Config) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to continue from, and one line for every newer one that does not verify.

    Raises:
        RunError: there are checkpoints and none of them verifies (exit 21).
    """
    if config.resume.mode == "never" or not published(folder):
        return None, []
    checkpoint, rejected = newest_valid(folder)
    if checkpoint is None:
        raise RunError(
            EXIT_NO_VALID_CHECKPOINT,
            f"resume: none of the {len(rejected)} checkpoints in {folder} verifies ({rejected[0]}). "
            "Fix: restore one from a copy, or start anew with another run.dir",
        )
    return checkpoint, rejected


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


def restore(checkpoint: Checkpoint, module: nn.Module, optimizer: Optimizer) -> None:
    """Fill weights, masters, moments and buffers from a checkpoint."""
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            buffer.copy_(checkpoint.shaped(name, "buffer"))
    optimizer.restore(checkpoint.tensors, checkpoint.step)


def load_weights(checkpoint: Checkpoint, module: nn.Module) -> None:
    """Fill a model for inference: the float32 masters and the buffers, no optimiser."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(checkpoint.shaped(name, "master"))
        for name, buffer in module.named_buffers():
            buffer.copy_(checkpoint.shaped(name, "buffer"))


def pieces(module: nn.Module, optimizer: Optimizer, step: int) -> Iterator[Piece]:
    """Everything that a checkpoint of `step` holds, slice by slice."""
    masters: dict[str, torch.Tensor] = {}
    for piece in optimizer.slices(step):
        for kind, values in piece.views.items():
            yield Piece(piece.name, kind, piece.shape, piece.start, values)
        if piece.name.endswith(".offset"):
            masters[piece.name] = piece.views["master"]
    for name, buffer in module.named_buffers():
        yield Piece(name, "buffer", tuple(buffer.shape), 0, buffer)
    for name, part in module.named_modules():
        if isinstance(part, PerHead):
            total = part.start + masters[f"{name}.offset"]
            yield Piece(name, "weight", tuple(total.shape), 0, total)


def record(config: Config, step: int, data: dict[str, Any]) -> dict[str, Any]:
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
