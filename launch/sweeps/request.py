"""What a sweep was asked to do, and the trials that follow from it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transmamba.compose import load
from transmamba.errors import ConfigError, Problem
from transmamba.launch.sweeps.files import TrialFolder, trial_folder
from transmamba.launch.sweeps.schedules import random_axis, schedule_axis
from transmamba.launch.sweeps.trials import grid_axis, key_of, product, seed_axis
from transmamba.transpoint import effective_points


@dataclass(frozen=True, slots=True)
class Request:
    """The definition of a sweep; two commands with equal ones mean the same sweep."""

    grid: tuple[str, ...] = ()
    schedules: str | None = None
    controls: bool = False
    random: int = 0
    flop_budget: str | None = None
    seeds: int = 1
    overrides: tuple[str, ...] = ()
    optuna: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def trials(self, folder: Path) -> list[TrialFolder]:
        """All combinations (ConfigError: of nothing, of what cannot be read, or of what sets run.dir)."""
        check_overrides(self.overrides)
        schedules = schedule_axis(self.schedules, controls=self.controls)
        self._refuse_fixed_points(bool(schedules or self.random))
        if self.random:
            schedules += random_axis(self.random, self.flop_budget or "v9", self.overrides)
        grid = [grid_axis(text) for text in self.grid]
        seed = load(list(self.overrides)).seed
        seeds = seed_axis(self.seeds, seed)
        axes = [axis for axis in (schedules, *grid) if axis]
        swept = next((text for text in self.grid if key_of(text) == "seed"), None)
        if swept is not None:
            fix = "write --seeds N: N seeds from that of the configuration on"
            raise ConfigError([Problem("--grid", "seeds have an option of their own", swept, fix)])
        if not axes and self.seeds == 1:
            fix = "give --grid, --schedules, --random, --optuna or --seeds; `transmamba sweep show NAME` shows a sweep"
            raise ConfigError([Problem("--grid", "there is nothing to sweep", None, fix)])
        return [trial_folder(folder, trial) for trial in product(axes, seeds, self.overrides)]

    def _refuse_fixed_points(self, has_schedules: bool) -> None:
        fixed = [text for text in (*self.overrides, *self.grid) if key_of(text) == "transpoint.points"]
        if has_schedules and fixed:
            fix = "remove it, or write the lists into --schedules, such as --schedules 'v9,[0,64,inf]'"
            raise ConfigError([Problem("transpoint.points", "would overrule every schedule", fixed[0], fix)])


def twins(trials: Sequence[TrialFolder]) -> list[tuple[str, str]]:
    """Pairs of groups that are the same run under two names: their keys say the same, and so do their TransPoints."""
    found, seen = [], {}
    for trial in (trial.trial for trial in trials if trial.trial.seed == trials[0].trial.seed):
        config = load(list(trial.overrides))
        steps = [0, *sorted(change.step for change in config.transpoint.changes)]
        points = [(step, effective_points(config, step)) for step in steps]
        first = seen.setdefault(repr((config.model_dump(exclude={"transpoint"}), points)), trial.group)
        if first != trial.group:
            found.append((trial.group, first))
    return found


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuse overrides that a sweep cannot give to every trial (ConfigError)."""
    for text in overrides:
        if key_of(text) == "run.dir":
            fix = "remove it; --dir is the sweep's folder and every trial's run folder is inside"
            raise ConfigError([Problem("run.dir", "every trial has a run folder of its own", text, fix)])
        if "\n" in text:
            raise ConfigError([Problem(key_of(text), "has a line break", text, "put it into a file for --config")])
        if text.startswith("-"):
            fix = "write overrides as key=value after --; options of the sweep go before it"
            raise ConfigError([Problem(text.partition("=")[0], "unknown option", text, fix)])
