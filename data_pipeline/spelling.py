"""Which bytes of text each token stands for, and whether a tokenizer gives text back.

E vocabulary entries.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.tiktoken_table import byte_letters

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
# All that occur in UTF-8.
_TEXT_BYTES = [bytes([byte]) for byte in (*range(0xC0), *range(0xC2, 0xF5))]
# What tokenizers are known to change: letters, white space, quotes, and text that spells tokens of other kinds.
_PROBES = (
    "It's WE'LL do n't . , ! ? ``quoted'' --- 1234567 3.14 1,000 CamelCase snake_case e.g. x=[1]",
    "  \n a  b   c\td\t\te\n\nf\r\ng \n h\n \n\n i\u00a0\u3000j\u2028k  \n",
    "\ufb01 \uff21\uff11 \U0001d400 \uac00\u1100\u1161 \u6f22\u8c48 \U0001f469\u200d\U0001f469"
    " \ufeff\ufffd\ue000\U0010ffff",
    "<0x0A> <0x41><0x7F> <s>a</s> <unk> [UNK] [CLS] ##a a@@ b</w> \u0120a \u010a",
    " ".join(map(chr, range(0x3000))),
)
# Characters of a text that an error shows, with spaces that can be counted.
_SHOWN, _OPEN_BOX = 24, "\u2423"
_FIX = "use a tokenizer that keeps all text, so none that makes lower case, drops or joins white space, or uses NFKC"


class Spelling:
    """The text that token ids stand for, byte by byte.

    Args:
        tokenizer: byte-level, or of the kind that SentencePiece makes, with byte fallback.

    Attributes:
        bytes_E: bytes of UTF-8 of each token id, an array of `bytes`; b"" for special tokens and unused ids.

    Raises:
        DataError: its decoder is of another kind, so its tokens are not fixed bytes.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        steps = list(_steps(json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else None))
        kinds = {step["type"] for step in steps}
        if not kinds & {"ByteLevel", "ByteFallback"} or kinds & {"WordPiece", "BPEDecoder", "CTC"}:
            problem = "not a byte-level tokenizer, nor one with byte fallback"
            raise DataError("tokenizer", problem, "use a byte-level BPE (GPT-2 or Llama-3 style)")
        is_byte_level = "ByteLevel" in kinds
        # Where there are no letters for bytes, a mark stands for a space.
        self._marks = [] if is_byte_level else [mark for step in steps if (mark := _mark(step))]
        n_entries = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.bytes_E = np.full(n_entries, b"", dtype=object)
        of_letter = {letter: byte for byte, letter in byte_letters().items()}
        for token, i in tokenizer.get_vocab(with_added_tokens=False).items():
            if is_byte_level and all(letter in of_letter for letter in token):
                self.bytes_E[i] = bytes(of_letter[letter] for letter in token)
            elif not is_byte_level and (found := _BYTE_TOKEN.fullmatch(token)):
                self.bytes_E[i] = bytes([int(found[1], 16)])
            else:
                self.bytes_E[i] = self._unmarked(token).encode("utf-8")
        for i, entry in tokenizer.get_added_tokens_decoder().items():
            self.bytes_E[i] = b"" if entry.special else self._unmarked(entry.content).encode("utf-8")

    def is_kept(self, tokens: np.ndarray, text: bytes, *, name: str) -> bool:
        """Whether tokens spell a text as it is; False where they spell it in other, equivalent characters.

        Those are what canonical Unicode normalisation (NFC, NFD) makes, and a space for SentencePiece's mark of one.
        A single space more before a text is no change.

        Args:
            tokens: ids.
            text: what was encoded, as UTF-8.
            name: of the text, for the message.

        Raises:
            DataError: they spell something else.
        """
        spelled = b"".join(self.bytes_E[tokens].tolist())
        if spelled == text or (spelled[:1] == b" " and spelled[1:] == text):
            return True
        self._check_equivalent(spelled.decode("utf-8", errors="replace"), text.decode("utf-8"), name=name)
        return False

    def check_probe(self, tokenizer: Tokenizer, text: str) -> None:
        """Encode a text and refuse it if it does not come back, by this spelling and by the tokenizer's decoder.

        Raises:
            DataError: it does not.
        """
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        self.is_kept(np.array(ids, dtype=np.int64), text.encode("utf-8"), name="tokenizer")
        decoded = tokenizer.decode(ids, skip_special_tokens=False)
        # Some decoders take away the space before a text, be it the tokenizer's or not.
        self._check_equivalent(decoded, text.removeprefix(" "), name="tokenizer")

    def _check_equivalent(self, spelled: str, text: str, *, name: str) -> None:
        found, wanted = (unicodedata.normalize("NFC", self._unmarked(given)) for given in (spelled, text))
        if found in (wanted, f" {wanted}"):
            return
        if not wanted.startswith(" "):
            found = found.removeprefix(" ")
        unlike = (i for i, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1])
        at = max(next(unlike, min(len(found), len(wanted))) - _SHOWN // 2, 0)
        was, became = (repr(given[at : at + _SHOWN]).replace(" ", _OPEN_BOX) for given in (wanted, found))
        raise DataError(name, f"its text does not come back from its tokens ({was} becomes {became})", _FIX)

    def _unmarked(self, text: str) -> str:
        for mark in self._marks:
            text = text.replace(mark, " ")
        return text


def check_reversible(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that loses text: that has no token for a byte, or does not give back texts made to show it.

    Canonical normalisation (NFC, NFD) and a space before every text are no loss.

    Args:
        tokenizer: as `load_tokenizer` returns it.

    Raises:
        DataError: it does, or as `Spelling`.
    """
    spelling = Spelling(tokenizer)
    known = set(spelling.bytes_E)
    missing = [byte[0] for byte in _TEXT_BYTES if byte not in known]
    if missing:
        problem = f"no token for {len(missing)} of the bytes of text (first: {missing[0]:#04x})"
        raise DataError("tokenizer", problem, "train it with all 256 bytes as its initial alphabet")
    for probe in _PROBES:
        spelling.check_probe(tokenizer, probe)
    for entry in tokenizer.get_added_tokens_decoder().values():
        token = entry.content
        try:
            spelling.check_probe(tokenizer, f"a{token}b {token} c\n{token}\n \t{token}  d")
        except DataError as error:
            fix = 'set its "special" to true in the tokenizer.json, or its "lstrip" and "rstrip" to false'
            raise DataError(f"tokenizer, beside its token {token!r}", error.problem, fix) from error


def _steps(decoder: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if decoder and decoder["type"] == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    elif decoder:
        yield decoder


def _mark(step: dict[str, Any]) -> str | None:
    """What a step of a decoder makes a space of."""
    if step["type"] == "Metaspace":
        return step["replacement"]
    return step["pattern"].get("String") if step["type"] == "Replace" and step["content"] == " " else None
