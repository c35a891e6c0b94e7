"""The `transmamba` command. Every sub-command imports what it needs when it is called: help answers at once."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from transmamba.answer import answer
from transmamba.commands.checkpoint import checkpoint
from transmamba.commands.convert import add_conversions
from transmamba.commands.data import data
from transmamba.commands.launch import launch
from transmamba.commands.plan import plan
from transmamba.commands.runs import runs
from transmamba.commands.sweep import sweep
from transmamba.train import wait_politely

app = typer.Typer(
    # The backslash keeps rich from reading the bracket as its own markup.
    help=r"Pretrain TransMamba language models. Training itself: python -m transmamba.train \[key=value] (--help)",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Measure, after checking that the numbers are right.", no_args_is_help=True)
app.add_typer(data, name="data")
add_conversions(checkpoint)
app.command()(plan)
app.add_typer(checkpoint, name="checkpoint")
app.add_typer(launch, name="launch")
app.add_typer(sweep, name="sweep")
app.add_typer(runs, name="runs")
app.add_typer(bench, name="bench")


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from importlib.metadata import version

        print(f"transmamba {version('transmamba')}")
        raise typer.Exit


@app.callback()
def options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and stop")
    ] = False,
) -> None:
    """What holds for every command."""


@app.command(
    hidden=True,
    add_help_option=False,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
def train(context: typer.Context) -> None:
    """Say where training is."""
    from transmamba.errors import ConfigError, Problem

    words = shlex.join(["python", "-m", "transmamba.train", *context.args])

    def run() -> None:
        raise ConfigError([Problem("train", "not a command of `transmamba`", "train", f"type {words}")])

    answer(run)


RunDir = Annotated[Path, typer.Argument(help="A run folder")]


@app.command()
def doctor(
    kernels: Annotated[bool, typer.Option("--kernels", help="Check every GPU kernel against float64")] = False,
    as_json: Annotated[bool, typer.Option("--json")] = False,
    run_dir: Annotated[Path, typer.Option(help="Where runs will be written")] = Path("runs"),
    network: Annotated[
        bool, typer.Option("--network", help="Under torchrun or srun: look at the network between the ranks")
    ] = False,
) -> None:
    """Say what this machine can do and what is missing; exit 1 with warnings, 2 when a run would not work."""
    from transmamba.doctor.report import run_doctor

    raise typer.Exit(run_doctor(kernels, as_json, run_dir, network))


@app.command()
def generate(
    run_dir: RunDir,
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="Text to complete; may be repeated")],
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens to add")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token")] = 0.8,
    top_k: Annotated[int, typer.Option(min=0, help="Draw among the k likeliest; 0 among all")] = 50,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Complete prompts with the newest checkpoint of a run, or with a model folder of transformers."""
    from transmamba.generate import generate as pieces_of

    def run() -> None:
        for piece in pieces_of(run_dir, prompt, n_tokens=tokens, temperature=temperature, top_k=top_k, seed=seed):
            print(piece, end="", flush=True)

    answer(run)


@app.command()
def evaluate(
    run_dir: Annotated[Path, typer.Argument(help="A run folder, or a model folder of transformers")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value of data and validation, such as data.path=DIR, after --")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for evaluate.json and the picture; the run's own if none")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=0, help="Of every validation set; 0 takes all")] = 0,
    seq_len: Annotated[int | None, typer.Option(min=2, help="Tokens per window; as in training if none")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm_eval, with commas: heldout_bits, heldout_choice, or any that it knows"),
    ] = None,
    include: Annotated[Path | None, typer.Option(help="Folder with task files of your own, of any depth")] = None,
    limit: Annotated[int, typer.Option(min=4, help="Documents per task; a large number takes all")] = 100,
) -> None:
    """Bits per byte of every validation set, loss by position around the TransPoints, and tasks of lm_eval."""
    from transmamba.scoring import evaluate as score
    from transmamba.scoring import score_lines

    def run() -> None:
        folder, changes = run_dir if out is None else out, overrides or []
        names = [name.strip() for name in tasks.split(",")] if tasks else []
        if names:
            from transmamba.tasks import check_tasks

            check_tasks(names, include)
        scores = score(run_dir, out=folder, max_tokens=max_tokens, seq_len=seq_len, overrides=changes)
        print("\n".join(score_lines(scores)))
        print(f"written to {folder / 'evaluate.json'}, {folder / 'evaluate.png'}")
        if names:
            from transmamba.tasks import result_lines, run_tasks

            results = run_tasks(run_dir, tasks=names, include=include, out=folder, limit=limit, overrides=changes)
            print("\n".join([*result_lines(results), f"written to {folder / 'tasks.json'}"]))

    answer(run)


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
    from transmamba.bench.kernels import bench_kernels

    paths = {"mamba_ssm": mamba_ssm, "fla": fla}
    peers = {name: None if path is None else str(path) for name, path in paths.items()}
    raise typer.Exit(bench_kernels(budget_s, out=out, **peers))


@bench.command("step")
def bench_step(budget_s: Budget = 300, out: Results = Path("benchmarks/results")) -> None:
    """A training step of the framework against a bare loop of the same model."""
    from transmamba.bench.step import bench_step as measure

    raise typer.Exit(measure(budget_s, out))


Lengths = Annotated[list[int] | None, typer.Option("--length", help="Tokens per window; may be repeated")]


@bench.command("layer")
def bench_layer(
    budget_s: Budget = 480,
    preset: Annotated[str | None, typer.Option(help="Model preset; 1_5b on a GPU, else tiny")] = None,
    lengths: Lengths = None,
    out: Results = Path("benchmarks/results"),
) -> None:
    """Layers of every kind, and TransMamba's at many TransPoints, beside what the kernels predict."""
    from transmamba.bench.layer import bench_layer as measure
    from transmamba.machine import has_gpu

    large = has_gpu()
    lengths = lengths or ([2048, 8192, 32_768] if large else [512, 2048])
    raise typer.Exit(measure(budget_s, out, preset or ("1_5b" if large else "tiny"), lengths, max(lengths)))


@bench.command("model")
def bench_model(
    budget_s: Budget = 480,
    preset: Annotated[str | None, typer.Option(help="Model preset; 1_5b on a GPU, else tiny")] = None,
    lengths: Lengths = None,
    vocabulary: Annotated[int | None, typer.Option(min=1, help="Rows of the embedding")] = None,
    out: Results = Path("benchmarks/results"),
) -> None:
    """Training steps of equal-size models of every kind, and decoding at several contexts."""
    from transmamba.bench.model import bench_model as measure
    from transmamba.machine import has_gpu

    large = has_gpu()
    lengths = lengths or ([8192, 32_768] if large else [256, 1024])
    rows = vocabulary or (50_304 if large else 2048)
    raise typer.Exit(measure(budget_s, out, preset or ("1_5b" if large else "tiny"), lengths, rows))


@bench.command()
def read(budget_s: Budget = 60, out: Results = Path("benchmarks/results")) -> None:
    """Packed batches of tokens beside a bare memory map, Megatron's dataset and webdataset."""
    from transmamba.bench.read import bench_read as measure

    raise typer.Exit(measure(budget_s, out))


@bench.command("prepare")
def bench_prepare(
    sources: Annotated[list[str] | None, typer.Argument(help="Text to use; the docstrings of packages if none")] = None,
    budget_s: Budget = 240,
    out: Results = Path("benchmarks/results"),
) -> None:
    """From text to shards of tokens beside datatrove, if that is installed."""
    from transmamba.bench.prepare import bench_prepare as measure

    raise typer.Exit(measure(budget_s, out, sources))


@bench.command("checkpoint")
def bench_checkpoint(budget_s: Budget = 240, out: Results = Path("benchmarks/results")) -> None:
    """Saving beside torch.save, distributed checkpointing and safetensors at equal durability."""
    from transmamba.bench.checkpoint import bench_checkpoint as measure

    raise typer.Exit(measure(budget_s, out))


def main() -> None:
    """Entry point of the `transmamba` script."""
    wait_politely()
    app()
