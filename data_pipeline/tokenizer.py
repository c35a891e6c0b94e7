"""Byte-level BPE: train, load, encode, and how many bytes of text each token stands for.

E vocabulary entries.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.spelling import Spelling

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
# Every byte and the special token.
MIN_VOCAB_SIZE = 257
VOCAB_MULTIPLE = 128
# A longer text is cut, because the encoder gives each piece to one thread.
PIECE_CHARS = 50_000
# Text that is encoded at once: the encoder keeps some 200 bytes per token until it is done.
BATCH_CHARS = 2_000_000
# Byte-level pre-tokenization never joins tokens over a lone line break between two words.
_SAFE_CUT = re.compile(r"(?<=\S)\n(?=\S)")

Entry = TypeVar("Entry")


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE whose only special token is `<|endoftext|>`, id 0.

    The same texts give the same tokenizer. A small corpus may give fewer than `vocab_size` tokens.

    Raises:
        DataError: `vocab_size` does not hold the 256 bytes and the special token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in split_long_text(text)), trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def check_vocab_size(vocab_size: int) -> None:
    """Refuse a vocabulary that does not hold the 256 bytes and the special token.

    Raises:
        DataError: it is too small.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise DataError("vocab_size", f"{vocab_size} is too small", f"use {MIN_VOCAB_SIZE} or more")


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json`, or the one inside a folder; nothing but JSON is read and no code is run.

    Raises:
        DataError: the file is missing or no tokenizer, or the folder says that its tokenizer is code.
    """
    from tokenizers import Tokenizer

    if path.is_dir():
        _refuse_code(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    fix = "give the tokenizer.json of a Hugging Face tokenizer"
    if not file.is_file():
        raise DataError(str(file), "no such tokenizer file", fix)
    try:
        tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises the bare class
        raise DataError(str(file), f"not a tokenizer ({error})", fix) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if hasattr(tokenizer.model, "dropout"):
        # Otherwise the same text has other tokens each time.
        tokenizer.model.dropout = None
    # Text that spells a special token is text: only the pipeline itself ends documents.
    tokenizer.encode_special_tokens = True
    return tokenizer


def _refuse_code(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    try:
        record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise DataError(str(file), f"cannot be read ({error})", "copy it again") from error
    classes = record.get("auto_map") if isinstance(record, dict) else None
    if isinstance(classes, dict) and "AutoTokenizer" in classes:
        problem = "its tokenizer is code of its own (auto_map), which is never run"
        fix = f"convert it, or give {folder / 'tokenizer.json'} itself if that is known to do the same"
        raise DataError(str(file), problem, fix)


def vocab_size_of(tokenizer: Tokenizer) -> int:
    """One more than the largest token id."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def end_of_text_id(tokenizer: Tokenizer, token: str = END_OF_TEXT) -> int:
    """Id of the token that ends every document.

    Raises:
        DataError: the tokenizer has no such special token.
    """
    specials = {entry.content: i for i, entry in tokenizer.get_added_tokens_decoder().items() if entry.special}
    if token not in specials:
        raise DataError(
            "tokenizer",
            f"no special token {token!r} to end documents with (it has: {', '.join(sorted(specials))})",
            "name one of its special tokens with --eod-token",
        )
    return specials[token]


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of UTF-8 text that each token id stands for: int32 [E]; 0 for special tokens and unused ids.

    Bits per byte of a text are the summed nll of its tokens over ln 2 times the sum of these. The bytes are those of
    the text as the tokens spell it: after a normaliser such as NFC, if the tokenizer has one.

    Raises:
        DataError: the tokenizer is neither byte-level nor has byte fallback, so its tokens have no fixed number of
            bytes.
    """
    return np.array([len(spelled) for spelled in Spelling(tokenizer).bytes_E], dtype=np.int32)


def split_long_text(text: str) -> list[str]:
    """Cut a text into pieces of about `PIECE_CHARS`, whose byte-level encodings join to that of the whole text."""
    pieces = []
    start = 0
    while len(text) - start > PIECE_CHARS:
        cut = _SAFE_CUT.search(text, start + PIECE_CHARS)
        if cut is None:
            break
        pieces.append(text[start : cut.end()])
        start = cut.end()
    pieces.append(text[start:])
    return pieces


def encode_documents(tokenizer: Tokenizer, texts: list[str], *, eod_id: int) -> list[np.ndarray]:
    """Token ids of each text followed by `eod_id`, uint32; runs on every core that `tokenizers` may use."""
    may_cut = any(len(text) > PIECE_CHARS for text in texts) and _may_cut(tokenizer)
    pieces = [(i, piece) for i, text in enumerate(texts) for piece in (split_long_text(text) if may_cut else [text])]
    ids: list[list[np.ndarray]] = [[] for _ in texts]
    for batch in batches(pieces, BATCH_CHARS, size=lambda entry: len(entry[1])):
        encodings = tokenizer.encode_batch_fast([piece for _, piece in batch], add_special_tokens=False)
        for (i, _), encoding in zip(batch, encodings, strict=True):
            # Twice as fast as by numpy alone.
            ids[i].append(np.frombuffer(array("I", encoding.ids), dtype=np.uint32))
    end = np.array([eod_id], dtype=np.uint32)
    return [np.concatenate([*parts, end]) for parts in ids]


def _may_cut(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer is byte-level and puts nothing, such as a space, before a text."""
    cut, whole = (
        [i for text in texts for i in tokenizer.encode(text, add_special_tokens=False).ids]
        for texts in (["a\n", "a"], ["a\na"])
    )
    return cut == whole and b"ByteLevel" in (tokenizer.decoder.__getstate__() if tokenizer.decoder else b"")


def batches(entries: Iterable[Entry], limit: int, *, size: Callable[[Entry], int]) -> Iterator[list[Entry]]:
    """Group consecutive entries; a group ends with the entry that brings its sizes to `limit`."""
    batch: list[Entry] = []
    total = 0
    for entry in entries:
        batch.append(entry)
        total += size(entry)
        if total >= limit:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch
