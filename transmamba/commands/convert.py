"""`transmamba checkpoint to-hf` and `from-hf`: between our checkpoints and model folders of transformers."""

import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from transmamba.answer import answer

if TYPE_CHECKING:
    from transmamba.checkpoints_tools.hf_compare import Comparison


class WeightType(StrEnum):
    """How weights are stored."""

    FP32 = "fp32"
    BF16 = "bf16"


CheckTokens = Annotated[
    int, typer.Option(min=0, help="Tokens whose logits are compared, in each form; 0 compares none")
]


def add_conversions(app: typer.Typer) -> None:
    """Give a command line the two commands."""
    app.command("to-hf")(to_hf)
    app.command("from-hf")(from_hf)


def to_hf(
    run_dir: Annotated[Path, typer.Argument(help="A run folder")],
    out: Annotated[Path, typer.Option(help="Folder to make")],
    step: Annotated[
        int | None, typer.Option(min=0, help="Of the checkpoint; the newest valid one if not given")
    ] = None,
    dtype: Annotated[WeightType, typer.Option(help="Of the weights")] = WeightType.FP32,
    shard_size: Annotated[str, typer.Option(help="Most bytes in a file, for example 500MB or 5GB")] = "5GB",
    check_tokens: CheckTokens = 10_000,
) -> None:
    """Export a checkpoint for transformers, and compare the logits of both; nothing is published if they differ."""

    def run() -> None:
        _need_transformers()
        n_bytes = _bytes_of(shard_size)
        from transmamba.checkpoints_tools.hf_export import export

        done = export(
            run_dir,
            out,
            step=step,
            dtype=dtype.value,
            shard_bytes=n_bytes,
            check_tokens=check_tokens,
            progress=True,
        )
        _tell(done.comparisons)
        print(f"{done.folder}: {done.architecture} of step {done.step}, {done.n_bytes:,} bytes")

    answer(run)


def from_hf(
    src: Annotated[Path, typer.Argument(help="A local model folder: Llama's relatives, Mamba-2, or one of to-hf")],
    out: Annotated[Path, typer.Option(help="Run folder to make")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value of the run, as for training")] = None,
    check_tokens: CheckTokens = 1000,
) -> None:
    """Make a run whose checkpoint of step 0 holds the weights of a model folder, and compare the logits of both."""

    def run() -> None:
        _need_transformers()
        from transmamba.checkpoints_tools.hf_import import import_folder
        from transmamba.next_commands import train_again

        done = import_folder(src, out, overrides or [], check_tokens=check_tokens, progress=True)
        _tell(done.comparisons)
        if not done.is_exact:
            print("these layers compute something else than the source; the differences above are what that changes")
        print(f"{done.folder}: {done.kind} from {done.source}. To train it: {train_again(done.folder)}")

    answer(run)


def _tell(comparisons: "list[Comparison]") -> None:
    for comparison in comparisons:
        print(comparison.line())


def _need_transformers() -> None:
    from importlib.util import find_spec

    from transmamba.errors import ConfigError, Problem

    if find_spec("transformers") is None:
        fix = "install it: pip install -e '.[peers]'"
        raise ConfigError([Problem("transformers", "not installed", None, fix)])


def _bytes_of(text: str) -> int:
    from transmamba.errors import ConfigError, Problem

    found = re.fullmatch(r"([1-9]\d{0,5})(KB|MB|GB)", text, re.IGNORECASE)
    if found is None:
        raise ConfigError([Problem("--shard-size", "not a size", text, "write it like 500MB or 5GB")])
    return int(found[1]) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[found[2].upper()]
