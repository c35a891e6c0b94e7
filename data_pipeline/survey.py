"""The first pass over the input: what is there, which documents are copies, and what to train a tokenizer on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.holdout import (
    Cut,
    Holdout,
    Sample,
    cut_position,
    is_even_enough,
    text_fraction,
)
from transmamba.data_pipeline.parts import Part, Reading
from transmamba.data_pipeline.records import load_record, save_array, save_record
from transmamba.data_pipeline.workers import Advance

# One row per document of a part: XXH3-128 of its text, its hash in [0, 1), its bytes of UTF-8.
ROW = np.dtype([("digest", "V16"), ("fraction", "<f8"), ("n_bytes", "<u8")])
DIGEST_BYTES = 16
# Of the texts that could be in the sample, so many times the expected number are kept until all parts are known.
_SPARE_SAMPLE = 8
_ADVANCE_CHARS = 1 << 20


@dataclass(frozen=True, slots=True)
class Question:
    """What the first pass is asked; the arguments of `transmamba data prepare` by these names."""

    field: str
    seed: int
    validation_share: float
    sample_chars: int
    n_source_bytes: int


@dataclass(frozen=True, slots=True)
class Survey:
    """What the first pass found.

    `duplicates` has, for every part, the numbers of the documents to leave out because an earlier one is the same.
    """

    n_documents: int
    n_text_bytes: int
    n_empty: int
    n_duplicates: int
    duplicates: tuple[np.ndarray, ...]
    n_of_part: tuple[int, ...]
    holdout: Holdout


def survey_part(number: int, part: Part, question: Question, folder: Path, advance: Advance) -> None:
    """Read a part and put what was found into `folder`, the record last."""
    reading = Reading(part, question.field)
    share = question.validation_share
    expected = question.sample_chars / max(question.n_source_bytes, 1)
    sample = Sample(question.sample_chars, ceiling=share + (1 - share) * _SPARE_SAMPLE * expected)
    tables, rows = [np.empty(0, dtype=ROW)], []
    n_bytes = n_chars = 0
    for document in reading.documents():
        data = document.text.encode("utf-8")
        fraction = text_fraction(data, question.seed)
        rows.append((xxhash.xxh3_128_digest(data), fraction, len(data)))
        if fraction >= share:
            sample.add(fraction, document.text)
        n_chars += len(document.text)
        if n_chars >= _ADVANCE_CHARS:
            advance(reading.n_bytes - n_bytes, 0)
            n_bytes, n_chars = reading.n_bytes, 0
            # A table takes a tenth of the memory of a list.
            tables.append(np.array(rows, dtype=ROW))
            rows.clear()
    advance(reading.n_bytes - n_bytes, 0)
    save_array(_rows_path(folder, number), np.concatenate([*tables, np.array(rows, dtype=ROW)]))
    record = {"n_empty": reading.n_empty, "sample": sample.entries()}
    save_record(_record_path(folder, number), record)


def surveyed_digests(number: int, folder: Path) -> bytes:
    """XXH3-128 of every document of a surveyed part, in order, `DIGEST_BYTES` each."""
    return np.load(_rows_path(folder, number), allow_pickle=False)["digest"].tobytes()


def is_surveyed(number: int, folder: Path) -> bool:
    """Whether an earlier run has finished this part."""
    return _record_path(folder, number).exists()


def join_surveys(parts: Sequence[Part], question: Question, folder: Path, *, drop_duplicates: bool) -> Survey:
    """Decide over all parts what is held out and what is left out.

    Few or very uneven documents cannot be split by hash: then the end of the longest one is held out, and copies of
    it are left out, because they would be trained on.

    Raises:
        DataError: there is no document, or too little text to split.
    """
    tables = [np.load(_rows_path(folder, i), allow_pickle=False) for i in range(len(parts))]
    n_empty = sum(load_record(_record_path(folder, i))["n_empty"] for i in range(len(parts)))
    n_all = sum(map(len, tables))
    if n_all == 0:
        problem = f"no documents found ({n_empty} are empty)"
        raise DataError("sources", problem, "give files with text in them, or name the text field with --field")
    copies = find_copies([table["digest"] for table in tables]) if drop_duplicates else [_nothing() for _ in tables]
    kept = _without(tables, copies)
    share = question.validation_share
    n_held_out = sum(int(table["n_bytes"][table["fraction"] < share].sum()) for table in kept)
    holdout = Holdout(share)
    if not is_even_enough(share=share, n_held_out_bytes=n_held_out, n_text_bytes=_n_text_bytes(kept)):
        part, document = _longest(tables)
        copies = _with_copies_of(part, document, tables, copies)
        kept = _without(tables, copies)
        wanted_share = share * _n_text_bytes(kept) / int(tables[part]["n_bytes"][document])
        text = _document(parts[part], question, document)
        holdout = Holdout(0.0, Cut(part, document, cut_position(text, wanted_share=wanted_share)))
    return Survey(
        n_documents=sum(map(len, kept)),
        n_text_bytes=_n_text_bytes(kept),
        n_empty=n_empty,
        n_duplicates=n_all - sum(map(len, kept)),
        duplicates=tuple(copies),
        n_of_part=tuple(map(len, tables)),
        holdout=holdout,
    )


def find_copies(digests: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For every part, the numbers of the documents whose digest was seen before, in it or in an earlier one."""
    halves = np.concatenate(digests).view("<u8").reshape(-1, 2)
    # The sort is stable, so the first of equal ones is the first document.
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    ordered = halves[order]
    is_copy = np.zeros(len(halves), dtype=bool)
    is_copy[order[1:]] = (ordered[1:] == ordered[:-1]).all(axis=1)
    bounds = np.cumsum([len(part) for part in digests])[:-1]
    return [np.flatnonzero(part) for part in np.split(is_copy, bounds)]


def training_sample(parts: Sequence[Part], question: Question, holdout: Holdout, folder: Path) -> list[str]:
    """Texts to train a tokenizer on, none of them held out, joined from those of the parts."""
    sample = Sample(question.sample_chars)
    records = (load_record(_record_path(folder, i)) for i in range(len(parts)))
    cut = holdout.cut and _document(parts[holdout.cut.part], question, holdout.cut.document)
    for fraction, text in (entry for record in records for entry in record["sample"]):
        sample.add(fraction, text[: holdout.cut.at] if holdout.cut and text == cut else text)
    if cut and holdout.cut:
        return sample.texts() or [cut[: holdout.cut.at][: question.sample_chars]]
    return sample.texts()


def _longest(tables: Sequence[np.ndarray]) -> tuple[int, int]:
    """Part and number of the first of the longest documents."""
    longest = [int(table["n_bytes"].max(initial=0)) for table in tables]
    part = int(np.argmax(longest))
    return part, int(np.argmax(tables[part]["n_bytes"]))


def _with_copies_of(
    part: int, document: int, tables: Sequence[np.ndarray], copies: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Numbers of the documents to leave out, and for every part those of all other documents with this one's text."""
    digest = tables[part]["digest"][document]
    found = [np.flatnonzero(table["digest"] == digest) for table in tables]
    found[part] = found[part][found[part] != document]
    return [np.union1d(known, more) for known, more in zip(copies, found, strict=True)]


def _without(tables: Sequence[np.ndarray], left_out: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [np.delete(table, numbers) for table, numbers in zip(tables, left_out, strict=True)]


def _n_text_bytes(tables: Sequence[np.ndarray]) -> int:
    return sum(int(table["n_bytes"].sum()) for table in tables)


def _document(part: Part, question: Question, number: int) -> str:
    for i, document in enumerate(Reading(part, question.field).documents()):
        if i == number:
            return document.text
    raise DataError("sources", "the text changed while it was read", "run it again")


def _rows_path(folder: Path, number: int) -> Path:
    return folder / f"survey-{number:06d}.npy"


def _record_path(folder: Path, number: int) -> Path:
    return folder / f"survey-{number:06d}.json"


def _nothing() -> np.ndarray:
    return np.empty(0, dtype=np.int64)
