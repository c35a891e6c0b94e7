"""From a request to running or queued trials: everything is checked before anything is created."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transmamba.compose import load
from transmamba.errors import EXIT_DONE, EXIT_STOPPED, ConfigError, Problem
from transmamba.launch import sweep
from transmamba.launch.slurm import SlurmJob, script
from transmamba.launch.sweep import TrialFolder, trial_folder
from transmamba.launch.sweep_local import Listed, Queue, Slots
from transmamba.launch.sweep_optuna import Search, corner_trials, read_dimension, require_optuna
from transmamba.launch.sweep_request import Request, check_overrides
from transmamba.launch.sweep_slurm import check_queue, queue_trials, ranges


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
    sweep.check_definition(folder, request.as_dict())
    sweep.check_trials(trials, here.n_ranks)
    if dry_run:
        return _show(trials, folder, "corners of the space, " if request.optuna else "")
    sweep.create(folder, request.as_dict(), [] if request.optuna else trials)
    with sweep.held(folder):
        queue = _search(request, folder, n_trials) if request.optuna else Listed(trials, retry=retry)
        n_left = queue.left()
        _say(f"{n_left} trials to run in {folder}, {here.slots} at a time")
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
    sweep.check_definition(folder, request.as_dict())
    sweep.check_trials(trials, job.n_ranks)
    array = ranges([trial.trial.number for trial in trials])
    text = script(replace(job, array=array, trials=folder / "trials"))
    if dry_run:
        print(text, end="")
        return EXIT_DONE
    check_queue(trials)
    sweep.create(folder, request.as_dict(), trials)
    with sweep.held(folder):
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


def _named(folder: Path) -> str:
    """NAME of the command, with --dir where the folder is not where sweeps are by default."""
    return folder.name if folder.parent == sweep.SWEEPS else f"{folder.name} --dir {folder}"


def _say(line: str) -> None:
    print(line, flush=True)
