"""Tables of the tiktoken kind, a token in base64 and its rank per line, as byte-level BPE of `tokenizers`."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from transmamba.data_pipeline.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# How text is cut into words before tokens are joined; the patterns of the public encodings of these names.
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
    "o200k": rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
}
# Entries of the public tables, by which their patterns are recognised: r50k, p50k, cl100k, o200k.
_PATTERN_OF_SIZE = {50_256: "gpt2", 50_280: "gpt2", 100_256: "cl100k", 199_998: "o200k"}
# Where the end-of-text token is not the first unused id.
_END_OF_SIZE = {100_256: 100_257, 199_998: 199_999}
_FIX = "give a .tiktoken table: a token in base64, a space and its rank per line"


def looks_like_table(path: Path) -> bool:
    """Whether a file's first line is a token in base64 and a rank."""
    with path.open("rb") as file:
        try:
            _entry(file.readline(4096), path, 1)
        except DataError:
            return False
    return True


def read_table(path: Path, *, pattern: str | None, eod_token: str) -> Tokenizer:
    """Make a tokenizer that encodes as tiktoken does with this table.

    Args:
        path: of the table.
        pattern: "gpt2", "cl100k" or "o200k"; None recognises the public tables by their size.
        eod_token: special token to add; it gets the id it has in the public table, otherwise the first unused one.

    Raises:
        DataError: a line or the table is not what it should be, or the pattern is not known.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    ranks = _read_ranks(path)
    pattern = pattern or _PATTERN_OF_SIZE.get(len(ranks))
    if pattern not in PATTERNS:
        problem = f"a table of {len(ranks):,} tokens does not say how text is cut into words"
        raise DataError(str(path), problem, f"add --pattern {', '.join(PATTERNS)}")
    letters = byte_letters()
    names = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocab = {names[token]: rank for token, rank in ranks.items()}
    used = set(ranks.values())
    vocab[eod_token] = _END_OF_SIZE.get(len(ranks), next(i for i in range(len(used) + 1) if i not in used))
    merges = [(names[left], names[right]) for left, right in _merges(ranks)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    words = pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated")
    to_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, to_letters])  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(eod_token, special=True, normalized=False)])
    tokenizer.encode_special_tokens = True
    return tokenizer


def byte_letters() -> dict[int, str]:
    """The visible character that stands for each byte in byte-level vocabularies."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Every pair of tokens that joins to a token, in the order of the joined token's rank.

    The table does not tell which pair a token was learned from, and encoding with it does not care: any two
    neighbours that join to a token of the lowest rank are joined.
    """
    for token in sorted(ranks, key=lambda token: ranks[token]):
        pairs = ((token[:i], token[i:]) for i in range(1, len(token)))
        known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        yield from sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                token, rank = _entry(line, path, number)
                if token in ranks:
                    raise DataError(f"{path}:{number}", "the token is there twice", _FIX)
                ranks[token] = rank
    if len(set(ranks.values())) != len(ranks):
        raise DataError(str(path), "two tokens have the same rank", _FIX)
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise DataError(str(path), f"{len(missing)} of the 256 bytes are no token (first: {missing[0]:#04x})", _FIX)
    return ranks


def _entry(line: bytes, path: Path, number: int) -> tuple[bytes, int]:
    try:
        token, rank = line.split()
        if not token or not rank.isdigit():
            raise ValueError(rank)
        return base64.b64decode(token, validate=True), int(rank)
    except (ValueError, binascii.Error) as error:
        raise DataError(f"{path}:{number}", "not a token in base64 and its rank", _FIX) from error
