"""A tokenizer that loses text is refused; one that keeps it is taken, whatever its tokens are made of.

E vocabulary entries.
"""

from __future__ import annotations

import json
import pydoc_data.topics
import string
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from transmamba.data_pipeline import tokenizer as module
from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.prepare import prepare
from transmamba.data_pipeline.spelling import Spelling, check_reversible
from transmamba.data_pipeline.tokenizer import (
    END_OF_TEXT,
    encode_documents,
    end_of_text_id,
    load_tokenizer,
    token_bytes,
)
from transmamba.data_pipeline.tokens import TokenStore
from transmamba.data_pipeline.vocabulary import import_tokenizer

TEXTS = [str(topic) for topic in pydoc_data.topics.topics.values()][:30]
SPACE = "\u2581"
# A character beside its accents, and one whose composed form is another character.
DECOMPOSED = "re\u0301sume\u0301 of 10 k\u2126"


def bpe(texts: list[str] = TEXTS, **options: Any) -> Tokenizer:
    """A byte-level BPE without a normaliser, as `train_tokenizer` makes it but for the options of its trainer."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "special_tokens": [END_OF_TEXT]} | options
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, show_progress=False, **options))
    return made


def with_normalizer(normalizer: normalizers.Normalizer) -> Tokenizer:
    made = bpe()
    made.normalizer = normalizer
    return made


def with_words(words: pre_tokenizers.PreTokenizer) -> Tokenizer:
    made = bpe()
    made.pre_tokenizer = words
    return made


def with_token(made: Tokenizer, *contents: str, **options: bool) -> Tokenizer:
    made.add_tokens([AddedToken(content, **options) for content in contents])
    return made


def sentencepiece(*, style: str = "llama", model: str = "bpe", n_missing: int = 0) -> Tokenizer:
    """Tokens of characters with a mark for spaces, and of the bytes of all others: what SentencePiece is exported to.

    Styles: "llama" puts a mark before every text, "metaspace" before texts that have none, "plain" never; that one
    joins tokens over line breaks.
    """
    specials = ["<unk>", "<s>", END_OF_TEXT]
    letters = [*string.ascii_lowercase, SPACE, *(["\n"] if style == "plain" else [])]
    pairs = [(SPACE, "t"), ("t", "h"), (f"{SPACE}t", "h"), ("i", "n"), *([("\n", "t")] if style == "plain" else [])]
    tokens_of_bytes = [f"<0x{byte:02X}>" for byte in range(n_missing, 256)]
    tokens = [*specials, *tokens_of_bytes, *letters, *("".join(pair) for pair in pairs)]
    if model == "bpe":
        vocab = {token: i for i, token in enumerate(tokens)}
        made = Tokenizer(models.BPE(vocab, pairs, unk_token=specials[0], fuse_unk=True, byte_fallback=True))
    else:
        made = Tokenizer(models.Unigram([(token, -1.0 - i) for i, token in enumerate(tokens)], 0, byte_fallback=True))
    if style == "metaspace":
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        steps = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first", split=False)]
    else:
        start = [normalizers.Prepend(SPACE)] if style == "llama" else []
        made.normalizer = normalizers.Sequence([*start, normalizers.Replace(" ", SPACE)])
        end = [decoders.Strip(" ", 1, 0)] if style == "llama" else []
        steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *end]
    made.decoder = decoders.Sequence(steps)  # pyright: ignore
    made.add_special_tokens(specials)
    return made


def loaded(made: Tokenizer, folder: Path) -> Tokenizer:
    made.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def joined_words() -> Tokenizer:
    made = bpe()
    made.decoder = decoders.WordPiece()
    return made


def without_fuse() -> Tokenizer:
    """Takes the space before every token away, not only the first."""
    made = sentencepiece()
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Strip(" ", 1, 0)])
    return made


LOSSY: dict[str, tuple[Callable[[], Tokenizer], str]] = {
    "white space cut off words": (
        lambda: with_words(pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), bpe().pre_tokenizer])),  # pyright: ignore
        "does not come back from its tokens",
    ),
    "white space made one": (lambda: with_normalizer(normalizers.Replace(Regex(r"\s+"), " ")), "does not come back"),
    "lower case": (lambda: with_normalizer(normalizers.Lowercase()), "does not come back"),
    "compatibility characters": (lambda: with_normalizer(normalizers.NFKC()), "does not come back"),
    "accents": (
        lambda: with_normalizer(normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])),
        "does not come back",
    ),
    "ends": (lambda: with_normalizer(normalizers.Strip()), "does not come back"),
    "white space beside a token": (
        lambda: with_token(bpe(), "the", lstrip=True, rstrip=True),
        'beside its token \'the\': .*or its "lstrip" and "rstrip" to false',
    ),
    "bytes": (
        lambda: bpe([text.replace("Q", "") for text in TEXTS], initial_alphabet=[]),
        r"no token for \d+ of the bytes of text \(first: 0x00\); train it with all 256 bytes",
    ),
    "unknown characters": (
        lambda: bpe(initial_alphabet=[], special_tokens=[END_OF_TEXT, "<unk>"]),
        "no token for .* of the bytes",
    ),
    "bytes of fallback": (lambda: sentencepiece(n_missing=200), "no token for .* of the bytes"),
    "text that spells a byte": (lambda: sentencepiece(model="unigram"), "does not come back .*<0x"),
    "a space after every token that was added": (
        lambda: with_token(sentencepiece(), "<x>"),
        "beside its token '<x>': .*set its \"special\" to true",
    ),
    "spaces when it is decoded": (without_fuse, "does not come back"),
    "joined words": (joined_words, "not a byte-level tokenizer"),
}


@pytest.mark.parametrize("name", LOSSY)
def test_a_tokenizer_that_loses_text_is_refused(tmp_path: Path, name: str) -> None:
    make, message = LOSSY[name]
    with pytest.raises(DataError, match=message) as raised:
        check_reversible(loaded(make(), tmp_path))
    assert "\n" not in str(raised.value)
    with pytest.raises(DataError, match=message):
        import_tokenizer(tmp_path, tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


KEPT: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": bpe,
    "with nfc": lambda: with_normalizer(normalizers.NFC()),
    "space before": lambda: with_words(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "added tokens, nfc": lambda: with_token(with_normalizer(normalizers.NFC()), "the", "    ", "\n\n", "<x>", "漢"),
    "llama": sentencepiece,
    "metaspace": lambda: sentencepiece(style="metaspace"),
    "plain": lambda: sentencepiece(style="plain"),
    "plain with added tokens": lambda: with_token(sentencepiece(style="plain"), SPACE * 2, "\n\n", normalized=False),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_tokenizer_that_keeps_text_is_taken_and_its_bytes_are_exact(tmp_path: Path, name: str) -> None:
    tokenizer = loaded(KEPT[name](), tmp_path)
    check_reversible(tokenizer)
    spelling, n_bytes_E, eod_id = Spelling(tokenizer), token_bytes(tokenizer), end_of_text_id(tokenizer)
    starts_with_space = name in ("space before", "llama", "metaspace")

    @settings(max_examples=150, derandomize=True, deadline=None)
    @given(st.text(st.characters(exclude_characters=SPACE, exclude_categories=["Cs"])))
    def check(text: str) -> None:
        (ids,) = encode_documents(tokenizer, [text], eod_id=eod_id)
        data = text.encode("utf-8")
        is_kept = spelling.is_kept(ids, data, name="x")
        if "nfc" in name:
            assert is_kept == unicodedata.is_normalized("NFC", text)
            data = unicodedata.normalize("NFC", text).encode("utf-8")
        else:
            assert is_kept
        surplus = int(n_bytes_E[ids].sum()) - len(data)
        assert surplus == int(starts_with_space and bool(text) and (name == "llama" or text[0] != " "))

    check()


def test_a_document_changed_by_a_normaliser_is_told_from_one_that_lost_text(tmp_path: Path) -> None:
    tokenizer = loaded(with_normalizer(normalizers.NFC()), tmp_path)
    spelling = Spelling(tokenizer)
    (ids,) = encode_documents(tokenizer, [DECOMPOSED], eod_id=0)
    assert not spelling.is_kept(ids, DECOMPOSED.encode(), name="x")
    assert spelling.is_kept(ids, unicodedata.normalize("NFC", DECOMPOSED).encode(), name="x")
    for other in (f"{DECOMPOSED}!", DECOMPOSED[1:], DECOMPOSED.upper(), DECOMPOSED.replace(" ", "  ", 1), "", "\n"):
        with pytest.raises(DataError, match=r"^x: its text does not come back from its tokens"):
            spelling.is_kept(ids, other.encode(), name="x")


def test_the_mark_of_spaces_is_a_space_afterwards(tmp_path: Path) -> None:
    """SentencePiece cannot tell them apart: such a text is counted as changed, and the byte-level keep it."""
    text = f"a{SPACE}b c"
    for make, is_kept in ((sentencepiece, False), (bpe, True)):
        tokenizer = loaded(make(), tmp_path)
        (ids,) = encode_documents(tokenizer, [text], eod_id=end_of_text_id(tokenizer))
        assert Spelling(tokenizer).is_kept(ids, text.encode(), name="x") == is_kept


def test_a_llama_tokenizer_has_the_tokens_and_the_bytes_that_are_expected(tmp_path: Path) -> None:
    tokenizer = loaded(sentencepiece(), tmp_path)
    (ids,) = encode_documents(tokenizer, ["the thin\n é"], eod_id=2)
    tokens = [f"{SPACE}th", "e", f"{SPACE}th", "in", "<0x0A>", SPACE, "<0xC3>", "<0xA9>", END_OF_TEXT]
    assert [tokenizer.id_to_token(int(i)) for i in ids] == tokens
    assert token_bytes(tokenizer)[ids].tolist() == [3, 1, 3, 2, 1, 1, 1, 1, 0]
    assert tokenizer.decode(ids.tolist()) == "the thin\n é"


@pytest.mark.parametrize("name", KEPT)
def test_a_long_text_has_the_tokens_that_it_has_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    tokenizer = loaded(KEPT[name](), tmp_path)
    text = "\n".join(TEXTS)[:30_000]
    (whole,) = encode_documents(tokenizer, [text], eod_id=end_of_text_id(tokenizer))
    monkeypatch.setattr(module, "PIECE_CHARS", 100)
    (pieces,) = encode_documents(tokenizer, [text], eod_id=end_of_text_id(tokenizer))
    assert np.array_equal(pieces, whole)


def test_a_tokenizer_that_draws_lots_is_told_not_to(tmp_path: Path) -> None:
    plain = loaded(bpe(), tmp_path)
    record = json.loads((tmp_path / "tokenizer.json").read_text())
    record["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(record))
    found = load_tokenizer(tmp_path)
    assert found.to_str() == plain.to_str()
    assert found.encode(TEXTS[0]).ids == plain.encode(TEXTS[0]).ids


@pytest.mark.parametrize("style", ["llama", "metaspace", "plain"])
def test_text_is_prepared_with_it_and_comes_back(tmp_path: Path, style: str) -> None:
    sentencepiece(style=style).save(str(tmp_path / "t.json"))
    # The last one longer than what byte-level text is cut into.
    texts = [*TEXTS, "\n".join(TEXTS * 3)[:60_000]]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "x.jsonl").write_text(lines)
    options = {"tokenizer": tmp_path / "t.json", "validation_share": 0.2, "progress": False}
    made = prepare([str(tmp_path / "x.jsonl")], tmp_path / "out", **options)
    tokenizer = load_tokenizer(made.tokenizer_path)
    stores = [TokenStore(made, split) for split in made.splits]
    tokens = np.concatenate([store.read(0, store.n_tokens) for store in stores])
    documents = np.split(tokens, np.flatnonzero(tokens == made.eod_id) + 1)[:-1]
    assert sorted(tokenizer.decode(ids[:-1].tolist()) for ids in documents) == sorted(texts)
    surplus = int(token_bytes(tokenizer)[tokens].sum()) - sum(len(text.encode()) for text in texts)
    assert surplus == (0 if style == "plain" else len(texts))


def test_tokens_of_characters_outside_the_alphabet_of_bytes_are_counted_as_they_are_decoded() -> None:
    made = bpe()
    made.add_tokens(["漢字"])
    (i,) = made.encode("漢字").ids
    assert token_bytes(made)[i] == len("漢字".encode())
