"""Which text is held out for validation, decided by the text itself, and a sample to train a tokenizer on."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.text import Document

# A hash split that holds out less than this part of the share asked for is too uneven to use.
_LEAST_PART = 0.25


@dataclass(frozen=True, slots=True)
class Holdout:
    """The rule that splits documents, and what was counted to make it.

    Documents whose hash is below `threshold` are validation; of the document named `cut_name` (if any) the
    text from `cut_at` on is validation. `sample` holds training documents chosen by hash, up to the limit.
    """

    seed: int
    threshold: float
    cut_name: str | None
    cut_at: int
    n_documents: int
    n_text_bytes: int
    sample: tuple[str, ...]

    def split(self, documents: Iterable[Document]) -> Iterator[tuple[str, str]]:
        """Yield (split, text) in document order; a cut document gives two."""
        for document in documents:
            if document.name == self.cut_name:
                yield "train", document.text[: self.cut_at]
                yield "validation", document.text[self.cut_at :]
            else:
                held_out = text_fraction(document.text, self.seed) < self.threshold
                yield "validation" if held_out else "train", document.text


def text_fraction(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on the text and the seed alone, so copies of a text stay together."""
    salt = str(seed).encode("ascii").ljust(16, b"\0")[:16]
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=6, salt=salt).digest()
    return int.from_bytes(digest, "big") / 2**48


def choose_holdout(documents: Iterable[Document], *, share: float, seed: int, sample_chars: int) -> Holdout:
    """Read all documents once and decide what is held out.

    Few or very uneven documents cannot be split by hash: then the end of the longest one is held out, at most
    half of it, from a paragraph, line or word on.

    Args:
        documents: in their order, with names that differ.
        share: part of the text to hold out, between 0 and 1.
        seed: of the hash.
        sample_chars: characters of training text to keep in the sample.

    Raises:
        DataError: there is no document, or too little text to split.
    """
    n_documents = n_text_bytes = n_held_out_bytes = n_sampled = 0
    longest = Document("", "")
    sample: list[tuple[float, str]] = []
    for document in documents:
        n_bytes = len(document.text.encode("utf-8"))
        fraction = text_fraction(document.text, seed)
        n_documents += 1
        n_text_bytes += n_bytes
        if len(document.text) > len(longest.text):
            longest = document
        if fraction < share:
            n_held_out_bytes += n_bytes
            continue
        # The smallest hashes stay, so the sample does not favour the first documents.
        heapq.heappush(sample, (-fraction, document.text))
        n_sampled += len(document.text)
        while n_sampled > sample_chars and len(sample) > 1:
            n_sampled -= len(heapq.heappop(sample)[1])
    if n_documents == 0:
        raise DataError("sources", "no documents found", "give files with text in them")
    texts = tuple(text[:sample_chars] for _, text in sorted(sample, reverse=True))
    if _LEAST_PART * share * n_text_bytes <= n_held_out_bytes <= n_text_bytes / 2:
        return Holdout(seed, share, None, 0, n_documents, n_text_bytes, texts)
    cut_at = _cut_position(longest.text, wanted_share=share * n_text_bytes / len(longest.text.encode("utf-8")))
    return Holdout(seed, 0.0, longest.name, cut_at, n_documents, n_text_bytes, texts or (longest.text[:cut_at],))


def _cut_position(text: str, *, wanted_share: float) -> int:
    if len(text) < 2:
        raise DataError("sources", "too little text to hold some out for validation", "give more text")
    earliest = len(text) - max(1, round(len(text) * min(wanted_share, 0.5)))
    for separator in ("\n\n", "\n", " "):
        found = text.find(separator, earliest)
        if 0 <= found < len(text) - len(separator):
            return found + len(separator)
    return earliest
