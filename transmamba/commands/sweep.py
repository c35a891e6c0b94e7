"""`transmamba sweep ...`: many runs that differ in some keys."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from transmamba.answer import answer

if TYPE_CHECKING:
    from transmamba.launch.sweeps.files import TrialFolder
    from transmamba.launch.sweeps.report.leaderboard import Facts

_DEFAULT = "run"
# What is heard only together with another option: alone it would be lost, and trials would start where none should.
_SLURM_ONLY = (
    *("concurrent", "nodes", "gpus_per_node", "procs", "time", "account", "partition", "qos", "container"),
    *("dependency", "pre", "mem", "cpus"),
)
_HERE_ONLY = ("slots", "nproc", "time_limit")


class _RunByDefault(TyperGroup):
    """`transmamba sweep NAME ...` is `transmamba sweep run NAME ...`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = [_DEFAULT, *args]
        return super().parse_args(ctx, args)


sweep = typer.Typer(
    cls=_RunByDefault,
    help="Many runs that differ in some keys: `transmamba sweep NAME --grid key=a,b -- OVERRIDES`, then "
    "`transmamba sweep show NAME`. All options: `transmamba sweep run --help`.",
    no_args_is_help=True,
)

Name = Annotated[str, typer.Argument(help="Name of the sweep; its folder is runs/sweeps/NAME")]
Dir = Annotated[Path | None, typer.Option("--dir", help="Another folder for the sweep")]
_SLURM = "With --slurm"
Text = str | None
Space = Annotated[list[str] | None, typer.Option(help="key=log(a,b), uniform(a,b), int(a,b) or choice(a,b); repeated")]


@sweep.command(_DEFAULT)
def run_sweep(
    ctx: typer.Context,
    name: Name,
    overrides: Annotated[list[str] | None, typer.Argument(help="After --: key=value of every trial")] = None,
    grid: Annotated[list[str] | None, typer.Option(help="key=a,b,c; repeated, all combinations")] = None,
    schedules: Annotated[Text, typer.Option(help="v1..v9, names, or points such as [0,0.5,inf]")] = None,
    controls: Annotated[bool, typer.Option("--controls", help="attention_only, mamba_only, layer_hybrid too")] = False,
    random: Annotated[int, typer.Option(min=0, help="So many random schedules at --flop-budget")] = 0,
    flop_budget: Annotated[Text, typer.Option(help="Schedule, or training FLOPs per token; v9 if none")] = None,
    optuna: Space = None,
    n_trials: Annotated[int, typer.Option("--trials", min=1, help="Of --optuna")] = 20,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds of every combination")] = 1,
    slots: Annotated[int, typer.Option(min=1, help="Trials at a time on this machine")] = 1,
    nproc: Annotated[int, typer.Option(min=1, max=1024, help="Ranks of a trial on this machine")] = 1,
    time_limit: Annotated[Text, typer.Option(help="Stop and save all trials after 90s, 40m or 2h")] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Start failed trials again")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list the trials; create nothing")] = False,
    folder: Dir = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Queue the trials as an array and return")] = False,
    concurrent: Annotated[int | None, typer.Option(min=1, rich_help_panel=_SLURM, help="Tasks at a time")] = None,
    nodes: Annotated[int, typer.Option(min=1, rich_help_panel=_SLURM)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, max=64, rich_help_panel=_SLURM)] = 8,
    procs: Annotated[int, typer.Option(min=1, rich_help_panel=_SLURM, help="Ranks per node without GPUs")] = 1,
    time: Annotated[Text, typer.Option(rich_help_panel=_SLURM, help="Minutes, or hours:minutes:seconds")] = None,
    account: Annotated[Text, typer.Option(rich_help_panel=_SLURM)] = None,
    partition: Annotated[Text, typer.Option(rich_help_panel=_SLURM)] = None,
    qos: Annotated[Text, typer.Option(rich_help_panel=_SLURM)] = None,
    container: Annotated[Text, typer.Option(rich_help_panel=_SLURM, help="Image (pyxis)")] = None,
    dependency: Annotated[Text, typer.Option(rich_help_panel=_SLURM, help="For example afterok:123")] = None,
    pre: Annotated[list[str] | None, typer.Option(rich_help_panel=_SLURM, help="Shell command before")] = None,
    mem: Annotated[Text, typer.Option(rich_help_panel=_SLURM, help="Per node")] = None,
    cpus: Annotated[int | None, typer.Option(min=1, rich_help_panel=_SLURM, help="Cores per rank")] = None,
) -> None:
    """Run a sweep; the same command again goes on with what is left."""
    place = _folder(name, folder)
    codes: list[int] = []

    def run() -> None:
        _refuse_unheard(ctx)
        codes.append(_start(place, ctx.params))

    answer(run)
    raise typer.Exit(codes[0])


def _refuse_unheard(ctx: typer.Context) -> None:
    """Refuse options that say nothing beside the others (ConfigError)."""
    from transmamba.errors import ConfigError, Problem

    given = {name for name in ctx.params if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"}
    unheard = {
        "give --slurm too, or leave it out": () if "slurm" in given else _SLURM_ONLY,
        "leave it out; with --slurm the trials do not run here": _HERE_ONLY if "slurm" in given else (),
        "give --optuna too, or leave it out": () if "optuna" in given else ("n_trials",),
        "give --random N too, or leave it out": () if "random" in given else ("flop_budget",),
    }
    problems = [
        Problem("--" + name.removeprefix("n_").replace("_", "-"), "says nothing here", ctx.params[name], fix)
        for fix, names in unheard.items()
        for name in names
        if name in given
    ]
    if problems:
        raise ConfigError(problems)


def _start(folder: Path, asked: dict[str, Any]) -> int:
    """Start what `run_sweep` was asked for, by its parameters' names; returns the exit code."""
    from transmamba.launch.slurm import SlurmJob
    from transmamba.launch.sweeps.request import Request
    from transmamba.launch.sweeps.start import Here, queue_on_slurm, run_here

    request = Request(
        grid=tuple(asked["grid"] or ()),
        schedules=asked["schedules"],
        controls=asked["controls"],
        random=asked["random"],
        flop_budget=asked["flop_budget"] if asked["random"] else None,
        seeds=asked["seeds"],
        overrides=tuple(asked["overrides"] or ()),
        optuna=tuple(asked["optuna"] or ()),
    )
    retry, dry_run = asked["retry"], asked["dry_run"]
    if not asked["slurm"]:
        here = Here(asked["slots"], asked["nproc"], _seconds(asked["time_limit"]))
        return run_here(request, folder, here, n_trials=asked["n_trials"], retry=retry, dry_run=dry_run)
    same = ("nodes", "gpus_per_node", "time", "account", "partition", "qos", "container", "dependency", "mem", "cpus")
    options = {name: asked[name] for name in same}
    job = SlurmJob(folder=folder, procs_per_node=asked["procs"], pre=tuple(asked["pre"] or ()), **options)
    return queue_on_slurm(request, folder, job, concurrent=asked["concurrent"], retry=retry, dry_run=dry_run)


@sweep.command("show")
def show_sweep(
    name: Name,
    out: Annotated[
        Path | None, typer.Option(help="Folder for table, picture and page; the sweep's own if none")
    ] = None,
    sort: Annotated[str, typer.Option(help="Column to sort by")] = "loss",
    folder: Dir = None,
) -> None:
    """Compare the groups of a sweep: a table here, CSV, JSON, a picture and one HTML page; also while it runs."""
    place = _folder(name, folder)

    def run() -> None:
        from rich.console import Console

        from transmamba.launch.sweeps.report.show import show

        show(place, place if out is None else out, _facts_of, sort, Console())

    answer(run)


def _facts_of(trial: "TrialFolder") -> "Facts":
    """Steps, TransPoints and FLOPs of a trial: with its data once its run has begun, else by whole windows."""
    from transmamba.compose import load
    from transmamba.corpus import open_corpus
    from transmamba.launch.sweeps.report.show import facts
    from transmamba.plan import make_plan
    from transmamba.transpoint import points

    stored = trial.run / "config.yaml"
    config = load(["--config", str(stored)] if stored.exists() else list(trial.trial.overrides))
    corpus = open_corpus(config) if stored.exists() else None
    phases = []
    model, data = config.model, config.data
    for step in [0, *sorted(change.step for change in config.transpoint.changes)]:
        then = config.model_copy(deep=True)
        then.transpoint.points, then.transpoint.changes = (
            points(config.transpoint, model.n_layers, data.seq_len, step),
            [],
        )
        phases.append((step, make_plan(then, corpus).training_flops_per_token))
    return facts(config, phases)


def _folder(name: str, folder: Path | None) -> Path:
    from transmamba.errors import EXIT_CONFIG, Problem
    from transmamba.launch.sweeps.files import SWEEPS

    if re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", name, re.ASCII) and name not in ("show", _DEFAULT):
        return folder or SWEEPS / name
    fix = "give a name of letters, digits, '.', '_' and '-'; the folder itself is --dir FOLDER"
    typer.echo(Problem("NAME", "not the name of a sweep", name, fix).line(), err=True)
    raise typer.Exit(EXIT_CONFIG)


def _seconds(text: str | None) -> float | None:
    from transmamba.config import parse_seconds
    from transmamba.errors import ConfigError, Problem

    value = parse_seconds(text)
    if value is None or isinstance(value, float):
        return value
    raise ConfigError([Problem("--time-limit", "not a duration", text, "write 90s, 40m, 2h or 1d")])
