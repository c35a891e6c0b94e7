"""A sweep as one Slurm array: every trial is a task; the command returns as soon as the array is queued."""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace

from transmamba.errors import ConfigError, Problem
from transmamba.launch.slurm import SlurmJob, submit
from transmamba.launch.sweeps.files import FAILED, OVER, QUEUED, Status, TrialFolder, read_status, write_status


def check_queue(trials: Sequence[TrialFolder]) -> None:
    """Refuse to queue where there is no Slurm, or trials whose array it still has (ConfigError)."""
    if shutil.which("sbatch") is None:
        fix = "run this where Slurm's commands are, or use --slots"
        raise ConfigError([Problem("--slurm", "sbatch is not found", None, fix)])
    jobs = {status.job for status in map(read_status, trials) if status.job is not None}
    alive = sorted(job for job in jobs if _is_queued(job))
    if alive:
        fix = f"wait for it, or take it back with `scancel {' '.join(alive)}`"
        raise ConfigError([Problem("NAME", "its array is still queued or running", " ".join(alive), fix)])


def queue_trials(
    trials: Sequence[TrialFolder], job: SlurmJob, *, concurrent: int | None = None, retry: bool = False
) -> tuple[str | None, int]:
    """Submit the trials that are not over as tasks of one array.

    Args:
        trials: of one sweep, written to disk.
        job: options of every task; `array`, `trials` and `job_name` are filled in.
        concurrent: tasks at a time; None leaves that to Slurm.
        retry: failed trials too.

    Returns:
        The job id, None when every trial is over, and how many tasks it has.

    Raises:
        ConfigError: no sbatch here, or Slurm refuses the job.
    """
    over = tuple(state for state in OVER if not (retry and state == FAILED))
    waiting = [trial for trial in trials if read_status(trial).state not in over]
    if not waiting:
        return None, 0
    array = ranges([trial.trial.number for trial in waiting]) + ("" if concurrent is None else f"%{concurrent}")
    folder = waiting[0].path.parent
    job_id = submit(replace(job, array=array, trials=folder, job_name=folder.parent.name))
    for trial in waiting:
        write_status(trial, Status(QUEUED, job=job_id, attempts=read_status(trial).attempts + 1))
    return job_id, len(waiting)


def ranges(numbers: Sequence[int]) -> str:
    """Whole numbers as Slurm writes them: `0-2,5`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def _is_queued(job: str) -> bool:
    if shutil.which("squeue") is None:
        return False
    done = subprocess.run(["squeue", "--noheader", "--jobs", job], capture_output=True, text=True)
    return done.returncode == 0 and bool(done.stdout.strip())
