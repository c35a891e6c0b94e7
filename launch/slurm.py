"""A run on Slurm: one batch script from one template, submitted after its configuration was checked."""

import re
import shlex
import shutil
import string
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from transmamba.errors import ConfigError, Problem
from transmamba.launch.attempt import MAX_IDLE_RESTARTS
from transmamba.launch.checked import checked

TEMPLATE = Path(__file__).parent / "slurm.sh.template"
SCRIPT = "slurm.sh"
_WORD = r"[\w.,:/@%+=&|*!()\[\]-]+"
_TIME = r"\d+(-\d{1,2})?(:\d{1,2}){0,2}|UNLIMITED"
_SIZE = r"\d+[KMGT]?"
_NAME = r"[\w.,@%+=-]{1,128}"


@dataclass(frozen=True)
class SlurmJob:
    """What `sbatch` shall get. Options that are None are left out, so the cluster's defaults hold."""

    folder: Path
    """Where the script and the logs go; of a single run its run folder."""
    nodes: int = 1
    gpus_per_node: int = 0
    """Ranks per node, one for each GPU; 0 for ranks on CPUs."""
    procs_per_node: int = 1
    """Ranks per node when there are no GPUs."""
    time: str | None = None
    """Minutes, H:M:S or D-H:M:S."""
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    container: str | None = None
    """Image for srun's --container-image (pyxis); Python is then the image's."""
    array: str | None = None
    """For example 0-11%4."""
    dependency: str | None = None
    """For example afterok:123."""
    pre: tuple[str, ...] = ()
    """Shell commands before the ranks start, on the first node; what they export, the ranks see."""
    mem: str | None = None
    """Per node, for example 64G; 0 is all."""
    cpus: int | None = None
    """Cores per rank."""
    job_name: str = "transmamba"
    requeue: bool = True
    """Whether Slurm may start it again, and whether it asks for that after codes 10, 30 and 31."""
    signal_lead_s: int = 120
    """How long before its time limit the job is asked to save."""
    overrides: tuple[str, ...] | list[str] | None = None
    """Of a single run."""
    trials: Path | None = None
    """Of an array: task 7 reads TRIALS/0007/overrides.txt, one override per line, run.dir=... among them."""

    @property
    def n_ranks(self) -> int:
        """World size."""
        return self.nodes * self.ranks_per_node

    @property
    def ranks_per_node(self) -> int:
        """One per GPU, or as many as asked for."""
        return self.gpus_per_node or self.procs_per_node


class _Template(string.Template):
    delimiter = "@@"  # the script is full of dollars


def script(job: SlurmJob) -> str:
    """The batch script.

    Raises:
        ConfigError: an option is not what it should be.
    """
    problems = [*_problems(job)]
    if problems:
        raise ConfigError(problems)
    return _Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        directives="\n".join(f"#SBATCH --{text}" for text in _directives(job)),
        pre="\n".join(job.pre) or "# (no commands before)",
        what=_what(job),
        python="python3" if job.container else shlex.quote(sys.executable),
        n_ranks=job.n_ranks,
        per_node=job.ranks_per_node,
        step=" ".join(_step(job)),
        requeue="yes" if job.requeue else "no",
        max_idle=MAX_IDLE_RESTARTS,
    )


def submit(job: SlurmJob) -> str:
    """Write the script into the job's folder and queue it; returns the job id.

    Raises:
        ConfigError: no sbatch here, a wrong option, or Slurm refuses the job; nothing is left behind.
    """
    text = script(job)
    if shutil.which("sbatch") is None:
        fix = "run this where Slurm's commands are, or use --print and submit what it shows"
        raise ConfigError([Problem("sbatch", "not found", None, fix)])
    made = [folder for folder in (job.folder / "logs", job.folder, *job.folder.parents) if not folder.exists()]
    (job.folder / "logs").mkdir(parents=True, exist_ok=True)
    path = job.folder / SCRIPT
    path.write_text(text, encoding="utf-8")
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        path.unlink()
        for folder in made:
            folder.rmdir()
        said = done.stderr.strip().removeprefix("sbatch: error: ")
        fix = "correct what Slurm names, or use --print and submit what it shows elsewhere"
        raise ConfigError([Problem("sbatch", said, f"code {done.returncode}", fix)])
    return done.stdout.strip().partition(";")[0]


def prepared(job: SlurmJob) -> SlurmJob:
    """The job of a single run, its configuration validated for all ranks and its folder settled; creates nothing.

    Raises:
        ConfigError: all that is wrong with the configuration and the options.
    """
    problems = _problems(job)
    if job.array is not None and not job.array.endswith("%1"):
        fix = "write %1 after it to run its tasks one after the other, or use `transmamba sweep` for many runs"
        problems.append(Problem("--array", "its tasks would share one run folder", job.array, fix))
    try:
        config, overrides = checked(job.overrides or [], job.n_ranks, may_restart=job.requeue)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    if problems:
        raise ConfigError(problems)
    folder = Path(str(config.run.dir)).absolute()
    values = {**vars(job), "folder": folder, "overrides": overrides}
    if job.job_name == SlurmJob.job_name and re.fullmatch(_NAME, folder.name):
        values["job_name"] = folder.name
    return SlurmJob(**values)


def _directives(job: SlurmJob) -> list[str]:
    """Options of sbatch, as its comment lines want them."""
    task = "%A_%a" if job.array else "%j"
    log = str(job.folder.absolute() / "logs").replace("%", "%%")
    given = {
        "account": job.account,
        "partition": job.partition,
        "qos": job.qos,
        "time": job.time,
        "gpus-per-node": job.gpus_per_node or None,
        "cpus-per-task": job.cpus,
        "mem": job.mem,
        "array": job.array,
        "dependency": job.dependency,
    }
    return [
        f"job-name={job.job_name}",
        f"nodes={job.nodes}",
        f"ntasks-per-node={job.ranks_per_node}",
        *(f"{name}={value}" for name, value in given.items() if value is not None),
        f'chdir="{Path.cwd()}"',
        f'output="{log}/slurm-{task}.out"',
        "open-mode=append",
        f"signal=B:USR2@{job.signal_lead_s}",
        "requeue" if job.requeue else "no-requeue",
    ]


def _what(job: SlurmJob) -> str:
    """Shell lines that set `overrides` and `run_dir`."""
    if job.trials is None:
        lines = "".join(f"    {shlex.quote(text)}\n" for text in job.overrides or [])
        return f"run_dir={shlex.quote(str(job.folder.absolute()))}\noverrides=(\n{lines})"
    trials = shlex.quote(str(job.trials.absolute()))
    return "\n".join(
        [
            f"trial=$(printf '%s/%04d' {trials} \"$SLURM_ARRAY_TASK_ID\")",
            'mapfile -t overrides <"$trial/overrides.txt" || exit 2',
            "run_dir=$(sed -n 's/^run\\.dir=//p' \"$trial/overrides.txt\")",
            "run_dir=${run_dir#[\\\"\\']} run_dir=${run_dir%[\\\"\\']}",
            ': "${run_dir:?is not among the overrides of this trial}"',
        ]
    )


def _step(job: SlurmJob) -> list[str]:
    """Options of srun. The ranks of a node are neighbours, which the watchdog relies on."""
    options = [f"--nodes={job.nodes}", f"--ntasks={job.n_ranks}", f"--ntasks-per-node={job.ranks_per_node}"]
    options.append("--distribution=block:block")
    if job.cpus:
        options.append(f"--cpus-per-task={job.cpus}")
    if job.container:
        places = dict.fromkeys(str(path) for path in (Path.cwd(), job.folder.absolute(), job.trials) if path)
        mounts = ",".join(f"{place}:{place}" for place in places)
        options += [f"--container-image={shlex.quote(job.container)}", f"--container-mounts={shlex.quote(mounts)}"]
        options.append(f"--container-workdir={shlex.quote(str(Path.cwd()))}")
    return options


def _problems(job: SlurmJob) -> list[Problem]:
    name_fix = "give the name as Slurm knows it, without blanks, quotes or shell characters"
    patterns = {
        "time": (_TIME, "write minutes, H:M:S or D-H:M:S"),
        "mem": (_SIZE, "write a size such as 64G"),
        "job_name": (_NAME, "use letters, digits and . , @ % + = - _"),
        "array": (r"[\d,:%-]+", "write it like 0-11%4"),
        **dict.fromkeys(("account", "partition", "qos", "dependency"), (_WORD, name_fix)),
    }
    problems = []
    for name, (pattern, fix) in patterns.items():
        value = getattr(job, name)
        if value is not None and not re.fullmatch(pattern, value, re.ASCII):
            problems.append(Problem(f"--{name.replace('_', '-')}", "not an option that Slurm takes", value, fix))
    for name, value in {
        "run.dir": job.folder.absolute(),
        "working folder": Path.cwd(),
        "--container": job.container,
    }.items():
        if value is not None and re.search(r'["\\$`\x00-\x1f]', str(value)):
            fix = "use a path without quotes, backslashes, dollars and line breaks"
            problems.append(Problem(name, "cannot be written into a batch script", value, fix))
    problems += [
        Problem("--pre", "more than one line", text, "give --pre once per command") for text in job.pre if "\n" in text
    ]
    problems += [
        Problem(text.partition("=")[0], "has a line break", text, "write it on one line")
        for text in job.overrides or []
        if "\n" in text
    ]
    if job.trials is not None and job.array is None:
        problems.append(Problem("--array", "needed to run trials", None, "say which, for example 0-11%4"))
    return problems
