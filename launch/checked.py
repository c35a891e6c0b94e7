"""A run's configuration as its ranks will see it, checked before anything starts."""

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from transmamba.compose import load
from transmamba.config import Config
from transmamba.errors import ConfigError, Problem
from transmamba.validate import validate

# What a launcher says to each rank; inherited from another launcher it would mislead.
RANK_VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),
)


def checked(overrides: Sequence[str], n_ranks: int, *, may_restart: bool) -> tuple[Config, list[str]]:
    """Compose and validate a configuration for `n_ranks`, and settle its run folder; creates nothing.

    Args:
        may_restart: the run will be started again after a fault, so it must be able to continue.

    Returns:
        The configuration, whose `run.dir` is set, and the overrides that name it.

    Raises:
        ConfigError: all problems.
    """
    config = load(list(overrides), n_ranks)
    environ = {name: text for name, text in os.environ.items() if name not in RANK_VARIABLES}
    validate(config, environ | {"WORLD_SIZE": str(n_ranks), "RANK": "0"})
    if may_restart and config.resume.mode == "never":
        fix = "use resume=auto, or start it without restarts"
        raise ConfigError([Problem("resume.mode", "a restarted run could not continue", "never", fix)])
    if config.run.dir is not None:
        return config, list(overrides)
    config.run.dir = str(_fresh_folder(config.model.kind))
    return config, [*overrides, f"run.dir={config.run.dir}"]


def _fresh_folder(kind: str) -> Path:
    """A folder under runs/ that does not exist, named as a run without `run.dir` names its own."""
    name = f"{datetime.now(UTC).strftime('%Y%m%d-%H%M%S')}-{kind}"
    folder, attempt = Path("runs") / name, 1
    while folder.exists():
        attempt += 1
        folder = Path("runs") / f"{name}-{attempt}"
    return folder
