"""The tokenizer round-trips any text, and its byte counts are exact.

E vocabulary entries.
"""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from transmamba.data_pipeline import tokenizer as module
from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.tokenizer import (
    END_OF_TEXT,
    encode_documents,
    end_of_text_id,
    load_tokenizer,
    split_long_text,
    token_bytes,
    train_tokenizer,
    vocab_size_of,
)

TEXTS = [str(topic) for topic in pydoc_data.topics.topics.values()]
TOKENIZER = train_tokenizer(TEXTS, vocab_size=1024)
N_BYTES_E = token_bytes(TOKENIZER)


def test_training_twice_gives_the_same_tokenizer() -> None:
    assert train_tokenizer(TEXTS, vocab_size=1024).to_str() == TOKENIZER.to_str()
    assert vocab_size_of(TOKENIZER) == 1024
    assert end_of_text_id(TOKENIZER) == 0


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.text())
def test_any_text_comes_back_and_its_bytes_are_counted_exactly(text: str) -> None:
    (ids,) = encode_documents(TOKENIZER, [text], eod_id=0)
    assert ids[-1] == 0
    assert not (ids[:-1] == 0).any()
    assert TOKENIZER.decode(ids[:-1].tolist(), skip_special_tokens=False) == text
    assert N_BYTES_E[ids].sum() == len(text.encode("utf-8"))


def test_every_token_stands_for_as_many_bytes_as_it_decodes_to() -> None:
    assert N_BYTES_E.dtype == np.int32
    assert N_BYTES_E[0] == 0
    n_whole = 0
    for i in range(1, vocab_size_of(TOKENIZER)):
        text = TOKENIZER.decode([i])
        if "\ufffd" not in text:
            assert N_BYTES_E[i] == len(text.encode("utf-8"))
            n_whole += 1
    assert n_whole > 850


def test_text_that_spells_the_special_token_ends_no_document(tmp_path: Path) -> None:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    for tokenizer in (TOKENIZER, load_tokenizer(tmp_path)):
        (ids,) = encode_documents(tokenizer, [f"a{END_OF_TEXT}b"], eod_id=0)
        assert (ids == 0).tolist() == [False] * (len(ids) - 1) + [True]
        assert token_bytes(tokenizer)[ids].sum() == len(f"a{END_OF_TEXT}b")


def test_a_long_text_cut_into_pieces_has_the_tokens_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n \n".join(TEXTS)
    (whole,) = encode_documents(TOKENIZER, [text], eod_id=0)
    monkeypatch.setattr(module, "PIECE_CHARS", 100)
    assert len(split_long_text(text)) > 1000
    assert "".join(split_long_text(text)) == text
    (pieces,) = encode_documents(TOKENIZER, [text], eod_id=0)
    assert np.array_equal(pieces, whole)


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"model": {"type": "Nothing"}}'])
def test_a_missing_or_broken_tokenizer_is_refused_by_name(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=r"tokenizer.json: (no such tokenizer file|not a tokenizer)"):
        load_tokenizer(path)


def test_a_tokenizer_without_the_end_token_or_without_bytes_is_refused() -> None:
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(["a b c"], trainers.WordLevelTrainer(special_tokens=["<unk>"]))
    with pytest.raises(DataError, match=r"no special token '<\|endoftext\|>'.*it has: <unk>"):
        end_of_text_id(words)
    with pytest.raises(DataError, match="not a byte-level tokenizer"):
        token_bytes(words)
    assert end_of_text_id(words, "<unk>") == 0


def test_a_vocabulary_that_cannot_hold_the_bytes_is_refused() -> None:
    with pytest.raises(DataError, match="256 is too small; use 257 or more"):
        train_tokenizer(TEXTS, vocab_size=256)
