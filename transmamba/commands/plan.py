"""`transmamba plan`: what a configuration costs before it is queued."""

from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[list[str] | None, typer.Argument(help="key=value and group=choice, as for training")]


def plan(
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Ranks; tp x pp x cp if not given")] = None,
    hardware: Annotated[str, typer.Option(help="h100, h200, a100, a100_40gb, cpu, or a profile's YAML file")] = "h100",
    tokens: Annotated[str | None, typer.Option(help="Budget for days and GPU-hours, such as 300B")] = None,
    search: Annotated[int | None, typer.Option(min=1, help="Rank the layouts for so many GPUs")] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Predict published runs instead: ours, or those of FILE.csv")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Parameters, FLOPs, TransPoints, memory, communication, time and cost of a configuration; trains nothing."""
    from transmamba.planning.answer import run_plan, run_published

    if published:
        raise typer.Exit(run_published(Path(overrides[0]) if overrides else None, as_json))
    found = run_plan(overrides or [], as_json, gpus=gpus, hardware=hardware, tokens=tokens, search=search)
    raise typer.Exit(found)
