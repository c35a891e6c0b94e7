"""What is held out and what a tokenizer is trained on depend on the texts alone, not on how they are read."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import xxhash

from transmamba.data_pipeline.holdout import Sample, cut_position, text_fraction
from transmamba.data_pipeline.listing import find_files
from transmamba.data_pipeline.parts import Part, cut_parts
from transmamba.data_pipeline.survey import Question, Survey, find_copies, join_surveys, survey_part, training_sample


def write_lines(folder: Path, texts: list[str]) -> list[str]:
    folder.mkdir()
    for i in range(0, len(texts), 100):
        # Files of a hundred lines; repr spells these plain texts as JSON strings do, but for the quotes.
        lines = [f'{{"text": "{text}"}}\n' for text in texts[i : i + 100]]
        (folder / f"{i:06d}.jsonl").write_text("".join(lines))
    return [str(folder)]


def survey(
    folder: Path, sources: list[str], *, size: int, share: float = 0.1, seed: int = 1, dedup: bool = False
) -> tuple[Survey, list[str], list[Part]]:
    """The first pass over parts of about `size` bytes."""
    files = find_files(sources).files
    parts = cut_parts(files, size)
    question = Question("text", seed, share, 5_000, sum(file.n_bytes for file in files))
    folder.mkdir()
    # In another order than that of the input, as workers may.
    for i in random.Random(0).sample(range(len(parts)), len(parts)):
        survey_part(i, parts[i], question, folder, lambda n_bytes, n_tokens: None)
    found = join_surveys(parts, question, folder, drop_duplicates=dedup)
    return found, training_sample(parts, question, found.holdout, folder), parts


TEXTS = [f"text number {i} " * 20 for i in range(3000)]


def held_out(texts: list[str], *, share: float, seed: int) -> set[str]:
    return {text for text in texts if text_fraction(text.encode(), seed) < share}


def test_the_holdout_depends_on_the_text_alone_and_has_the_share_asked_for(tmp_path: Path) -> None:
    sources = write_lines(tmp_path / "in", TEXTS)
    found, sample, parts = survey(tmp_path / "a", sources, size=30_000)
    assert len(parts) > 20
    assert (found.holdout.threshold, found.holdout.cut) == (0.1, None)
    assert 250 < len(held_out(TEXTS, share=0.1, seed=1)) < 350
    assert held_out(TEXTS[::2], share=0.1, seed=1) == held_out(TEXTS, share=0.1, seed=1) & set(TEXTS[::2])
    assert held_out(TEXTS, share=0.1, seed=2) != held_out(TEXTS, share=0.1, seed=1)
    assert sum(map(len, sample)) == 5_000
    assert not set(sample) & held_out(TEXTS, share=0.1, seed=1)
    # It is the documents with the smallest hashes, whatever part they are in.
    ordered = sorted((text_fraction(text.encode(), 1), text) for text in TEXTS)
    expected = [text for fraction, text in ordered if fraction >= 0.1][: len(sample)]
    assert sample[:-1] == expected[:-1]
    assert expected[-1].startswith(sample[-1])


def test_parts_of_other_sizes_find_the_same(tmp_path: Path) -> None:
    sources = write_lines(tmp_path / "in", TEXTS[:1000])
    first, sample, _ = survey(tmp_path / "a", sources, size=1 << 30)
    second, other_sample, _ = survey(tmp_path / "b", sources, size=10_000)
    assert sample == other_sample
    counts = [(found.n_documents, found.n_text_bytes, found.holdout) for found in (first, second)]
    assert counts[0] == counts[1]
    assert counts[0][:2] == (1000, sum(map(len, TEXTS[:1000])))


def test_of_copies_the_first_stays_wherever_they_are(tmp_path: Path) -> None:
    generator = random.Random(3)
    texts = [*TEXTS[:500], *generator.choices(TEXTS[:500], k=400)]
    generator.shuffle(texts)
    sources = write_lines(tmp_path / "in", texts)
    found, sample, parts = survey(tmp_path / "a", sources, size=20_000, dedup=True)
    kept, i = [], 0
    for n_documents, copies in zip(found.n_of_part, found.duplicates, strict=True):
        kept += [texts[i + k] for k in range(n_documents) if k not in copies]
        i += n_documents
    assert kept == list(dict.fromkeys(texts))
    assert found.n_duplicates == 400 == sum(map(len, found.duplicates))
    assert found.n_documents == 500
    assert found.n_text_bytes == sum(map(len, kept))
    assert len(sample) == len(set(sample))
    assert len(parts) > 5


def test_digests_are_compared_whole() -> None:
    digests = [xxhash.xxh3_128_digest(bytes([i])) for i in range(4)]
    # Equal in their first half only.
    digests.append(digests[0][:8] + digests[1][8:])
    first, second = np.array(digests, dtype="V16"), np.array(digests[2:3], dtype="V16")
    copies = find_copies([first, first[:0], second])
    assert [part.tolist() for part in copies] == [[], [], [0]]


def test_a_few_documents_are_cut_and_the_end_is_in_no_sample(tmp_path: Path) -> None:
    texts = ["short one.", "a b c d e f g h i j " * 50 + "the end of the longest"]
    sources = write_lines(tmp_path / "in", texts)
    found, sample, _ = survey(tmp_path / "a", sources, size=1 << 20, share=0.02)
    cut = found.holdout.cut
    assert cut is not None
    assert (cut.part, cut.document) == (0, 1)
    assert found.holdout.threshold == 0
    assert 900 < cut.at < len(texts[1])
    assert set(sample) <= {texts[0], texts[1][: cut.at]}
    assert sample


def test_the_cut_is_at_a_paragraph_a_line_or_a_word() -> None:
    assert cut_position("aaaa bb\ncc dd ee\n\nff gg", wanted_share=0.9) == 18
    assert cut_position("aaaa bbb cc dd\nee", wanted_share=0.9) == 15
    assert cut_position("aaaabbbbccccdddd ee", wanted_share=0.5) == 17
    assert cut_position("aaaabbbb", wanted_share=0.25) == 6


def test_a_ceiling_never_empties_a_sample() -> None:
    sample = Sample(100, ceiling=0.1)
    for fraction in (0.9, 0.5, 0.7):
        sample.add(fraction, str(fraction))
    assert sample.entries() == [(0.5, "0.5")]
    sample.add(0.05, "low")
    sample.add(0.05, "low")
    assert sample.entries() == [(0.05, "low")]


@pytest.mark.parametrize("n_parts", [1, 3, 10])
def test_samples_of_parts_join_to_the_sample_of_the_whole(n_parts: int) -> None:
    generator = random.Random(n_parts)
    entries = [(generator.random(), "x" * generator.randrange(1, 200)) for _ in range(300)]
    whole, joined = Sample(2_000), Sample(2_000)
    for entry in entries:
        whole.add(*entry)
    for i in range(n_parts):
        part = Sample(2_000)
        for entry in entries[i::n_parts]:
            part.add(*entry)
        for entry in part.entries():
            joined.add(*entry)
    assert joined.texts() == whole.texts()
    assert sum(map(len, whole.texts())) == 2_000
