"""Searching instead of a grid: optuna proposes trials, learns from validation losses, and ends hopeless ones early.

The study is a journal in the sweep's folder. Its trials are numbered by themselves; a trial's folder says which it is.
"""

import json
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transmamba.errors import ConfigError, Problem
from transmamba.launch.sweeps.files import (
    DONE,
    FAILED,
    INTERRUPTED_STATE,
    OVER,
    PRUNED,
    STOPPED,
    Status,
    TrialFolder,
    add,
    read_status,
    read_trials,
    trial_folder,
)
from transmamba.launch.sweeps.trials import Trial, grid_axis, key_of

if TYPE_CHECKING:
    import optuna  # pyright: ignore[reportMissingImports]

STUDY = "optuna.log"
PINNED = "optuna>=5,<6"
_RANGE = re.compile(r"(?P<key>[\w.]+)=(?P<kind>log|uniform|int)\((?P<low>[^,()]+),(?P<high>[^,()]+)\)")
_FOLDER = "folder"


@dataclass(frozen=True, slots=True)
class Dimension:
    """One key of the space: a range of numbers or a choice among texts."""

    key: str
    kind: str  # log, uniform, int, choice
    low: float = 0.0
    high: float = 0.0
    choices: tuple[str, ...] = ()

    def corners(self) -> list[str]:
        """Values whose validity stands for that of all."""
        ends = [str(round(end)) if self.kind == "int" else repr(end) for end in (self.low, self.high)]
        return list(self.choices) or ends

    def distribution(self) -> "optuna.distributions.BaseDistribution":
        """As optuna knows it."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution  # pyright: ignore[reportMissingImports]

        if self.kind == "choice":
            return CategoricalDistribution(self.choices)
        if self.kind == "int":
            return IntDistribution(round(self.low), round(self.high))
        return FloatDistribution(self.low, self.high, log=self.kind == "log")


def read_dimension(text: str) -> Dimension:
    """Read `key=log(1e-4,1e-2)`, `uniform(a,b)`, `int(a,b)` or `choice(a,b,c)` (ConfigError if it is none of these)."""
    fix = "write key=log(1e-4,1e-2), key=uniform(0,1), key=int(1,8) or key=choice(a,b)"
    match = _RANGE.fullmatch(text.replace(" ", ""))
    if match is not None:
        try:
            low, high = float(match["low"]), float(match["high"])
        except ValueError as error:
            raise ConfigError([Problem("--optuna", "not two numbers", text, fix)]) from error
        if low < high and (match["kind"] != "log" or low > 0):
            return Dimension(match["key"], match["kind"], low, high)
        raise ConfigError([Problem("--optuna", "an empty range", text, "give the smaller number first; log above 0")])
    if re.fullmatch(r"[\w.]+=choice\(.*\)", text) is None:
        raise ConfigError([Problem("--optuna", "not a key with a range or a choice", text, fix)])
    values = grid_axis(text)
    return Dimension(key_of(text), "choice", choices=tuple(v.overrides[0].partition("=")[2] for v in values))


def require_optuna() -> None:
    """Say in one line how to get optuna when it is missing (ConfigError)."""
    try:
        import optuna  # pyright: ignore[reportMissingImports]  # noqa: F401
    except ModuleNotFoundError as error:
        fix = f"pip install '{PINNED}', or use --grid"
        raise ConfigError([Problem("--optuna", "optuna is not installed", error.name, fix)]) from error


def corner_trials(space: Sequence[Dimension], base: Sequence[str], seed: int) -> list[Trial]:
    """Trials that together hold every end and every choice of the space, to be validated before anything starts."""
    n_corners = max(len(dimension.corners()) for dimension in space)
    corners = []
    for number in range(n_corners):
        values = {d.key: d.corners()[min(number, len(d.corners()) - 1)] for d in space}
        corners.append(_trial(number, values, base, seed))
    return corners


class Search:
    """Trials that optuna proposes, `n_trials` in all; implements `local.Queue`."""

    def __init__(self, folder: Path, space: Sequence[Dimension], base: Sequence[str], seed: int, n_trials: int) -> None:
        """Open the study of the sweep in `folder`, or make it; what a killed command left goes on first."""
        import optuna  # pyright: ignore[reportMissingImports]
        from optuna.storages.journal import JournalFileBackend  # pyright: ignore[reportMissingImports]

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._folder, self._base, self._seed, self._n_trials = folder, tuple(base), seed, n_trials
        self._distributions = {dimension.key: dimension.distribution() for dimension in space}
        backend = JournalFileBackend(str(folder / STUDY))
        self._study = optuna.create_study(
            study_name=folder.name,
            storage=optuna.storages.JournalStorage(backend),
            sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
            load_if_exists=True,
        )
        self._own: dict[int, optuna.Trial] = {}  # by trial number
        self._reported: dict[int, int] = {}
        self._pruned: set[int] = set()
        known = read_trials(folder)
        self._n_made = len(known)
        self._waiting = deque(trial for trial in known if read_status(trial).state not in OVER)
        self._close_open()

    def next(self) -> TrialFolder | None:
        """An interrupted trial, else one that optuna proposes now."""
        if self._waiting:
            trial = self._waiting.popleft()
            values = {key_of(text): text.partition("=")[2] for text in trial.trial.overrides}
            self._study.enqueue_trial({key: self._typed(key, values[key]) for key in self._distributions})
            self._ask(trial.trial.number)
            return trial
        if self._n_made >= self._n_trials:
            return None
        values = {key: str(value) for key, value in self._ask(self._n_made).params.items()}
        trial = trial_folder(self._folder, _trial(self._n_made, values, self._base, self._seed))
        add(trial)
        self._n_made += 1
        return trial

    def watch(self, trial: TrialFolder) -> None:
        """Tell optuna the validation losses so far; ask the trial to stop when it falls behind the others' median."""
        number = trial.trial.number
        if number in self._pruned:
            return
        for step, loss in _validations(trial.run, self._reported.get(number, 0)):
            self._reported[number] = step
            self._own[number].report(loss, step)
            if self._own[number].should_prune():
                self._pruned.add(number)
                (trial.run / "STOP").touch()
                return

    def ended(self, trial: TrialFolder, status: Status) -> Status:
        """Tell optuna how it ended; a trial that was stopped for falling behind is pruned."""
        from optuna.trial import TrialState  # pyright: ignore[reportMissingImports]

        number = trial.trial.number
        if status.state == STOPPED and number in self._pruned:
            status = replace(status, state=PRUNED)
        losses = _validations(trial.run, 0)
        if status.state == DONE and losses:
            self._study.tell(self._own[number], losses[-1][1])
        elif status.state == PRUNED:
            self._study.tell(self._own[number], state=TrialState.PRUNED)
        elif status.state in (FAILED, STOPPED, DONE):
            self._study.tell(self._own[number], state=TrialState.FAIL)
        elif status.state == INTERRUPTED_STATE:
            (trial.run / "STOP").unlink(missing_ok=True)
        return status

    def left(self) -> int:
        """Trials that are still to be started."""
        return len(self._waiting) + max(0, self._n_trials - self._n_made)

    def _ask(self, number: int) -> "optuna.Trial":
        self._own[number] = self._study.ask(self._distributions)
        self._own[number].set_user_attr(_FOLDER, number)
        return self._own[number]

    def _close_open(self) -> None:
        """Trials that were running when the last command ended are proposed again under a new number."""
        from optuna.trial import TrialState  # pyright: ignore[reportMissingImports]

        for trial in self._study.get_trials(states=(TrialState.RUNNING, TrialState.WAITING), deepcopy=False):
            if trial.state == TrialState.RUNNING:
                self._study.tell(trial.number, state=TrialState.FAIL)

    def _typed(self, key: str, text: str) -> Any:
        from optuna.distributions import FloatDistribution, IntDistribution  # pyright: ignore[reportMissingImports]

        distribution = self._distributions[key]
        if isinstance(distribution, FloatDistribution):
            return float(text)
        return int(text) if isinstance(distribution, IntDistribution) else text


def _trial(number: int, values: dict[str, str], base: Sequence[str], seed: int) -> Trial:
    own = tuple(f"{key}={value}" for key, value in values.items())
    label = " ".join(f"{key}={_short(value)}" for key, value in values.items())
    kept = tuple(text for text in base if key_of(text) not in {*values, "seed"})
    return Trial(number, label, seed, (*kept, *own, f"seed={seed}"))


def _short(value: str) -> str:
    try:
        return f"{float(value):.3g}"
    except ValueError:
        return value


def _validations(run: Path, after: int) -> list[tuple[int, float]]:
    """(step, loss of the first validation set) later than step `after`, as far as the run has come."""
    found = []
    try:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    for line in lines:
        if '"validation"' not in line:
            continue
        try:
            record = json.loads(line)
        except ValueError:
            continue  # still being written
        if record["step"] > after and record["validation"]:
            found.append((record["step"], next(iter(record["validation"].values()))["loss"]))
    return found
