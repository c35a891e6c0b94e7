"""A sweep on disk: what was asked, a folder per trial, and what became of each; checked before anything is created.

`sweep.json` is what was asked. `trials/0007/` holds `trial.json`, `overrides.txt` (one override per line),
`status.json` once it was started, `log.txt`, and the run folder, which is named after sweep and trial.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transmamba.errors import EXIT_DONE, EXIT_HANG, EXIT_RANK_DIED, EXIT_STOP_FILE, EXIT_STOPPED, ConfigError, Problem
from transmamba.launch.attempt import DIED_BY_SIGNAL
from transmamba.launch.checked import checked
from transmamba.launch.sweeps.trials import Trial, assignment

FORMAT = 1
SWEEPS = Path("runs/sweeps")
# What a trial does not end by: the same call again goes on from its checkpoint. A signal that killed it is none either.
INTERRUPTED = (EXIT_STOPPED, EXIT_HANG, EXIT_RANK_DIED)
WAITING, QUEUED, RUNNING, INTERRUPTED_STATE, DONE, STOPPED, PRUNED, FAILED = (
    *("waiting", "queued", "running", "interrupted", "done", "stopped", "pruned", "failed"),
)
OVER = (DONE, STOPPED, PRUNED, FAILED)


@dataclass(frozen=True, slots=True)
class Status:
    """What became of a trial: `state`, the exit code of its last attempt, attempts and seconds of all of them."""

    state: str = WAITING
    code: int | None = None
    attempts: int = 0
    seconds: float = 0.0
    job: str | None = None  # of Slurm


@dataclass(frozen=True, slots=True)
class TrialFolder:
    """Where a trial lies."""

    path: Path
    trial: Trial

    @property
    def run(self) -> Path:
        """The run folder; its name is unique among sweeps, because trackers take it for the run's name."""
        return self.path / f"{self.path.parent.parent.name}-{self.path.name}"

    @property
    def overrides(self) -> list[str]:
        """Of the trial, with its run folder."""
        return [*self.trial.overrides, assignment("run.dir", str(self.run))]


def trial_folder(folder: Path, trial: Trial) -> TrialFolder:
    """Where a trial of the sweep in `folder` lies."""
    return TrialFolder(folder / "trials" / f"{trial.number:04d}", trial)


def check_trials(trials: Sequence[TrialFolder], n_ranks: int) -> None:
    """Validate the configuration of every trial that is not over; creates nothing.

    Raises:
        ConfigError: one line per problem, with the first trial that has it and how many others do.
    """
    found: dict[tuple[str, str, str, str], list[TrialFolder]] = {}
    for trial in trials:
        if read_status(trial).state in OVER:
            continue
        for problem in _problems(trial, n_ranks):
            key = (problem.key, problem.problem, str(problem.value), problem.fix)
            found.setdefault(key, []).append(trial)
    problems = []
    for (key, what, value, fix), own in found.items():
        others = f" (and {len(own) - 1} more trials)" if len(own) > 1 else ""
        problems.append(Problem(f"trial {own[0].trial.name}{others}: {key}", what, value, fix))
    if problems:
        raise ConfigError(problems)


def _problems(trial: TrialFolder, n_ranks: int) -> list[Problem]:
    try:
        config, _ = checked(trial.overrides, n_ranks, may_restart=True)
        if config.run.dir != str(trial.run):
            return [Problem("--dir", "is read as another folder", config.run.dir, "give a path of plain letters")]
    except ConfigError as error:
        return error.problems
    return []


def check_definition(folder: Path, definition: Mapping[str, Any]) -> None:
    """Refuse a folder that holds another sweep, or something else (ConfigError)."""
    file = folder / "sweep.json"
    if not file.exists():
        if folder.exists() and any(folder.iterdir()):
            fix = "use another name, or an empty --dir"
            raise ConfigError([Problem("NAME", "the folder holds something that is not a sweep", folder, fix)])
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))["definition"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError([Problem("NAME", "its sweep.json cannot be read", file, "use another name")]) from error
    now = json.loads(json.dumps(definition))
    keys = before.keys() | now.keys()
    # What is not asked for may be missing in a file of an earlier version.
    differing = sorted(key for key in keys if (before.get(key) or None) != (now.get(key) or None))
    if differing:
        what = "; ".join(f"{key} was {before.get(key)}" for key in differing)
        fix = "use another name, or the same definition to go on"
        now_text = ", ".join(f"{key} {now.get(key)}" for key in differing)
        raise ConfigError([Problem("NAME", f"{folder} holds another sweep: {what}", now_text, fix)])


def create(folder: Path, definition: Mapping[str, Any], trials: Sequence[TrialFolder]) -> None:
    """Write the sweep's files; what is there already stays."""
    (folder / "trials").mkdir(parents=True, exist_ok=True)
    for trial in trials:
        add(trial)
    if not (folder / "sweep.json").exists():
        record = {"format": FORMAT, "definition": definition}
        write_json(folder / "sweep.json", record)


def add(trial: TrialFolder) -> None:
    """Write one trial's files."""
    trial.path.mkdir(parents=True, exist_ok=True)
    if not (trial.path / "trial.json").exists():
        (trial.path / "overrides.txt").write_text("".join(f"{text}\n" for text in trial.overrides), encoding="utf-8")
        write_json(trial.path / "trial.json", asdict(trial.trial))


def read_trials(folder: Path) -> list[TrialFolder]:
    """The trials of a sweep, in order.

    Raises:
        ConfigError: there is no sweep in `folder`.
    """
    if not (folder / "sweep.json").is_file():
        near = sorted(path.parent.name for path in folder.parent.glob("*/sweep.json"))
        fix = f"give one of {', '.join(near)}" if near else "start one with `transmamba sweep NAME --grid ...`"
        raise ConfigError([Problem("NAME", "no sweep is there", folder, fix)])
    found = []
    for file in sorted(folder.glob("trials/*/trial.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        trial = Trial(record["number"], record["group"], record["seed"], tuple(record["overrides"]))
        found.append(TrialFolder(file.parent, trial))
    return found


def read_status(trial: TrialFolder) -> Status:
    """What became of a trial. Of one that Slurm started the run folder tells."""
    record = _read_json(trial.path / "status.json")
    status = Status(**record) if record else Status()
    if status.job is None:
        return status
    ended = _read_json(trial.run / "exit.json")
    if (trial.run / "lock.json").exists():
        return replace(status, state=RUNNING)
    if not ended or (trial.run / "exit.json").stat().st_mtime < (trial.path / "status.json").stat().st_mtime:
        return status  # it ended before it was queued again
    return replace(status, state=state_of(ended["code"]), code=ended["code"])


def write_status(trial: TrialFolder, status: Status) -> None:
    """Replace a trial's status."""
    write_json(trial.path / "status.json", asdict(status))


def state_of(code: int) -> str:
    """What an exit code means for a sweep; one below 0 or above 128 is the signal that killed it."""
    if code == EXIT_DONE:
        return DONE
    if code == EXIT_STOP_FILE:
        return STOPPED
    return INTERRUPTED_STATE if code in INTERRUPTED or not 0 <= code <= DIED_BY_SIGNAL else FAILED


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write JSON so that a reader sees the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def check_free(folder: Path) -> None:
    """Refuse a sweep that another command runs now (ConfigError); creates nothing."""
    if (folder / "lock").exists():
        with held(folder):
            pass


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the sweep while the block runs, so that no second command starts its trials (ConfigError if one does)."""
    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            fix = "wait for it or stop it with Ctrl-C; `transmamba sweep show` works meanwhile"
            raise ConfigError([Problem("NAME", "the sweep is being run by another command", folder, fix)]) from error
        yield


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
