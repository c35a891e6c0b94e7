"""The `transmamba` command. Every sub-command imports what it needs when it is called: help answers at once."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from transmamba.errors import EXIT_CONFIG, EXIT_DATA, EXIT_NO_VALID_CHECKPOINT, ConfigError, RunError
from transmamba.train import wait_politely

app = typer.Typer(
    help="Pretrain TransMamba language models. Training itself: python -m transmamba.train [key=value]",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data = typer.Typer(help="Make training data from text.", no_args_is_help=True)
runs = typer.Typer(help="Look at runs.", no_args_is_help=True)
bench = typer.Typer(help="Measure, after checking that the numbers are right.", no_args_is_help=True)
checkpoint = typer.Typer(help="Look at a run's checkpoints.", no_args_is_help=True)
app.add_typer(data, name="data")
app.add_typer(checkpoint, name="checkpoint")
app.add_typer(runs, name="runs")
app.add_typer(bench, name="bench")

RunDir = Annotated[Path, typer.Argument(help="A run folder")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value and group=choice, as for training")]


@app.command()
def plan(overrides: Overrides = None, as_json: Annotated[bool, typer.Option("--json")] = False) -> None:
    """Print parameters, FLOPs and the TransPoints of a configuration; trains nothing."""
    from transmamba.plan import run_plan

    raise typer.Exit(run_plan(overrides or [], as_json))


@app.command()
def doctor(
    kernels: Annotated[bool, typer.Option("--kernels", help="Check every GPU kernel against float64")] = False,
    as_json: Annotated[bool, typer.Option("--json")] = False,
    run_dir: Annotated[Path, typer.Option(help="Where runs will be written")] = Path("runs"),
) -> None:
    """Say what this machine can do and what is missing; exit 1 with warnings, 2 when a run would not work."""
    from transmamba.doctor import run_doctor

    raise typer.Exit(run_doctor(kernels, as_json, run_dir))


@app.command()
def generate(
    run_dir: RunDir,
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="Text to complete; may be repeated")],
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens to add")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Draw among the k likeliest; 0 among all")] = 50,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Complete prompts with the newest checkpoint of a run."""
    from transmamba.generate import generate as pieces_of

    def run() -> None:
        for piece in pieces_of(run_dir, prompt, n_tokens=tokens, temperature=temperature, top_k=top_k, seed=seed):
            print(piece, end="", flush=True)

    _answer(run)


@runs.command()
def compare(
    run_dirs: Annotated[list[Path], typer.Argument(help="Run folders; the others are compared with the first")],
    out: Annotated[Path, typer.Option(help="The picture")] = Path("compare.png"),
) -> None:
    """Draw the losses of several runs over each other, and say how far apart they are."""
    from transmamba.plot import compare_losses

    _answer(lambda: print("\n".join([*compare_losses(run_dirs, out), f"drawn to {out}"])))


@data.command()
def prepare(
    sources: Annotated[list[str], typer.Argument(help="Files, folders or globs of txt, md and jsonl")],
    out: Annotated[Path, typer.Option(help="Folder to make")],
    field: Annotated[str, typer.Option(help="Member of a JSON line that holds the text")] = "text",
    vocab_size: Annotated[int, typer.Option(help="Entries of the BPE to train")] = 4096,
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.json to use instead")] = None,
    eod_token: Annotated[str, typer.Option(help="Token that ends a document")] = "<|endoftext|>",
    validation_share: Annotated[float, typer.Option(help="Part of the text to hold out")] = 0.02,
    shard_tokens: Annotated[int, typer.Option(help="Most tokens in a shard")] = 1 << 26,
    seed: Annotated[int, typer.Option(help="Of the split")] = 17,
    workers: Annotated[int | None, typer.Option(help="Processes; one per core if not given")] = None,
) -> None:
    """Turn text into verified token shards, a tokenizer and a manifest."""
    from transmamba.data_pipeline.prepare import prepare as make
    from transmamba.data_pipeline.prepare import summary_lines

    def run() -> None:
        manifest = make(
            sources,
            out,
            field=field,
            vocab_size=vocab_size,
            tokenizer=tokenizer,
            eod_token=eod_token,
            validation_share=validation_share,
            shard_tokens=shard_tokens,
            seed=seed,
            workers=workers,
        )
        print("\n".join(summary_lines(manifest)))

    _answer(run)


@data.command()
def verify(folder: Annotated[Path, typer.Argument(help="A folder made by `data prepare`")]) -> None:
    """Read every byte of prepared data and compare it with its digests; exit 22 names the damaged shards."""
    from transmamba.data_pipeline.manifest import load_manifest
    from transmamba.data_pipeline.verify import verify_shards

    _answer(lambda: print(f"{verify_shards(load_manifest(folder), progress=True):,} bytes are as written"))


@checkpoint.command("list")
def list_checkpoints(run_dir: RunDir) -> None:
    """Checkpoints of a run, newest first."""
    _answer(lambda: _tell(run_dir, deep=False))


@checkpoint.command("verify")
def verify_checkpoints(run_dir: RunDir) -> None:
    """Read and verify every byte of a run's checkpoints; exit 21 names the damaged files."""
    _answer(lambda: _tell(run_dir, deep=True))


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


Budget = Annotated[float, typer.Option(min=1, help="Seconds after which no new row is started")]
Results = Annotated[Path, typer.Option(help="Folder for the JSON")]


@bench.command()
def kernels(
    budget_s: Budget = 480,
    mamba_ssm: Annotated[
        Path | None, typer.Option(help="Folder of an unpacked mamba-ssm, if it is not installed")
    ] = None,
    fla: Annotated[
        Path | None, typer.Option(help="Folder `fla` of an unpacked flash-linear-attention, for a GPU")
    ] = None,
    out: Results = Path("benchmarks/results"),
) -> None:
    """Scan and mixer against published implementations: correctness first, then time and memory."""
    from transmamba.bench import bench_kernels

    paths = {"mamba_ssm": mamba_ssm, "fla": fla}
    peers = {name: None if path is None else str(path) for name, path in paths.items()}
    raise typer.Exit(bench_kernels(budget_s, out=out, **peers))


@bench.command("step")
def bench_step(budget_s: Budget = 300, out: Results = Path("benchmarks/results")) -> None:
    """A training step of the framework against a bare loop of the same model."""
    from transmamba.bench_step import bench_step as measure

    raise typer.Exit(measure(budget_s, out))


def _answer(run: Callable[[], None]) -> None:
    """Run a command; what a user can cause is one line and its exit code, not a traceback."""
    from transmamba.data_pipeline.errors import DamagedData, DataError

    try:
        run()
    except ConfigError as error:
        code, line = EXIT_CONFIG, str(error)
    except RunError as error:
        code, line = error.code, str(error)
    except DataError as error:
        code = EXIT_DATA if isinstance(error, DamagedData) else EXIT_CONFIG
        line = f"transmamba: error: {error.what}: {error.problem}. Fix: {error.fix}."
    else:
        return
    print(line, file=sys.stderr)
    raise typer.Exit(code)


def main() -> None:
    """Entry point of the `transmamba` script."""
    wait_politely()
    app()
