"""Text to tokens to shards: `transmamba data prepare`, and the default corpus that is built at first use.

The input is cut into parts. Every part is read twice, by whichever worker is free: once to see what is there, once to
encode it. What a part becomes depends on the input and the options alone, so the number of workers, and how often the
work was interrupted, do not show in the result.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from transmamba.data_pipeline.definition import (
    SAMPLE_CHARS,
    definition_of,
    identities,
    is_prepared,
    save_definition,
)
from transmamba.data_pipeline.docstrings import MAX_CHARS, MIN_CHARS, MIN_SHARE, read_installed_docstrings
from transmamba.data_pipeline.encoding import SHARDS
from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.holdout import LARGEST_SHARE
from transmamba.data_pipeline.listing import find_files
from transmamba.data_pipeline.manifest import FORMAT_VERSION, SPLITS, Manifest, load_manifest, save_manifest
from transmamba.data_pipeline.parts import LEAST_PART_BYTES, cut_parts, part_size
from transmamba.data_pipeline.passes import (
    DEFAULT_SEED,
    DEFAULT_SHARD_TOKENS,
    DEFAULT_VALIDATION_SHARE,
    DEFAULT_VOCAB_SIZE,
    Input,
    Options,
    make_shards,
    refuse_other_sources,
)
from transmamba.data_pipeline.progress import show_step
from transmamba.data_pipeline.publish import check_target, move_into_place, remove_folder, settle_replacement
from transmamba.data_pipeline.records import save_bytes
from transmamba.data_pipeline.remote import shown_url
from transmamba.data_pipeline.shards import BLOCK_TOKENS
from transmamba.data_pipeline.sources import JSON_LINES, SourceFile, UnreadableSource
from transmamba.data_pipeline.spelling import check_reversible
from transmamba.data_pipeline.tokenizer import (
    END_OF_TEXT,
    check_vocab_size,
    end_of_text_id,
    load_tokenizer,
)
from transmamba.data_pipeline.work import hold_work_folder, leave_work_folder, remove_work_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# A small vocabulary for the small model that this corpus is for: more of its few tokens are seen often.
CORPUS_VOCAB_SIZE = 2048
_BLOCK_LIMITS = (1024, 1 << 24)


def prepare(
    sources: list[str] | None,
    out: Path,
    *,
    field: str = "text",
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    tokenizer: Path | None = None,
    eod_token: str = END_OF_TEXT,
    validation_share: float = DEFAULT_VALIDATION_SHARE,
    dedup: bool = False,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    block_tokens: int = BLOCK_TOKENS,
    seed: int = DEFAULT_SEED,
    workers: int | None = None,
    progress: bool = True,
    replace: bool = False,
) -> Manifest:
    """Turn text into a folder of token shards with a tokenizer and a manifest.

    The same input gives the same bytes. The folder appears whole or not at all. Work that was interrupted is kept
    beside it, and the same call goes on from there; after finished work the same call does nothing.

    Args:
        sources: files, folders, globs and URLs of txt, md, jsonl and parquet; None reads the installed docstrings.
        out: folder to make.
        field: member of a JSON line, or column of parquet, that holds the text.
        vocab_size: entries of the byte-level BPE to train, >= 257.
        tokenizer: tokenizer.json to use instead of training one.
        eod_token: special token that ends a document.
        validation_share: part of the text to hold out, 0 to 0.5; whole documents, chosen by hash.
        dedup: leave out documents that are the same as an earlier one.
        shard_tokens: most tokens in a shard.
        block_tokens: tokens in a block, the unit that is verified; 1024 to 16,777,216.
        seed: of the validation split.
        workers: processes; None is one per core.
        progress: show progress on stderr.
        replace: make it anew, in place of data that are there or begun, whatever they were made from.

    Raises:
        DataError: nothing to read, unreadable input, an option out of range, or a target with other files, or with
            data made from something else, or begun with files that are no longer the same.
        WorkerDied: a worker was killed; the same call goes on.
        OSError: the disk is full or broken; the same call goes on.
    """
    options = Options(
        out,
        sources,
        field,
        vocab_size,
        tokenizer,
        eod_token,
        validation_share,
        dedup,
        shard_tokens,
        block_tokens,
        seed,
        workers=len(os.sched_getaffinity(0)) if workers is None else workers,
        progress=progress,
    )
    build(options, replace=replace)
    return load_manifest(out)


def default_corpus(cache_root: Path | None = None, progress: bool = True) -> Path:
    """Folder of the tokenized docstring corpus, built at first use.

    It is kept in `transmamba/` under `cache_root` (default: $XDG_CACHE_HOME or ~/.cache), under a name that
    changes with the interpreter, the installed packages and the rules. Several processes may build it.

    Raises:
        DataError: the cache folder cannot be written.
    """
    root = cache_root or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "transmamba" / f"docstrings-{_environment_digest()}"
    with _one_at_a_time(folder.with_suffix(".lock")):
        try:
            load_manifest(folder)
        except DataError:
            # Absent, or damaged; both are put right by building it.
            if folder.exists():
                remove_folder(folder)
            build(Options(folder, vocab_size=CORPUS_VOCAB_SIZE, progress=progress))
    return folder


@contextmanager
def _one_at_a_time(lock: Path) -> Iterator[None]:
    """Let the ranks of a job, which all come at once, wait for the first instead of doing its work again."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("ab")
    except OSError as error:
        raise DataError(str(lock), error.strerror or str(error), "make its folder writable") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def summary_lines(manifest: Manifest, elapsed_s: float | None = None) -> list[str]:
    """What was prepared, for the screen: one line per fact and the next command."""
    train, validation = (manifest.splits[name] for name in SPLITS)
    n_tokens = train.n_tokens + validation.n_tokens
    n_bytes = train.n_text_bytes + validation.n_text_bytes
    lines = [
        f"source       {manifest.source}",
        f"train        {train.n_documents:,} documents, {train.n_tokens:,} tokens in {len(train.shards)} shards",
        f"validation   {validation.n_documents:,} documents, {validation.n_tokens:,} tokens; "
        f"gzip -9 needs {validation.gzip9_bits_per_byte:.3f} bits per byte",
        f"tokenizer    {manifest.vocab_size:,} entries, {n_bytes / n_tokens:.2f} bytes per token",
    ]
    if elapsed_s is not None:
        lines.append(f"time         {elapsed_s:.1f} s, {n_tokens / elapsed_s:,.0f} tokens/s")
    return [*lines, f"next         python -m transmamba.train data.path={manifest.folder}"]


def _check_options(options: Options) -> None:
    if not 0 < options.validation_share <= LARGEST_SHARE:
        fix = f"use a number above 0, at most {LARGEST_SHARE}"
        raise DataError("validation_share", f"{options.validation_share} is no share to hold out", fix)
    check_vocab_size(options.vocab_size)
    for name in ("shard_tokens", "workers"):
        value = getattr(options, name)
        if value < 1:
            raise DataError(name, f"{value} is not positive", "use 1 or more")
    low, high = _BLOCK_LIMITS
    if not low <= options.block_tokens <= high:
        problem = f"{options.block_tokens} is outside {low:,} to {high:,}"
        raise DataError("block_tokens", problem, f"use {BLOCK_TOKENS:,}")


def build(options: Options, *, replace: bool = False) -> bool:
    """As `prepare`; whether there was anything to do.

    Raises:
        DataError, WorkerDied, OSError: as `prepare`.
    """
    _check_options(options)
    check_target(options.out)
    given = load_tokenizer(options.tokenizer) if options.tokenizer else None
    if given:
        # Refused now rather than after all text was encoded.
        check_reversible(given)
        end_of_text_id(given, options.eod_token)
    found = None if options.sources is None else _find_input(options, options.sources)
    sources = identities(found.files) if found else ["installed docstrings", _environment_digest()]
    definition = definition_of(sources, given, options)
    if not replace and is_prepared(options.out, definition):
        return False
    with hold_work_folder(options.out) as work:
        settle_replacement(options.out, work / "replaced")
        try:
            # Another process may have made it in the meantime, and a killed one may have put it aside.
            is_there = not replace and is_prepared(options.out, definition)
        except DataError:
            leave_work_folder(work)
            raise
        if is_there:
            remove_work_folder(work)
        else:
            if found and not replace:
                refuse_other_sources(work, found, given, options)
            _make(options, given, found, definition, work)
    return not is_there


def _make(
    options: Options, given: Tokenizer | None, found: Input | None, definition: dict[str, object], work: Path
) -> None:
    is_replaced = options.out.exists()
    try:
        made = make_shards(work, found or _write_docstrings(work, options), given, options)
    except UnreadableSource:
        # It may be there again in a minute, so what was done is kept.
        raise
    except DataError:
        remove_work_folder(work)
        raise
    save_definition(definition, work / SHARDS)
    save_manifest(made, work / SHARDS)
    check_target(options.out)
    move_into_place(work / SHARDS, options.out, work / "replaced", replace=is_replaced)
    remove_work_folder(work)


def _find_input(options: Options, sources: list[str]) -> Input:
    found = find_files(sources)
    n_bytes = sum(file.n_bytes for file in found.files)
    description = f"{len(found.files)} files of {', '.join(map(shown_url, sources))}"
    if found.n_skipped:
        description += f" ({found.n_skipped} files of other kinds skipped)"
    parts = cut_parts(found.files, part_size(n_bytes, options.shard_tokens))
    return Input(found.files, parts, description, n_bytes <= LEAST_PART_BYTES, found.skipped_words())


def _write_docstrings(work: Path, options: Options) -> Input:
    """The installed docstrings as a file of JSON lines, one part as a whole."""
    with show_step("reading docstrings", MAX_CHARS, visible=options.progress) as advance:
        corpus = read_installed_docstrings(workers=options.workers, advance=advance)
    lines = [json.dumps({"text": document.text}, ensure_ascii=False) for document in corpus.documents]
    data = "\n".join(lines).encode("utf-8")
    path = work / f"docstrings{JSON_LINES}"
    save_bytes(path, data)
    file = SourceFile(str(path), JSON_LINES, "", len(data), hashlib.sha256(data).hexdigest())
    return Input((file,), cut_parts([file], len(data)), corpus.description, True)


def _environment_digest() -> str:
    packages = {
        f"{package.name}=={package.version}"
        for package in importlib.metadata.distributions()
        if package.name != "transmamba"
    }
    rules = (FORMAT_VERSION, CORPUS_VOCAB_SIZE, DEFAULT_VALIDATION_SHARE, DEFAULT_SEED, SAMPLE_CHARS)
    corpus_rules = (MAX_CHARS, MIN_CHARS, MIN_SHARE)
    lines = [platform.python_version(), repr(rules), repr(corpus_rules), *sorted(packages)]
    return hashlib.sha256("\n".join(lines).encode("utf-8")).hexdigest()[:16]
