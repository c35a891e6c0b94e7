"""Hydra's own multirun: `python -m transmamba.train -m transpoint=v1,v9 seed=1,2 [hydra/launcher=submitit_slurm ...]`.

`transmamba sweep` does more; this is for those who know Hydra. Every job trains in a process of its own. The folder of
all jobs is chosen here, once, before any job exists, so no two ranks can disagree about it.
"""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from omegaconf import DictConfig

from transmamba.compose import load
from transmamba.errors import EXIT_CONFIG, EXIT_DONE, ConfigError, Problem
from transmamba.launch.sweeps.trials import MAX_TRIALS, grid_axis, key_of
from transmamba.overrides import CONFIG_DIR, groups

FLAGS = ("-m", "--multirun")
CODES = "multirun.jsonl"
_SETTINGS = ("hydra/launcher", "hydra.launcher.", "hydra.sweep.dir")


def multirun(argv: Sequence[str]) -> int:
    """Run Hydra's sweeper over `argv` (with or without the flag); returns the first exit code that is not 0."""
    import hydra

    try:
        arguments = [_argument(text) for text in argv if text not in FLAGS]
        _check([text for text in arguments if not _is_hydras(key_of(text))])
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_CONFIG
    given = [text.partition("=")[2] for text in arguments if text.startswith("hydra.sweep.dir=")]
    folder = Path(given[0] if given else f"runs/multirun/{datetime.now(UTC):%Y%m%d-%H%M%S}-{os.getpid()}").absolute()
    if not given:
        arguments.append(f"hydra.sweep.dir='{folder}'")
    arguments.append(f"hydra.sweep.subdir='{folder.name}-${{hydra.job.num}}'")
    sys.argv = ["transmamba.train", "--multirun", *arguments]
    try:
        hydra.main(config_path=str(CONFIG_DIR.resolve()), config_name="train", version_base="1.3")(job)()
    except SystemExit as ended:
        if ended.code:
            return EXIT_CONFIG  # Hydra has said what is wrong
    return max(_codes(folder), key=bool, default=EXIT_DONE)


def job(_composed: DictConfig) -> None:
    """One job: train with its overrides in a process of its own, whose folder Hydra has made."""
    from hydra.core.hydra_config import HydraConfig

    settings = HydraConfig.get()
    run_dir = Path(settings.runtime.output_dir)
    overrides = [text.removeprefix("++") for text in settings.overrides.task]
    command = [sys.executable, "-m", "transmamba.train", *overrides, f"run.dir='{run_dir}'"]
    environ = dict(os.environ) | _ranks()
    code = subprocess.run(command, env=environ).returncode
    if environ.get("RANK", "0") == "0":
        with (run_dir.parent / CODES).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"run_dir": str(run_dir), "overrides": overrides, "code": code}) + "\n")


def _ranks() -> dict[str, str]:
    """What a rank must know when submitit starts several tasks for one job."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return {}
    import submitit  # pyright: ignore[reportMissingImports]

    here = submitit.JobEnvironment()
    if here.num_tasks == 1:
        return {}
    return {
        "RANK": str(here.global_rank),
        "LOCAL_RANK": str(here.local_rank),
        "WORLD_SIZE": str(here.num_tasks),
        "LOCAL_WORLD_SIZE": str(here.num_tasks // here.num_nodes),
        "MASTER_ADDR": here.hostnames[0],
        # Below the ports that systems give away; jobs of one sweep have neighbouring numbers.
        "MASTER_PORT": str(10_000 + int("".join(filter(str.isdigit, here.job_id))) % 20_000),
    }


def _argument(text: str) -> str:
    """The argument as Hydra wants it: keys that its files do not name have to be added with `++`."""
    key, value = key_of(text), text.partition("=")[2]
    if text.startswith("-") or "_target_" in text:
        fix = "give overrides such as transpoint=v1,v9; --config FILE and _target_ are not for several runs"
        raise ConfigError([Problem(key, "not read with -m", text, fix)])
    if _is_hydras(key):
        if not key.startswith(_SETTINGS):
            fix = "of Hydra's settings only hydra/launcher, hydra.launcher.* and hydra.sweep.dir are read"
            raise ConfigError([Problem(key, "not read", value, fix)])
        if value.startswith("submitit"):
            _require_submitit(key, value)
        return text
    if key == "run.dir":
        fix = "give hydra.sweep.dir=FOLDER; every job has its own folder inside"
        raise ConfigError([Problem(key, "one folder for several runs", value, fix)])
    return text if key in groups() or text[0] in "+~" else f"++{text}"


def _is_hydras(key: str) -> bool:
    return key.split(".")[0].split("/")[0] == "hydra"


def _require_submitit(key: str, value: str) -> None:
    try:
        version("hydra-submitit-launcher")
    except PackageNotFoundError as error:
        fix = "pip install hydra-submitit-launcher, or use `transmamba sweep ... --slurm`"
        raise ConfigError([Problem(key, "the launcher is not installed", value, fix)]) from error


def _check(arguments: Sequence[str]) -> None:
    """Compose every combination before Hydra does: all problems, one line each (ConfigError)."""
    axes = [[choice.overrides[0] for choice in grid_axis(text)] for text in arguments if text[0] not in "~"]
    deleted = [text for text in arguments if text[0] == "~"]
    problems: dict[str, Problem] = {}
    for combination in itertools.islice(itertools.product(*axes), MAX_TRIALS):
        try:
            load([*combination, *deleted])
        except ConfigError as error:
            problems |= {problem.line(): problem for problem in error.problems}
    if problems:
        raise ConfigError(list(problems.values()))


def _codes(folder: Path) -> list[int]:
    try:
        lines = (folder / CODES).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [json.loads(line)["code"] for line in lines]
