"""`transmamba checkpoint ...`: look at what a run saved."""

from pathlib import Path
from typing import Annotated

import typer

from transmamba.answer import answer
from transmamba.errors import EXIT_NO_VALID_CHECKPOINT, RunError

checkpoint = typer.Typer(help="Look at a run's checkpoints.", no_args_is_help=True)

RunDir = Annotated[Path, typer.Argument(help="A run folder")]


@checkpoint.command("list")
def list_checkpoints(run_dir: RunDir) -> None:
    """Checkpoints of a run, newest first."""
    answer(lambda: _tell(run_dir, deep=False))


@checkpoint.command("verify")
def verify_checkpoints(run_dir: RunDir) -> None:
    """Read and verify every byte of a run's checkpoints; exit 21 names the damaged files."""
    answer(lambda: _tell(run_dir, deep=True))


def _tell(run_dir: Path, *, deep: bool) -> None:
    from transmamba.checkpoints_tools.listing import entries

    faults = 0
    for entry in entries(run_dir, deep=deep):
        faults += entry.fault is not None
        state = entry.fault or ("verified" if deep else "complete")
        print(f"{entry.path.name}  {entry.tokens:>15,} tokens  {entry.n_bytes:>15,} bytes  {state}")
    if faults:
        raise RunError(
            EXIT_NO_VALID_CHECKPOINT,
            f"RUN_DIR: {faults} damaged checkpoints in {run_dir}. Fix: restore them from a copy; resume skips them",
        )
