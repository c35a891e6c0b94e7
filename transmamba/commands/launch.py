"""`transmamba launch ...`: start a run under torchrun or Slurm."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from transmamba.answer import answer

launch = typer.Typer(
    help="Start a run on this machine or on Slurm; --print shows exactly what would run.", no_args_is_help=True
)

Overrides = Annotated[list[str] | None, typer.Argument(help="After --: key=value and group=choice, as for training")]
Print = Annotated[bool, typer.Option("--print", help="Show what would run, and run nothing")]


@launch.command()
def local(
    overrides: Overrides = None,
    nproc: Annotated[int, typer.Option(min=1, max=1024, help="Ranks on this machine")] = 1,
    max_restarts: Annotated[
        int, typer.Option(min=0, help="How often a run that hangs or loses a rank is started again")
    ] = 0,
    print_only: Print = False,
) -> None:
    """Run on this machine and end with the run's own exit code. Ctrl-C saves and stops."""

    def run() -> None:
        from transmamba.launch.local import run_local, shown

        if print_only:
            print(shown(overrides or [], nproc, max_restarts=max_restarts))
        elif code := run_local(overrides or [], nproc, max_restarts=max_restarts):
            raise typer.Exit(code)

    answer(run)


@launch.command()
def slurm(
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, max=100_000)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, max=64, help="One rank each; 0 for ranks on CPUs")] = 8,
    procs: Annotated[int, typer.Option(min=1, max=1024, help="Ranks per node with --gpus-per-node 0")] = 1,
    time: Annotated[str | None, typer.Option(help="Minutes, or hours:minutes:seconds")] = None,
    account: Annotated[str | None, typer.Option()] = None,
    partition: Annotated[str | None, typer.Option()] = None,
    qos: Annotated[str | None, typer.Option()] = None,
    container: Annotated[str | None, typer.Option(help="Image for srun --container-image (pyxis)")] = None,
    array: Annotated[
        str | None, typer.Option(help="0-9%1: ten jobs, one after the other, that continue one run")
    ] = None,
    dependency: Annotated[str | None, typer.Option(help="For example afterok:123")] = None,
    pre: Annotated[list[str] | None, typer.Option(help="Shell command before the ranks start; may be repeated")] = None,
    mem: Annotated[str | None, typer.Option(help="Per node, for example 64G")] = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="Cores per rank")] = None,
    job_name: Annotated[str, typer.Option(help="The run folder's name if none")] = "transmamba",
    requeue: Annotated[bool, typer.Option(help="Go on after a time limit, a preemption, a hang or a death")] = True,
    signal_lead: Annotated[int, typer.Option(min=1, max=65535, help="Seconds before the time limit to save")] = 120,
    print_only: Print = False,
) -> None:
    """Queue a run on Slurm: the configuration is checked for all ranks first. Prints the job id."""

    def run() -> None:
        from transmamba.launch.slurm import SlurmJob, prepared, script, submit

        job = SlurmJob(folder=Path(), nodes=nodes, gpus_per_node=gpus_per_node, procs_per_node=procs)
        job = replace(job, time=time, account=account, partition=partition, qos=qos, dependency=dependency)
        job = replace(job, container=container, array=array, pre=tuple(pre or ()), mem=mem, cpus=cpus)
        job = replace(job, job_name=job_name, requeue=requeue, signal_lead_s=signal_lead, overrides=overrides or [])
        job = prepared(job)
        if print_only:
            print(script(job), end="")
        else:
            print(f"job {submit(job)}, run folder {job.folder}")

    answer(run)
