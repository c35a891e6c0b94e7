"""The second pass over the input encodes what the first one saw, and every document comes back from its tokens."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, normalizers

from transmamba.data_pipeline import passes
from transmamba.data_pipeline.encoding import SHARDS, TOKENIZER_NAME, Recipe, count_changed, encode_part, join_splits
from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.listing import find_files
from transmamba.data_pipeline.manifest import Manifest
from transmamba.data_pipeline.parts import Part, cut_parts
from transmamba.data_pipeline.prepare import prepare
from transmamba.data_pipeline.survey import Question, Survey, join_surveys, survey_part
from transmamba.data_pipeline.tokenizer import load_tokenizer, token_bytes, train_tokenizer
from transmamba.data_pipeline.tokens import TokenStore

# Documents of few letters that are all different.
TEXTS = [f"cafe number {i}, and what it serves: " + "tea, caf\u00e9, water. " * (5 + i % 7) for i in range(60)]
DECOMPOSED = [unicodedata.normalize("NFD", text) for text in TEXTS]


def write_files(folder: Path, texts: list[str]) -> Path:
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:03d}.txt").write_text(text)
    return folder


def documents_of(manifest: Manifest) -> dict[str, list[str]]:
    """The text of every document by its tokens."""
    tokenizer, found = load_tokenizer(manifest.tokenizer_path), {}
    for split in manifest.splits:
        store = TokenStore(manifest, split)
        text = tokenizer.decode(store.read(0, store.n_tokens).tolist(), skip_special_tokens=False)
        found[split] = text.split("<|endoftext|>")[:-1]
    return found


def two_passes(sources: Path, work: Path, tokenizer: Tokenizer, *, share: float = 0.2) -> tuple[Survey, list[Part]]:
    """Both passes over one part, in one process."""
    (work / SHARDS).mkdir(parents=True)
    tokenizer.save(str(work / TOKENIZER_NAME))
    files = find_files([str(sources)]).files
    parts = cut_parts(files, 1 << 30)
    question = Question("text", 1, share, 0, sum(file.n_bytes for file in files))
    survey_part(0, parts[0], question, work, lambda n_bytes, n_tokens: None)
    survey = join_surveys(parts, question, work, drop_duplicates=False)
    digest = hashlib.sha256((work / TOKENIZER_NAME).read_bytes()).hexdigest()
    recipe = Recipe("text", 1, survey.holdout, digest, 0, "<u2", 1 << 20, 1 << 16)
    encode_part(0, parts[0], survey.duplicates[0], survey.n_of_part[0], recipe, work, lambda n_bytes, n_tokens: None)
    return survey, parts


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "one of the same length": (lambda folder: (folder / "007.txt").write_text("x" * 300), "007.txt"),
    "one that is left out as a copy": (lambda folder: (folder / "060.txt").write_text("x" * 300), "060.txt"),
    "two changed places": (lambda folder: swap(folder / "003.txt", folder / "004.txt"), "003.txt"),
    "one more": (
        lambda folder: (folder / "lines.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n'),
        "byte 14 or one before it",
    ),
    "one emptied": (lambda folder: (folder / "007.txt").write_text(""), "008.txt or one before it"),
    "one less": (lambda folder: (folder / "lines.jsonl").write_text("\n"), "sources"),
}


def swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


@pytest.mark.parametrize("dedup", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_text_that_changes_between_the_passes_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, dedup: bool
) -> None:
    texts = [text[:300].ljust(300, ".") for text in TEXTS]
    folder = write_files(tmp_path / "in", [*texts, texts[0]])
    (folder / "lines.jsonl").write_text('{"text": "a"}\n')
    change, place = CHANGES[name]

    def changing(*arguments: object, **options: object) -> Survey:
        found = join_surveys(*arguments, **options)  # pyright: ignore
        change(folder)
        return found

    monkeypatch.setattr(passes, "join_surveys", changing)
    with pytest.raises(DataError, match=f"{place}.*: the text changed while it was read; run it again"):
        prepare([str(folder)], tmp_path / "out", vocab_size=300, dedup=dedup, workers=1, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_document_that_its_tokens_do_not_spell_is_refused_by_name(tmp_path: Path) -> None:
    """What no trial text shows: words that this tokenizer writes in another way."""
    folder = write_files(tmp_path / "in", TEXTS)
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    tokenizer.normalizer = normalizers.Replace("number 12", "No. 12")
    tokenizer.save(str(tmp_path / "t.json"))
    with pytest.raises(DataError, match=r"012.txt: its text does not come back.*'cafe␣number␣12.*'cafe␣No.␣12"):
        prepare([str(folder)], tmp_path / "out", tokenizer=tmp_path / "t.json", workers=1, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "t.json"]


def test_documents_that_a_normaliser_changed_are_counted(tmp_path: Path) -> None:
    """Their tokens spell the composed characters, whose bytes those of the tokens are."""
    folder = write_files(tmp_path / "in", [*TEXTS[:20], *DECOMPOSED[20:]])
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    two_passes(folder, tmp_path / "plain", tokenizer)
    assert count_changed(tmp_path / "plain", 1) == 0
    tokenizer.normalizer = normalizers.NFC()
    survey, parts = two_passes(folder, tmp_path / "nfc", tokenizer)
    assert count_changed(tmp_path / "nfc", len(parts)) == 40
    assert survey.holdout.cut is None
    assert sum(split.n_text_bytes for split in join_splits(tmp_path / "nfc", 1).values()) == survey.n_text_bytes
    tokenizer.save(str(tmp_path / "t.json"))
    options = {"tokenizer": tmp_path / "t.json", "validation_share": 0.2, "seed": 1, "progress": False}
    made = prepare([str(folder)], tmp_path / "out", **options)
    assert made.source.endswith(", 40 documents changed by the tokenizer's normaliser")
    found = documents_of(made)
    assert sorted(found["train"] + found["validation"]) == sorted(TEXTS)
    n_bytes_E = token_bytes(tokenizer)
    spelled = [n_bytes_E[TokenStore(made, split).read(0, made.splits[split].n_tokens)].sum() for split in made.splits]
    assert sum(spelled) == sum(len(text.encode()) for text in TEXTS)
    assert sum(split.n_text_bytes for split in made.splits.values()) > sum(spelled)


@pytest.mark.parametrize("n_others", [0, 1, 5])
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_copies_of_the_document_that_is_cut_are_left_out(tmp_path: Path, n_others: int, kind: str) -> None:
    longest = "\n\n".join(f"paragraph {i} of the longest document" for i in range(60))
    texts = [*(f"other {i}" for i in range(n_others)), longest, "between", longest, longest]
    folder = tmp_path / "in"
    if kind == "txt":
        write_files(folder, texts)
    else:
        folder.mkdir()
        (folder / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    made = prepare([str(folder)], tmp_path / "out", vocab_size=300, progress=False)
    found = documents_of(made)
    (held_out,) = found["validation"]
    assert longest.endswith(held_out)
    assert held_out
    assert not [text for text in found["train"] if held_out in text]
    expected = [longest.removesuffix(held_out) if text == longest else text for text in dict.fromkeys(texts)]
    assert found["train"] == expected
    assert "2 duplicate documents left out" in made.source


@pytest.mark.parametrize("share", [0.5000001, 0.6, 0.99])
def test_more_than_half_is_not_held_out(tmp_path: Path, share: float) -> None:
    folder = write_files(tmp_path / "in", TEXTS)
    with pytest.raises(
        DataError, match=f"validation_share: {share} is no share to hold out; use a number above 0, at most 0.5"
    ):
        prepare([str(folder)], tmp_path / "out", vocab_size=300, validation_share=share, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("seed", range(4))
def test_half_is_held_out_by_hash(tmp_path: Path, seed: int) -> None:
    """Not the end of one document, where the hashes happen to hold out a little more than half."""
    folder = write_files(tmp_path / "in", TEXTS)
    options = {"vocab_size": 300, "validation_share": 0.5, "seed": seed, "progress": False}
    found = documents_of(prepare([str(folder)], tmp_path / "out", **options))
    assert sorted(found["train"] + found["validation"]) == sorted(TEXTS)
    assert 15 <= len(found["validation"]) <= 45
