"""`transmamba data tokenizer ...`: tokenizer files from text or from those of others."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from transmamba.answer import answer

tokenizer = typer.Typer(help="Train a tokenizer, or make a tokenizer.json of another kind.", no_args_is_help=True)

Out = Annotated[Path, typer.Option(help="tokenizer.json to make")]


class Pattern(Enum):
    """How a tiktoken table's text is cut into words."""

    gpt2 = "gpt2"
    cl100k = "cl100k"
    o200k = "o200k"


@tokenizer.command()
def train(
    sources: Annotated[list[str], typer.Argument(help="Text, as for `data prepare`")],
    out: Out,
    vocab_size: Annotated[int, typer.Option(help="Entries of the byte-level BPE")] = 4096,
    field: Annotated[str, typer.Option(help="Member of a JSON line or column of parquet with the text")] = "text",
    sample_chars: Annotated[
        int, typer.Option(help="Characters to train on; documents are chosen by hash")
    ] = 200_000_000,
) -> None:
    """Train a byte-level BPE on text."""

    def run() -> None:
        from transmamba.data_pipeline.tokenizer import vocab_size_of
        from transmamba.data_pipeline.vocabulary import train_on

        made, rate = train_on(sources, out, vocab_size=vocab_size, field=field, sample_chars=sample_chars)
        print(f"tokenizer    {vocab_size_of(made):,} entries, {rate:.2f} bytes per token of its text")
        print(f"next         transmamba data prepare SRC... --tokenizer {out} --out DIR")

    answer(run)


@tokenizer.command("import")
def import_(
    source: Annotated[Path, typer.Argument(help="A tokenizer.json, a tiktoken table or a Hugging Face folder")],
    out: Out,
    pattern: Annotated[Pattern | None, typer.Option(help="Of a tiktoken table that is not a public one")] = None,
    eod_token: Annotated[str, typer.Option(help="Token that ends a document; a table gets it")] = "<|endoftext|>",
) -> None:
    """Make a tokenizer.json of a tokenizer of another kind; no code of it is run."""

    def run() -> None:
        from transmamba.data_pipeline.tokenizer import end_of_text_id, vocab_size_of
        from transmamba.data_pipeline.vocabulary import import_tokenizer

        made = import_tokenizer(source, out, pattern=pattern.value if pattern else None, eod_token=eod_token)
        end = end_of_text_id(made, eod_token)
        print(f"tokenizer    {vocab_size_of(made):,} entries, documents end with {eod_token} (id {end})")
        option = "" if eod_token == "<|endoftext|>" else f" --eod-token '{eod_token}'"
        print(f"next         transmamba data prepare SRC... --tokenizer {out}{option} --out DIR")

    answer(run)
