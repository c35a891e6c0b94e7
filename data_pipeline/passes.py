"""Both passes over the input, by workers, in a folder that may hold what an interrupted run has done."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from transmamba.data_pipeline.definition import (
    SAMPLE_CHARS,
    SAMPLE_CHARS_PER_ENTRY,
    changes_in_words,
    definition_of,
    identities,
    names_of,
)
from transmamba.data_pipeline.encoding import (
    SHARDS,
    TOKENIZER_NAME,
    Recipe,
    count_changed,
    encode_part,
    is_encoded,
    join_splits,
    source_changed,
    undo_join,
)
from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.manifest import Manifest
from transmamba.data_pipeline.parts import Part
from transmamba.data_pipeline.progress import show_step
from transmamba.data_pipeline.records import save_bytes
from transmamba.data_pipeline.shards import BLOCK_TOKENS
from transmamba.data_pipeline.sources import SourceFile
from transmamba.data_pipeline.survey import Question, Survey, is_surveyed, join_surveys, survey_part, training_sample
from transmamba.data_pipeline.tokenizer import (
    END_OF_TEXT,
    end_of_text_id,
    load_tokenizer,
    train_tokenizer,
    vocab_size_of,
)
from transmamba.data_pipeline.work import begin, differences, files_before, has_finished_work
from transmamba.data_pipeline.workers import Advance, Workers, start_workers

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DEFAULT_VOCAB_SIZE = 4096
DEFAULT_SHARD_TOKENS = 64_000_000
DEFAULT_VALIDATION_SHARE = 0.02
DEFAULT_SEED = 17


@dataclass(frozen=True, slots=True)
class Options:
    """What `prepare` was asked for; its docstring explains the fields."""

    out: Path
    sources: list[str] | None = None
    field: str = "text"
    vocab_size: int = DEFAULT_VOCAB_SIZE
    tokenizer: Path | None = None
    eod_token: str = END_OF_TEXT
    validation_share: float = DEFAULT_VALIDATION_SHARE
    dedup: bool = False
    shard_tokens: int = DEFAULT_SHARD_TOKENS
    block_tokens: int = BLOCK_TOKENS
    seed: int = DEFAULT_SEED
    workers: int = dataclasses.field(default_factory=lambda: len(os.sched_getaffinity(0)))
    progress: bool = True


@dataclass(frozen=True, slots=True)
class Input:
    """Files, the parts they are cut into, and what to call them; a small one is not worth a worker.

    `skipped` tells of files of other kinds beside them.
    """

    files: tuple[SourceFile, ...]
    parts: list[Part]
    description: str
    is_small: bool
    skipped: str = ""

    @property
    def n_bytes(self) -> int:
        """As stored."""
        return sum(file.n_bytes for file in self.files)


def make_shards(work: Path, found: Input, given: Tokenizer | None, options: Options) -> Manifest:
    """Put shards, tables and tokenizer into the folder `SHARDS` of a work folder.

    Args:
        work: held by this process; what an earlier run of the same plan left in it is used.
        found: the input.
        given: the tokenizer to use; None trains one.
        options: of the command.

    Returns:
        the description of what is there now, not yet saved.

    Raises:
        DataError, WorkerDied, OSError: as `prepare`.
    """
    _take_over(work, found, given, options)
    sample_chars = 0 if given else max(SAMPLE_CHARS, SAMPLE_CHARS_PER_ENTRY * options.vocab_size)
    question = Question(options.field, options.seed, options.validation_share, sample_chars, found.n_bytes)
    n_workers = 0 if found.is_small else min(options.workers, len(found.parts))
    with start_workers(n_workers, threads=max(options.workers // max(n_workers, 1), 1)) as workers:
        numbers = [i for i in range(len(found.parts)) if not is_surveyed(i, work)]
        calls = [(i, found.parts[i], question, work) for i in numbers]
        with _bar("reading text", found, numbers, options) as advance:
            workers.run(survey_part, calls, advance)
        survey = join_surveys(found.parts, question, work, drop_duplicates=options.dedup)
        if survey.holdout.cut and options.progress:
            print("few or uneven documents: the end of the longest is held out", file=sys.stderr)
        tokenizer = _tokenizer(work, found, question, survey, given, options)
        _encode(work, found, survey, tokenizer, options, workers)
    return _manifest(work, found, survey, tokenizer, options)


def refuse_other_sources(work: Path, found: Input, given: Tokenizer | None, options: Options) -> None:
    """Keep what an interrupted run has finished where the sources are no longer what they were to it.

    A file system that is not mounted looks just like that.

    Raises:
        DataError: there is such work; the line names the first files that are gone, new or changed.
    """
    plan = definition_of(identities(found.files), given, options)
    if "sources" in differences(work, plan) and has_finished_work(work):
        words = changes_in_words(files_before(work), names_of(found.files))
        problem = f"was begun with other files ({words})"
        raise DataError(str(options.out), problem, "put them back, or give --replace to begin anew")


def _take_over(work: Path, found: Input, given: Tokenizer | None, options: Options) -> None:
    """Clear the work folder unless it was made by the same program from the same input with the same options."""
    plan = definition_of(identities(found.files), given, options)
    changed = begin(work, plan, files=names_of(found.files), keep={file.place for file in found.files})
    (work / SHARDS).mkdir(exist_ok=True)
    undo_join(work, len(found.parts))
    if found.skipped and options.progress:
        print(f"left out, as files of other kinds: {found.skipped}", file=sys.stderr)
    n_done = sum(is_encoded(i, work) for i in range(len(found.parts)))
    if changed and options.progress:
        print(f"starting anew, because of other {', '.join(changed)} than before", file=sys.stderr)
    if n_done and options.progress:
        print(f"going on: {n_done} of {len(found.parts)} parts are encoded", file=sys.stderr)


def _tokenizer(
    work: Path, found: Input, question: Question, survey: Survey, given: Tokenizer | None, options: Options
) -> Tokenizer:
    """The tokenizer in the work folder, trained if it is not there yet."""
    path = work / TOKENIZER_NAME
    if given:
        save_bytes(path, given.to_str(pretty=True).encode("utf-8"))
    elif not path.exists():
        with show_step("training the tokenizer", None, visible=options.progress):
            sample = training_sample(found.parts, question, survey.holdout, work)
            trained = train_tokenizer(sample, vocab_size=options.vocab_size)
        save_bytes(path, trained.to_str(pretty=True).encode("utf-8"))
    return load_tokenizer(path)


def _encode(work: Path, found: Input, survey: Survey, tokenizer: Tokenizer, options: Options, workers: Workers) -> None:
    recipe = Recipe(
        field=options.field,
        seed=options.seed,
        holdout=survey.holdout,
        tokenizer_sha256=_digest(work / TOKENIZER_NAME),
        eod_id=end_of_text_id(tokenizer, options.eod_token),
        dtype=_dtype_of(tokenizer).str,
        shard_tokens=options.shard_tokens,
        block_tokens=options.block_tokens,
    )
    numbers = [i for i in range(len(found.parts)) if not is_encoded(i, work)]
    calls = [(i, found.parts[i], survey.duplicates[i], survey.n_of_part[i], recipe, work) for i in numbers]
    with _bar("encoding", found, numbers, options) as advance:
        workers.run(encode_part, calls, advance)


def _manifest(work: Path, found: Input, survey: Survey, tokenizer: Tokenizer, options: Options) -> Manifest:
    splits = join_splits(work, len(found.parts))
    if sum(split.n_text_bytes for split in splits.values()) != survey.n_text_bytes:
        raise source_changed()
    save_bytes(work / SHARDS / TOKENIZER_NAME, (work / TOKENIZER_NAME).read_bytes())
    notes = {"duplicate": survey.n_duplicates, "empty": survey.n_empty}
    left_out = [f", {n:,} {kind} documents left out" for kind, n in notes.items() if n]
    if n_changed := count_changed(work, len(found.parts)):
        left_out.append(f", {n_changed:,} documents changed by the tokenizer's normaliser")
    return Manifest(
        tokenizer_file=TOKENIZER_NAME,
        tokenizer_sha256=_digest(work / TOKENIZER_NAME),
        vocab_size=vocab_size_of(tokenizer),
        eod_id=end_of_text_id(tokenizer, options.eod_token),
        token_dtype=_dtype_of(tokenizer).str,
        block_tokens=options.block_tokens,
        source="".join([found.description, *left_out]),
        splits=splits,
    )


@contextmanager
def _bar(title: str, found: Input, numbers: Sequence[int], options: Options) -> Iterator[Advance]:
    """Progress over the stored bytes of the parts that are left, with the tokens per second where there are any."""
    total = sum(piece.n_bytes for i in numbers for piece in found.parts[i])
    started_at, n_tokens = time.monotonic(), 0
    with show_step(title, total, visible=options.progress and bool(numbers)) as show:

        def advance(n_bytes: int, new_tokens: int) -> None:
            nonlocal n_tokens
            n_tokens += new_tokens
            rate = n_tokens / (time.monotonic() - started_at)
            show(n_bytes, f"{rate / 1e6:.2f}M tokens/s" if n_tokens else "")

        yield advance


def _dtype_of(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if vocab_size_of(tokenizer) <= 1 << 16 else "<u4")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
