"""`transmamba data ...`: from text to verified tokens."""

from pathlib import Path
from typing import Annotated

import typer

from transmamba.answer import answer

data = typer.Typer(help="Make training data from text.", no_args_is_help=True)


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

    answer(run)


@data.command()
def verify(folder: Annotated[Path, typer.Argument(help="A folder made by `data prepare`")]) -> None:
    """Read every byte of prepared data and compare it with its digests; exit 22 names the damaged shards."""
    from transmamba.data_pipeline.manifest import load_manifest
    from transmamba.data_pipeline.verify import verify_shards

    answer(lambda: print(f"{verify_shards(load_manifest(folder), progress=True):,} bytes are as written"))
