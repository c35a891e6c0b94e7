"""What a run that goes on in its folder may change: one table for every key of the schema. Imports no torch."""

from collections.abc import Sequence
from typing import Any

from transmamba.config import Config
from transmamba.data_position import data_steps_past

# Every key of the schema, or the section it is in, stands in one of the five.
FIXED = (  # what the run is
    *("seed", "precision", "model", "train.global_batch"),
    *("data.blend", "data.document_mask", "data.shuffle_shards"),
)
TO_COME = ("data.skip", "data.stages")  # for data that the run has not come to
ALLOWED_BY = {"data.seq_len": "seq_len", "transpoint": "transpoint"}  # with this word in resume.allow
# How a run learns. It may change from a checkpoint on; without one the run begins anew, and what its folder tells of
# the first attempt would give way to another experiment.
FROM_A_CHECKPOINT_ON = tuple(
    f"optim.{name}" for name in ("lr", "min_lr", "betas", "eps", "weight_decay", "clip", "z_loss")
)
FREE = (  # how, where and how long it trains: noted in events.jsonl
    *("train.steps", "train.tokens", "train.micro_batch", "train.recompute", "train.threads"),
    "train.deterministic",
    *("train.replica_check_every", "train.layer_stats_every"),
    # The shape over time, which depends on the run's length.
    *("optim.schedule", "optim.unit", "optim.warmup", "optim.decay"),
    *("parallel", "zero", "validation", "checkpoint", "resume", "sample", "watchdog", "wandb", "run"),
    # Where the data lies: its tokens are compared by fingerprint.
    *("data.path", "data.sources", "data.prefetch", "data.ledger", "data.cache_dir", "data.cache_gib"),
)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def is_under(key: str, prefixes: Sequence[str]) -> bool:
    """Whether a dotted key is one of these or in one of these sections."""
    return any(key == prefix or key.startswith(prefix + ".") for prefix in prefixes)


def with_defaults(then: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Flattened keys as they were written; one of `now` that came later had its default."""
    defaults = flatten(Config().model_dump(mode="json"))
    return {key: defaults[key] for key in now.keys() - then.keys() if key in defaults} | then


def differing(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Flattened keys with other values."""
    return sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))


def allowance(key: str) -> str | None:
    """The word in resume.allow that lets a key change."""
    return next((word for prefix, word in ALLOWED_BY.items() if is_under(key, (prefix,))), None)


def may_change(key: str, config: Config, past: dict[str, int], *, has_checkpoint: bool) -> bool:
    """Whether a run may go on with another value of a flattened key.

    Args:
        config: that the run goes on with.
        past: from `changed_past`.
        has_checkpoint: that it goes on from; else it begins anew in its folder.
    """
    if is_under(key, TO_COME):
        return key not in past
    if is_under(key, FROM_A_CHECKPOINT_ON):
        return has_checkpoint
    return is_under(key, FREE) or allowance(key) in config.resume.allow


def changed_past(then: dict[str, Any], config: Config, n_steps: int) -> dict[str, int]:
    """Keys of `TO_COME` that would change which data the first `n_steps` steps had, and the data step they came to.

    Args:
        then: flattened, with defaults.
    """
    position = data_steps_past(n_steps, then["data.skip"])

    def skipped(skip: Sequence[str]) -> list[tuple[int, int]]:
        ranges = [tuple(int(end) for end in text.split(":")) for text in skip]
        return sorted((first, min(last, position)) for first, last in ranges if first < position)

    now = [stage.model_dump(mode="json") for stage in config.data.stages if stage.step < position]
    faults = {
        "data.skip": skipped(then["data.skip"]) != skipped(config.data.skip),
        "data.stages": [stage for stage in then["data.stages"] if stage["step"] < position] != now,
    }
    return {key: position for key, is_changed in faults.items() if is_changed}
