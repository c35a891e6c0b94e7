"""`transmamba checkpoint ...`: look at what a run saved, compare it, and cut it anew."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from transmamba.answer import answer
from transmamba.errors import EXIT_NO_VALID_CHECKPOINT, RunError

checkpoint = typer.Typer(help="Look at checkpoints, compare them and cut them anew.", no_args_is_help=True)

RunDir = Annotated[Path, typer.Argument(help="A run folder")]
Place = Annotated[Path, typer.Argument(help="A run folder, for its newest checkpoint, or a checkpoint folder")]
Step = Annotated[int | None, typer.Option(min=0, help="The checkpoint of this step instead of the newest valid one")]
Out = Annotated[Path, typer.Option(help="A new run folder")]


@checkpoint.command("list")
def list_checkpoints(run_dir: RunDir) -> None:
    """Checkpoints of a run, newest first."""
    answer(lambda: _tell(run_dir, deep=False))


@checkpoint.command("verify")
def verify_checkpoints(run_dir: RunDir) -> None:
    """Read and verify every byte of a run's checkpoints; exit 21 names the damaged files."""
    answer(lambda: _tell(run_dir, deep=True))


@checkpoint.command()
def inspect(run_dir: Place, step: Step = None, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """The tensors of a checkpoint with shapes, statistics and whether their bytes are as written."""

    def run() -> None:
        from rich.console import Console

        from transmamba.checkpoints_tools.inspection import as_json as to_json
        from transmamba.checkpoints_tools.inspection import facts, tree
        from transmamba.checkpoints_tools.listing import chosen, unusable

        found = chosen(run_dir, step)
        rows = list(facts(found))
        if as_json:
            print(json.dumps(to_json(found, rows), indent=1))
        else:
            Console(highlight=False, width=None if sys.stdout.isatty() else 240).print(tree(found, rows))
        faults = [row.fault for row in rows if row.fault is not None]
        if faults:
            raise unusable(faults[0])

    answer(run)


@checkpoint.command()
def diff(
    first: Place,
    second: Place,
    step: Annotated[int | None, typer.Option(min=0, help="Of both")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Equal tensors too")] = False,
) -> None:
    """How far two checkpoints are apart, per tensor, and what their records say differently."""
    answer(lambda: _tell_differences(first, second, step, everything))


@checkpoint.command()
def reshard(
    run_dir: Place,
    out: Out,
    tp: Annotated[int, typer.Option(min=1, max=1024, help="Tensor parallel ranks")] = 1,
    dp: Annotated[int, typer.Option(min=1, max=65536, help="Ranks that share the rest, as ZeRO cuts it")] = 1,
    step: Step = None,
) -> None:
    """Rewrite a checkpoint as so many ranks would have saved it: with 1 and 1, every tensor in one piece.

    Not needed to continue in another layout, which any checkpoint allows; it saves the ranks reading what they
    do not use.
    """

    def run() -> None:
        from transmamba.checkpoints_tools.listing import chosen
        from transmamba.checkpoints_tools.rewriting import reshard as rewrite

        print(rewrite(chosen(run_dir, step), out, tp=tp, dp=dp, show=True))

    answer(run)


@checkpoint.command()
def average(
    run_dir: RunDir,
    out: Out,
    last: Annotated[int, typer.Option(min=2, help="How many of the newest checkpoints")] = 2,
) -> None:
    """Write a run folder whose weights are the mean of a run's newest checkpoints."""

    def run() -> None:
        from transmamba.checkpoints_tools.rewriting import average as rewrite
        from transmamba.checkpoints_tools.rewriting import last as newest

        print(rewrite(newest(run_dir, last), out, show=True))

    answer(run)


def _tell(run_dir: Path, *, deep: bool) -> None:
    from transmamba.checkpoints_tools.listing import entries

    faults = 0
    for entry in entries(run_dir, deep=deep, show=sys.stderr.isatty()):
        faults += entry.fault is not None
        state = entry.fault or ("verified" if deep else "complete")
        print(f"{entry.path.name}  {entry.tokens:>15,} tokens  {entry.n_bytes:>15,} bytes  {state}")
    if faults:
        raise RunError(
            EXIT_NO_VALID_CHECKPOINT,
            f"RUN_DIR: {faults} damaged checkpoints in {run_dir}. Fix: restore them from a copy; resume skips them",
        )


def _tell_differences(first: Path, second: Path, step: int | None, everything: bool) -> None:
    from transmamba.checkpoints_tools.difference import key_differences, tensor_differences
    from transmamba.checkpoints_tools.listing import chosen, unusable
    from transmamba.sealed import CheckpointError

    one, other = chosen(first, step), chosen(second, step)
    n_equal = n_unequal = 0
    try:
        for found in tensor_differences(one, other):
            n_equal, n_unequal = n_equal + (found.says == "equal"), n_unequal + (found.says != "equal")
            if found.says == "differs":
                share = f"{found.n_differing:,} of {found.n_values:,} values"
                print(f"{found.kind:<10} {found.name}: {share}, at most {found.largest:.3e}, L2 {found.relative:.3e}")
            elif everything or found.says != "equal":
                print(f"{found.kind:<10} {found.name}: {found.says}")
    except CheckpointError as error:
        raise unusable(error) from error
    for key, this, that in key_differences(one, other):
        print(f"{key}: {json.dumps(this)} -> {json.dumps(that)}")
    print(f"{n_equal} tensors equal bit for bit, {n_unequal} not")
