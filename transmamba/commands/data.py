"""`transmamba data ...`: from text to verified tokens."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer

from transmamba.answer import answer
from transmamba.commands.tokenizer import tokenizer as tokenizer_commands
from transmamba.errors import EXIT_DATA, EXIT_RANK_DIED, EXIT_STOPPED, EXIT_STORAGE, RunError

data = typer.Typer(help="Make training data from text.", no_args_is_help=True)
data.add_typer(tokenizer_commands, name="tokenizer")


@data.command()
def prepare(
    sources: Annotated[list[str], typer.Argument(help="Files, folders, globs or URLs: txt, md, jsonl, parquet")],
    out: Annotated[Path, typer.Option(help="Folder to make")],
    field: Annotated[str, typer.Option(help="Member of a JSON line or column of parquet with the text")] = "text",
    vocab_size: Annotated[int, typer.Option(help="Entries of the BPE to train")] = 4096,
    tokenizer: Annotated[Path | None, typer.Option(help="A tokenizer.json to use instead")] = None,
    eod_token: Annotated[str, typer.Option(help="Token that ends a document")] = "<|endoftext|>",
    validation_share: Annotated[float, typer.Option(help="Part of the text to hold out, at most 0.5")] = 0.02,
    dedup: Annotated[bool, typer.Option("--dedup", help="Leave out copies of earlier documents")] = False,
    shard_tokens: Annotated[int, typer.Option(help="Most tokens in a shard")] = 64_000_000,
    block_tokens: Annotated[int, typer.Option(help="Tokens that are verified together")] = 131_072,
    seed: Annotated[int, typer.Option(help="Of the split")] = 17,
    workers: Annotated[int | None, typer.Option(help="Processes; one per core if not given")] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Make it anew, in place of data made or begun otherwise")
    ] = False,
) -> None:
    """Turn text into verified token shards, a tokenizer and a manifest. Interrupted, the same command goes on."""
    options = {"vocab_size": vocab_size, "tokenizer": tokenizer, "validation_share": validation_share, "field": field}
    options |= {"shard_tokens": shard_tokens, "block_tokens": block_tokens, "eod_token": eod_token}
    options |= {"dedup": dedup, "seed": seed} | ({} if workers is None else {"workers": workers})

    def run() -> None:
        from transmamba.data_pipeline.manifest import load_manifest
        from transmamba.data_pipeline.passes import Options
        from transmamba.data_pipeline.prepare import build, summary_lines

        started_at = time.monotonic()
        with _resumable(out):
            is_new = build(Options(out, sources, **options), replace=replace)
        if not is_new:
            print(f"{out} is already there, made from the same input with the same options")
        print("\n".join(summary_lines(load_manifest(out), time.monotonic() - started_at if is_new else None)))

    answer(run)


@contextmanager
def _resumable(out: Path) -> Iterator[None]:
    """What may happen to long work that the same command goes on with."""
    from transmamba.data_pipeline.workers import WorkerDied

    again = "the same command goes on where it was"
    try:
        yield
    except WorkerDied as error:
        fix = f"look for an out-of-memory kill, and use fewer --workers; {again}"
        raise RunError(EXIT_RANK_DIED, f"--workers: {error}. Fix: {fix}") from error
    except OSError as error:
        problem = f"cannot be written ({error.strerror or error})"
        raise RunError(EXIT_STORAGE, f"--out: {problem} (got {out}). Fix: see to the disk; {again}") from error
    except KeyboardInterrupt as error:
        print(f"stopped; {again}", file=sys.stderr)
        raise typer.Exit(EXIT_STOPPED) from error


Prepared = Annotated[Path, typer.Argument(help="A folder made by `data prepare`")]


@data.command()
def inspect(
    folder: Prepared,
    samples: Annotated[int, typer.Option(min=0, help="Documents of each split to decode")] = 3,
    png: Annotated[Path | None, typer.Option(help="Draw the document lengths into this file")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Counts, document lengths, frequent tokens, entropy and samples of prepared data."""

    def run() -> None:
        import json

        from transmamba.data_pipeline.census import draw_lengths, lines_of, take_census
        from transmamba.data_pipeline.manifest import load_manifest

        census = take_census(load_manifest(folder), samples=samples)
        if png is not None:
            draw_lengths(census, png)
        print(json.dumps(census.record(), indent=1) if as_json else "\n".join(lines_of(census)))

    answer(run)


@data.command()
def verify(
    folder: Annotated[str, typer.Argument(help="A folder made by `data prepare`, or its URL")],
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; one per core if not given")] = None,
) -> None:
    """Read every byte of prepared data and compare it with all that is recorded of it; exit 22 names the damage."""

    def run() -> None:
        from transmamba.data_pipeline.folder import is_remote
        from transmamba.data_pipeline.remote_verify import verify_remote
        from transmamba.data_pipeline.verify import verify_folder

        if is_remote(folder):
            with TemporaryDirectory() as scratch:
                found = verify_remote(folder, Path(scratch))
        else:
            found = verify_folder(Path(folder), workers=workers)
        _end_with([f"{fault.what}: {fault.problem}. Fix: {fault.fix}." for fault in found.faults])
        print(f"{found.n_bytes:,} bytes in {found.n_shards:,} shards are as written")

    answer(run)


@data.command("import-megatron")
def import_megatron(
    prefix: Annotated[Path, typer.Argument(help="PREFIX of PREFIX.bin and PREFIX.idx")],
    tokenizer: Annotated[Path, typer.Option(help="The tokenizer.json that made the tokens")],
    out: Annotated[Path, typer.Option(help="Folder to make")],
    validation: Annotated[Path | None, typer.Option(help="PREFIX of the validation split")] = None,
    validation_share: Annotated[float, typer.Option(help="Part of the documents to hold out otherwise")] = 0.02,
    eod_token: Annotated[str, typer.Option(help="Token that ends a document")] = "<|endoftext|>",
    shard_tokens: Annotated[int, typer.Option(min=1, help="Most tokens in a shard")] = 64_000_000,
    seed: Annotated[int, typer.Option(help="Of the split")] = 17,
    replace: Annotated[bool, typer.Option("--replace", help="Take the place of data that are there")] = False,
) -> None:
    """Turn token data of Megatron-LM into a folder like those of `data prepare`."""

    def run() -> None:
        from transmamba.data_pipeline.megatron import import_megatron as make

        options = {"validation_share": validation_share, "shard_tokens": shard_tokens, "seed": seed, "replace": replace}
        manifest, found = make(prefix, tokenizer, out, validation=validation, eod_token=eod_token, **options)
        print(f"read         {found.n_read:,} documents, {found.n_empty:,} of them empty and left out")
        print(f"ends         {found.n_ended:,} documents got one, {found.n_cut:,} had more and were cut there")
        for name, split in manifest.splits.items():
            print(f"{name:<12} {split.n_documents:,} documents, {split.n_tokens:,} tokens")
        print(f"next         python -m transmamba.train data.path={out}")

    answer(run)


@data.command("export-megatron")
def export_megatron(
    folder: Prepared,
    out: Annotated[Path, typer.Option(help="PREFIX of PREFIX.bin and PREFIX.idx")],
    split: Annotated[str, typer.Option(help="train or validation")] = "train",
) -> None:
    """Write a split as token data of Megatron-LM."""

    def run() -> None:
        from transmamba.data_pipeline.manifest import load_manifest
        from transmamba.data_pipeline.megatron import export_megatron as write

        print(f"{write(load_manifest(folder), out, split):,} documents in {out}.bin and {out}.idx")

    answer(run)


@data.command()
def audit(run_dir: Annotated[Path, typer.Argument(help="A run with data.ledger=true")]) -> None:
    """Compare the windows that a run noted with the order that its configuration defines; exit 22 names the faults."""

    def run() -> None:
        from transmamba.compose import load
        from transmamba.corpus import open_corpus
        from transmamba.errors import ConfigError, Problem
        from transmamba.ledger import FOLDER
        from transmamba.ledger import audit as compare

        if not any((run_dir / FOLDER).glob("rank*.jsonl")):
            fix = "give a run folder, trained with data.ledger=true"
            raise ConfigError([Problem("RUN_DIR", "no ledger in it", run_dir, fix)])
        config = load(["--config", str(run_dir / "config.yaml")])
        n_steps, faults = compare(run_dir, open_corpus(config).mixture(config), config.train.global_batch)
        fix = "train these steps again from a checkpoint before them"
        _end_with([f"{run_dir / FOLDER}: {fault}. Fix: {fix}." for fault in faults])
        print(f"{n_steps:,} steps read exactly what their configuration says")

    answer(run)


def _end_with(faults: list[str]) -> None:
    """End with the exit code of damaged data if there are faults, a line for each."""
    for fault in faults:
        print(f"transmamba: error: {fault}", file=sys.stderr)
    if faults:
        raise typer.Exit(EXIT_DATA)
