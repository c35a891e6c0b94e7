"""`transmamba runs ...`: look at runs."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from transmamba.answer import answer

if TYPE_CHECKING:
    from transmamba.runs import RunState

runs = typer.Typer(help="Look at runs.", no_args_is_help=True)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table")]
RunDirs = Annotated[list[Path], typer.Argument(help="Run folders")]
_COLOURS = {"running": "green", "done": "cyan", "failed": "red", "crashed": "red", "silent": "yellow"}


@runs.command("ls")
def list_runs(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder with runs, sweeps included")] = Path("runs"),
    sort: Annotated[Literal["age", "name", "loss", "validation"], typer.Option(help="Least first")] = "age",
    as_json: AsJson = False,
) -> None:
    """All runs under a folder: how they are doing, how far they are, and their last numbers."""
    from transmamba.runs import find_runs, run_state

    def run() -> None:
        found = find_runs(folder)
        states = [run_state(path, str(path.relative_to(folder)) if path != folder else None) for path in found]
        key = {"age": "age_s"}.get(sort, sort)
        states.sort(key=lambda state: (getattr(state, key) is None, getattr(state, key), state.name))
        if as_json:
            print(json.dumps([asdict(state) for state in states], indent=1))
        elif states:
            _print_table(states)
        else:
            print(f"no runs under {folder}")

    answer(run)


@runs.command()
def show(run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder")], as_json: AsJson = False) -> None:
    """One run: configuration, plan, how it ended and who was blamed, restarts, checkpoints, slow ranks."""
    from transmamba.runs_show import describe_run, show_rows

    def run() -> None:
        about = describe_run(run_dir)
        if as_json:
            print(json.dumps(about, indent=1))
            return
        for name, value in show_rows(about):
            print(f"{name:<13}{value}")

    answer(run)


@runs.command()
def plot(
    run_dirs: RunDirs,
    x: Annotated[Literal["step", "tokens", "time"], typer.Option(help="Horizontal axis; time is hours of training")] = (
        "step"
    ),
    y: Annotated[str, typer.Option(help="With commas: members of metrics.jsonl, validation, bits_per_byte")] = "loss",
    out: Annotated[Path, typer.Option(help="The picture: png, svg or pdf")] = Path("runs.png"),
) -> None:
    """Draw what runs recorded, one picture below the other, the runs in one colour each."""
    from transmamba.plot import plot_runs

    def run() -> None:
        plot_runs(run_dirs, x, y.split(","), out)
        print(f"drawn to {out}")

    answer(run)


@runs.command()
def compare(
    run_dirs: Annotated[list[Path], typer.Argument(help="Run folders; the others are compared with the first")],
    out: Annotated[Path, typer.Option(help="The picture")] = Path("compare.png"),
) -> None:
    """Draw the losses of several runs over each other; say how far apart they are and which settings differ."""
    from transmamba.plot import compare_losses, run_labels
    from transmamba.runs import run_state
    from transmamba.runs_show import differing_keys

    def run() -> None:
        lines = compare_losses(run_dirs, out)
        names = ("step", "tokens", "loss", "validation", "tokens_per_s")
        states = [asdict(run_state(folder)) for folder in run_dirs]
        rows = [[name.replace("_per_s", "/s"), *(_number(state[name]) for state in states)] for name in names]
        rows += [[key, *map(_plain, values)] for key, values in differing_keys(run_dirs).items()]
        _print_rows(["", *run_labels(run_dirs)], rows)
        print("\n".join([*lines, f"drawn to {out}"]))

    answer(run)


def _print_table(states: "list[RunState]") -> None:
    rows = [
        [state.name, f"[{_COLOURS.get(state.state, 'default')}]{state.state}[/]", state.why,
         f"{state.step}/{state.steps or '?'}", _number(state.tokens), _number(state.loss), _number(state.validation),
         _number(state.tokens_per_s), _span(state.age_s)]
        for state in states
    ]  # fmt: skip
    _print_rows(["run", "state", "", "step", "tokens", "loss", "validation", "tokens/s", "age"], rows)


def _print_rows(header: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 1), header_style="dim")
    for number, name in enumerate(header):
        table.add_column(name, overflow="fold", no_wrap=number == 0 and sys.stdout.isatty())
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if value >= 100 else f"{value:.4f}"


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _span(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"
