"""Text to tokens to shards: `transmamba data prepare`, and the default corpus that is built at first use."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import importlib.metadata
import os
import platform
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from transmamba.data_pipeline.docstrings import MAX_CHARS, MIN_CHARS, MIN_SHARE, read_installed_docstrings
from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.holdout import Holdout, choose_holdout
from transmamba.data_pipeline.manifest import FORMAT_VERSION, SPLITS, Manifest, load_manifest, save_manifest
from transmamba.data_pipeline.progress import Advance, show_step
from transmamba.data_pipeline.publish import check_target, publish_folder, remove_folder
from transmamba.data_pipeline.text import Document, find_files, read_documents
from transmamba.data_pipeline.tokenizer import (
    BATCH_CHARS,
    END_OF_TEXT,
    MIN_VOCAB_SIZE,
    batches,
    encode_documents,
    end_of_text_id,
    load_tokenizer,
    token_bytes,
    train_tokenizer,
    vocab_size_of,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DEFAULT_VOCAB_SIZE = 4096
# A small vocabulary for the small model that this corpus is for: more of its few tokens are seen often.
CORPUS_VOCAB_SIZE = 2048
DEFAULT_SHARD_TOKENS = 64_000_000
DEFAULT_VALIDATION_SHARE = 0.02
DEFAULT_SEED = 17
TOKENIZER_NAME = "tokenizer.json"
# The merges of a few thousand tokens settle long before this much text.
SAMPLE_CHARS = 6_000_000

# Split, text, tokens.
_Encoded = tuple[str, str, np.ndarray]


@dataclass(frozen=True, slots=True)
class _Options:
    """What `prepare` was asked for; its docstring explains the fields."""

    out: Path
    sources: list[str] | None = None
    field: str = "text"
    vocab_size: int = DEFAULT_VOCAB_SIZE
    tokenizer: Path | None = None
    eod_token: str = END_OF_TEXT
    validation_share: float = DEFAULT_VALIDATION_SHARE
    shard_tokens: int = DEFAULT_SHARD_TOKENS
    seed: int = DEFAULT_SEED
    workers: int = dataclasses.field(default_factory=lambda: os.cpu_count() or 1)
    progress: bool = True


@dataclass(frozen=True, slots=True)
class _Source:
    """Documents that can be read again, their description, and the units their reading advances by."""

    documents: Callable[[], Iterable[Document]]
    description: str
    n_bytes: int


def prepare(
    sources: list[str] | None,
    out: Path,
    *,
    field: str = "text",
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    tokenizer: Path | None = None,
    eod_token: str = END_OF_TEXT,
    validation_share: float = DEFAULT_VALIDATION_SHARE,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    seed: int = DEFAULT_SEED,
    workers: int | None = None,
    progress: bool = True,
) -> Manifest:
    """Turn text into a folder of token shards with a tokenizer and a manifest.

    The same input gives the same bytes. The folder appears whole or not at all, in place of an earlier one.

    Args:
        sources: files, folders and globs of txt, md and jsonl; None reads the installed docstrings.
        out: folder to make.
        field: member of a JSON line that holds the text.
        vocab_size: entries of the byte-level BPE to train, >= 257.
        tokenizer: tokenizer.json to use instead of training one.
        eod_token: special token that ends a document.
        validation_share: part of the text to hold out, 0 to 1; whole documents, chosen by hash.
        shard_tokens: most tokens in a shard.
        seed: of the validation split.
        workers: processes that parse modules; None is one per core. Encoding uses threads of `tokenizers`.
        progress: show progress on stderr.

    Raises:
        DataError: nothing to read, unreadable input, an option out of range, or a target with other files.
    """
    options = _Options(
        out,
        sources,
        field,
        vocab_size,
        tokenizer,
        eod_token,
        validation_share,
        shard_tokens,
        seed,
        workers=(os.cpu_count() or 1) if workers is None else workers,
        progress=progress,
    )
    _check_options(options)
    _build(options, replace=True)
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
            _build(_Options(folder, vocab_size=CORPUS_VOCAB_SIZE, progress=progress), replace=False)
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


def summary_lines(manifest: Manifest) -> list[str]:
    """What was prepared, for the screen: one line per fact and the next command."""
    train, validation = (manifest.splits[name] for name in SPLITS)
    n_tokens = train.n_tokens + validation.n_tokens
    n_bytes = train.n_text_bytes + validation.n_text_bytes
    return [
        f"source       {manifest.source}",
        f"train        {train.n_documents:,} documents, {train.n_tokens:,} tokens",
        f"validation   {validation.n_documents:,} documents, {validation.n_tokens:,} tokens; "
        f"gzip -9 needs {validation.gzip9_bits_per_byte:.3f} bits per byte",
        f"tokenizer    {manifest.vocab_size:,} entries, {n_bytes / n_tokens:.2f} bytes per token",
        f"next         python -m transmamba.train data.path={manifest.folder}",
    ]


def _check_options(options: _Options) -> None:
    if not 0 < options.validation_share < 1:
        raise DataError("validation_share", f"{options.validation_share} is no share", "use a number between 0 and 1")
    if options.vocab_size < MIN_VOCAB_SIZE:
        raise DataError("vocab_size", f"{options.vocab_size} is too small", f"use {MIN_VOCAB_SIZE} or more")
    for name in ("shard_tokens", "workers"):
        value = getattr(options, name)
        if value < 1:
            raise DataError(name, f"{value} is not positive", "use 1 or more")


def _build(options: _Options, *, replace: bool) -> None:
    check_target(options.out)
    given = load_tokenizer(options.tokenizer) if options.tokenizer else None
    if given:
        # Refused now rather than after all text was encoded.
        token_bytes(given)
        end_of_text_id(given, options.eod_token)
    source = _open_source(options)
    with show_step("reading text", source.n_bytes, visible=options.progress) as advance:
        holdout = choose_holdout(
            _advancing(source.documents(), advance),
            share=options.validation_share,
            seed=options.seed,
            sample_chars=SAMPLE_CHARS,
        )
    if given is None:
        with show_step("training the tokenizer", None, visible=options.progress):
            given = train_tokenizer(holdout.sample, vocab_size=options.vocab_size)
    with publish_folder(options.out, replace=replace) as folder:
        _write_folder(folder, source, holdout, given, options)


def _open_source(options: _Options) -> _Source:
    if options.sources is None:
        with show_step("reading docstrings", MAX_CHARS, visible=options.progress) as advance:
            corpus = read_installed_docstrings(workers=options.workers, advance=advance)
        n_bytes = sum(len(document.text.encode("utf-8")) for document in corpus.documents)
        return _Source(lambda: corpus.documents, corpus.description, n_bytes)
    files = find_files(options.sources)
    description = f"{len(files.paths)} files of {', '.join(options.sources)}"
    if files.n_skipped:
        description += f" ({files.n_skipped} files of other kinds skipped)"
    n_bytes = sum(path.stat().st_size for path in files.paths)
    return _Source(lambda: read_documents(files, field=options.field), description, n_bytes)


def _advancing(documents: Iterable[Document], advance: Advance) -> Iterator[Document]:
    for document in documents:
        yield document
        advance(len(document.text))


def _write_folder(folder: Path, source: _Source, holdout: Holdout, tokenizer: Tokenizer, options: _Options) -> None:
    # Imported here because it brings torch along, which those who only read do not need.
    from transmamba.data_pipeline.shards import SplitWriter

    n_entries = vocab_size_of(tokenizer)
    eod_id = end_of_text_id(tokenizer, options.eod_token)
    dtype = np.dtype("<u2" if n_entries <= 1 << 16 else "<u4")
    tokenizer.save(str(folder / TOKENIZER_NAME))
    train = SplitWriter(folder, "train", dtype=dtype, shard_tokens=options.shard_tokens)
    validation = SplitWriter(folder, "validation", dtype=dtype, shard_tokens=options.shard_tokens)
    n_train_bytes = n_validation_bytes = n_gzip_bytes = 0
    gzip = zlib.compressobj(level=9, wbits=31)
    with show_step("encoding", holdout.n_text_bytes, visible=options.progress) as advance:
        for split, text, tokens in _encode(tokenizer, holdout.split(source.documents()), eod_id):
            data = text.encode("utf-8")
            if split == "train":
                train.add(tokens)
                n_train_bytes += len(data)
            else:
                validation.add(tokens)
                n_validation_bytes += len(data)
                n_gzip_bytes += len(gzip.compress(data))
            advance(len(data))
    n_gzip_bytes += len(gzip.flush())
    if not n_train_bytes or not n_validation_bytes:
        raise DataError("sources", "the text changed while it was read", "run it again")
    splits = {
        "train": train.finish(n_text_bytes=n_train_bytes),
        "validation": validation.finish(
            n_text_bytes=n_validation_bytes, gzip9_bits_per_byte=8 * n_gzip_bytes / n_validation_bytes
        ),
    }
    manifest = Manifest(
        tokenizer_file=TOKENIZER_NAME,
        tokenizer_sha256=hashlib.sha256((folder / TOKENIZER_NAME).read_bytes()).hexdigest(),
        vocab_size=n_entries,
        eod_id=eod_id,
        token_dtype=dtype.str,
        source=source.description,
        splits=splits,
    )
    save_manifest(manifest, folder)


def _encode(tokenizer: Tokenizer, texts: Iterable[tuple[str, str]], eod_id: int) -> Iterator[_Encoded]:
    """Yield (split, text, tokens) in order; the next batch is encoded while the caller writes the last."""

    def encode(batch: list[tuple[str, str]]) -> list[np.ndarray]:
        return encode_documents(tokenizer, [text for _, text in batch], eod_id=eod_id)

    def finished(batch: list[tuple[str, str]], ids: Future[list[np.ndarray]]) -> Iterator[_Encoded]:
        for (split, text), tokens in zip(batch, ids.result(), strict=True):
            yield split, text, tokens

    with ThreadPoolExecutor(1) as thread:
        waiting = None
        for batch in batches(texts, BATCH_CHARS, size=lambda entry: len(entry[1])):
            running = (batch, thread.submit(encode, batch))
            if waiting:
                yield from finished(*waiting)
            waiting = running
        if waiting:
            yield from finished(*waiting)


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
