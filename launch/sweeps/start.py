"""From a request to running or queued trials: everything is checked before anything is created."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transmamba.compose import load
from transmamba.errors import EXIT_DONE, EXIT_STOPPED, ConfigError, Problem
from transmamba.launch.slurm import SlurmJob, script
from transmamba.launch.sweeps import files
from transmamba.launch.sweeps.files import TrialFolder, trial_folder
from transmamba.launch.sweeps.local import Listed, Queue, Slots
from transmamba.launch.sweeps.request import Request, check_overrides, twins
from transmamba.launch.sweeps.search import Search, corner_trials, read_dimension, require_optuna
from transmamba.launch.sweeps.slurm import check_queue, queue_trials, ranges

_MAX_COMPARED = 200  # trials; reading a configuration takes some 30 ms


@dataclass(frozen=True, slots=True)
class Here:
    """This machine: trials at a time, ranks of each, and seconds after which all are stopped."""

    slots: int = 1
    n_ranks: int = 1
    time_limit_s: float | None = None


def run_here(request: Request, folder: Path, here: Here, *, n_trials: int, retry: bool, dry_run: bool) -> int:
    """Run a sweep on this machine, or go on with it; returns the exit code of `Slots.run`.

    Raises:
        ConfigError: a problem of the request, of a trial's configuration, or of the folder; nothing was created.
    """
    trials = _search_corners(request, folder) if request.optuna else request.trials(folder)
    files.check_definition(folder, request.as_dict())
    files.check_free(folder)
    files.check_trials(trials, here.n_ranks)
    _say_twins([] if request.optuna else trials)
    if dry_run:
        return _show(trials, folder, "corners of the space, " if request.optuna else "")
    files.create(folder, request.as_dict(), [] if request.optuna else trials)
    with files.held(folder):
        queue = _search(request, folder, n_trials) if request.optuna else Listed(trials, retry=retry)
        how = f"{here.slots} at a time" if queue.left() else _how_they_ended(folder)
        _say(f"{queue.left()} trials to run in {folder}, {how}")
        code = Slots(here.slots, n_ranks=here.n_ranks, time_limit_s=here.time_limit_s, say=_say).run(queue)
    _say(f"next: transmamba sweep show {_named(folder)}" + (", or the same command to go on" * (code == EXIT_STOPPED)))
    return code


def queue_on_slurm(
    request: Request, folder: Path, job: SlurmJob, *, concurrent: int | None, retry: bool, dry_run: bool
) -> int:
    """Queue a sweep as a Slurm array, or what is left of it, and return at once.

    Raises:
        ConfigError: as `run_here`; an array of this sweep is still queued; no sbatch; a search, which needs slots.
    """
    if request.optuna:
        fix = "run it with --slots on a node, or queue a grid"
        raise ConfigError([Problem("--optuna", "proposes trials one after the other, an array is fixed", None, fix)])
    trials = request.trials(folder)
    files.check_definition(folder, request.as_dict())
    files.check_free(folder)
    files.check_trials(trials, job.n_ranks)
    _say_twins(trials)
    array = ranges([trial.trial.number for trial in trials])
    text = script(replace(job, array=array, trials=folder / "trials"))
    if dry_run:
        print(text, end="")
        return EXIT_DONE
    check_queue(trials)
    files.create(folder, request.as_dict(), trials)
    with files.held(folder):
        job_id, n_tasks = queue_trials(trials, job, concurrent=concurrent, retry=retry)
    _say(f"{n_tasks} of {len(trials)} trials queued as job {job_id}" if job_id else "every trial is over")
    _say(f"next: transmamba sweep show {_named(folder)}")
    return EXIT_DONE


def _search_corners(request: Request, folder: Path) -> list[TrialFolder]:
    if request.grid or request.schedules or request.controls or request.random or request.seeds > 1:
        fix = "give schedules as a choice, --optuna 'transpoint=choice(v1,v9)', and seed=N after --"
        raise ConfigError([Problem("--optuna", "searches alone, without --grid, --schedules or --seeds", None, fix)])
    check_overrides(request.overrides)
    require_optuna()
    space = [read_dimension(text) for text in request.optuna]
    seed = load(list(request.overrides)).seed
    return [trial_folder(folder, trial) for trial in corner_trials(space, request.overrides, seed)]


def _search(request: Request, folder: Path, n_trials: int) -> Queue:
    space = [read_dimension(text) for text in request.optuna]
    return Search(folder, space, request.overrides, load(list(request.overrides)).seed, n_trials)


def _show(trials: Sequence[TrialFolder], folder: Path, what: str) -> int:
    for trial in trials:
        print(f"{trial.trial.name:<40} {' '.join(trial.trial.overrides)}")
    print(f"{what}{len(trials)} trials in {folder}; nothing was created")
    return EXIT_DONE


def _say_twins(trials: Sequence[TrialFolder]) -> None:
    for group, first in twins(trials) if len(trials) <= _MAX_COMPARED else ():
        print(f"note: {group} is {first} under another name: equal TransPoints, so equal runs", file=sys.stderr)


def _how_they_ended(folder: Path) -> str:
    states = [files.read_status(trial).state for trial in files.read_trials(folder)]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return f"all are over: {counts}" + ("; --retry starts failed ones again" * (files.FAILED in states))


def _named(folder: Path) -> str:
    """NAME of the command, with --dir where the folder is not where sweeps are by default."""
    return folder.name if folder.parent == files.SWEEPS else f"{folder.name} --dir {folder}"


def _say(line: str) -> None:
    print(line, flush=True)
