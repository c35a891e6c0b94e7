"""Which text is held out for validation, decided by the text itself, and a sample to train a tokenizer on."""

from __future__ import annotations

import hashlib
import heapq
from dataclasses import dataclass

from transmamba.data_pipeline.errors import DataError

# A hash split that holds out less than this part of the share asked for is too uneven to use.
_LEAST_PART = 0.25
# And one that holds out more than half of the text, or with a large share more than this many times the share.
_MOST_PART = 1.5
LARGEST_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Cut:
    """A document whose text is validation from character `at` on, and training before; both count from 0."""

    part: int
    document: int
    at: int


@dataclass(frozen=True, slots=True)
class Holdout:
    """The rule that splits documents: validation are those whose hash is below `threshold`, or the end of one."""

    threshold: float
    cut: Cut | None = None


def text_fraction(text: bytes, seed: int) -> float:
    """A number in [0, 1) that depends on the text and the seed alone, so copies of a text stay together.

    Args:
        text: as UTF-8.
        seed: any whole number.
    """
    salt = str(seed).encode("ascii").ljust(16, b"\0")[:16]
    digest = hashlib.blake2b(text, digest_size=6, salt=salt).digest()
    return int.from_bytes(digest, "big") / 2**48


def is_even_enough(*, share: float, n_held_out_bytes: int, n_text_bytes: int) -> bool:
    """Whether a split by hash holds out about what was asked for; few or very uneven documents cannot be split so."""
    most = max(0.5, _MOST_PART * share) * n_text_bytes
    return _LEAST_PART * share * n_text_bytes <= n_held_out_bytes <= most and n_held_out_bytes > 0


def cut_position(text: str, *, wanted_share: float) -> int:
    """Where the held-out end of a text begins: at most half of it, from a paragraph, line or word on.

    Raises:
        DataError: the text is too short.
    """
    if len(text) < 2:
        raise DataError("sources", "too little text to hold some out for validation", "give more text")
    earliest = len(text) - max(1, round(len(text) * min(wanted_share, 0.5)))
    for separator in ("\n\n", "\n", " "):
        found = text.find(separator, earliest)
        if 0 <= found < len(text) - len(separator):
            return found + len(separator)
    return earliest


class Sample:
    """The texts with the smallest hashes, as many as have `n_chars` characters: no part of the input is favoured.

    Samples of parts, joined, are the sample of the whole. A text that was added before is not added again.

    Args:
        n_chars: wanted.
        ceiling: hashes above it are left out, except for one text where there is no other.
    """

    def __init__(self, n_chars: int, *, ceiling: float = 1.0) -> None:
        self._wanted, self._ceiling = n_chars, ceiling
        self._heap: list[tuple[float, str]] = []
        self._fractions: set[float] = set()
        self._n_chars = 0

    def add(self, fraction: float, text: str) -> None:
        """Offer a text and its hash."""
        if not self._wanted or fraction in self._fractions:
            return
        heapq.heappush(self._heap, (-fraction, text))
        self._fractions.add(fraction)
        self._n_chars += len(text)
        while len(self._heap) > 1 and self._is_spare(*self._heap[0]):
            negative, dropped = heapq.heappop(self._heap)
            self._fractions.remove(-negative)
            self._n_chars -= len(dropped)

    def entries(self) -> list[tuple[float, str]]:
        """Hashes and texts by hash, every text whole."""
        return [(-negative, text) for negative, text in sorted(self._heap, reverse=True)]

    def texts(self) -> list[str]:
        """The texts by hash, the last one cut to have exactly the characters wanted."""
        found, left = [], self._wanted
        for _, text in self.entries():
            found.append(text[:left])
            left -= len(found[-1])
        return [text for text in found if text]

    def _is_spare(self, negative: float, text: str) -> bool:
        return self._n_chars - len(text) >= self._wanted or -negative > self._ceiling
