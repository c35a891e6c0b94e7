"""Tokenizer files: trained on text, or made from those of others; `transmamba data tokenizer`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.holdout import Sample, text_fraction
from transmamba.data_pipeline.listing import find_files
from transmamba.data_pipeline.parts import Piece, Reading
from transmamba.data_pipeline.progress import show_step
from transmamba.data_pipeline.records import save_bytes
from transmamba.data_pipeline.spelling import check_reversible
from transmamba.data_pipeline.tiktoken_table import looks_like_table, read_table
from transmamba.data_pipeline.tokenizer import (
    END_OF_TEXT,
    check_vocab_size,
    encode_documents,
    end_of_text_id,
    load_tokenizer,
    train_tokenizer,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Enough for a hundred thousand merges.
TRAINING_CHARS = 200_000_000
_SEED = 17
_ADVANCE_EVERY = 64
_JUDGED_CHARS = 1_000_000


def train_on(
    sources: list[str],
    out: Path,
    *,
    vocab_size: int,
    field: str = "text",
    sample_chars: int = TRAINING_CHARS,
    progress: bool = True,
) -> tuple[Tokenizer, float]:
    """Train a byte-level BPE on the documents with the smallest hashes, and save it.

    Args:
        sources: as for `prepare`.
        out: tokenizer.json to make.
        vocab_size: entries, >= 257.
        field: member of a JSON line, or column of parquet, that holds the text.
        sample_chars: characters to train on, if there are as many; the memory taken is some ten times as much.
        progress: show progress on stderr.

    Returns:
        the tokenizer, and how many bytes of the text it was trained on a token of it holds.

    Raises:
        DataError: unreadable input, no documents, `vocab_size` too small, or `out` exists.
    """
    check_vocab_size(vocab_size)
    _check_free(out)
    if sample_chars < 1:
        raise DataError("sample_chars", f"{sample_chars} is not positive", "use 1 or more")
    files = find_files(sources).files
    part = tuple(Piece(file, 0, file.n_bytes) for file in files)
    reading, sample = Reading(part, field), Sample(sample_chars)
    n_bytes = 0
    with show_step("reading text", sum(file.n_bytes for file in files), visible=progress) as advance:
        for i, document in enumerate(reading.documents()):
            sample.add(text_fraction(document.text.encode("utf-8"), _SEED), document.text)
            if i % _ADVANCE_EVERY == 0:
                advance(reading.n_bytes - n_bytes)
                n_bytes = reading.n_bytes
    texts = sample.texts()
    if not texts:
        raise DataError("sources", "no documents found", "give files with text in them")
    with show_step("training the tokenizer", None, visible=progress):
        tokenizer = train_tokenizer(texts, vocab_size=vocab_size)
    _save(tokenizer, out)
    judged = [text[:_JUDGED_CHARS] for text in texts[:100]]
    n_tokens = sum(len(ids) - 1 for ids in encode_documents(tokenizer, judged, eod_id=0))
    return tokenizer, sum(len(text.encode("utf-8")) for text in judged) / n_tokens


def import_tokenizer(source: Path, out: Path, *, pattern: str | None = None, eod_token: str = END_OF_TEXT) -> Tokenizer:
    """Make a tokenizer.json of a tokenizer.json, a tiktoken table or a Hugging Face folder; no code of it is run.

    Args:
        source: the file or folder.
        out: tokenizer.json to make.
        pattern: of a tiktoken table, see `read_table`.
        eod_token: special token that ends documents. A table gets it; the others must have it.

    Raises:
        DataError: it is missing, broken, loses text, needs code of its own or lacks the token, or `out` exists.
    """
    _check_free(out)
    if source.is_file() and source.suffix != ".json" and looks_like_table(source):
        tokenizer = read_table(source, pattern=pattern, eod_token=eod_token)
    elif pattern:
        raise DataError("--pattern", f"{source} is no tiktoken table", "leave --pattern out")
    elif source.is_file() and source.suffix in (".model", ".tiktoken"):
        raise DataError(str(source), "neither a tiktoken table nor JSON", "convert it to a tokenizer.json")
    else:
        tokenizer = load_tokenizer(source)
    check_reversible(tokenizer)
    end_of_text_id(tokenizer, eod_token)
    _save(tokenizer, out)
    return tokenizer


def _check_free(out: Path) -> None:
    if out.exists():
        raise DataError(str(out), "exists already", "choose another --out or remove it")
    if out.suffix != ".json":
        raise DataError(str(out), "not the name of a JSON file", "end it in .json")


def _save(tokenizer: Tokenizer, out: Path) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_bytes(out, tokenizer.to_str(pretty=True).encode("utf-8"))
    except OSError as error:
        problem = f"cannot be made ({error.strerror})"
        raise DataError(str(out), problem, "choose a folder that you can write") from error
