"""Tokenizers are trained on text, or made from the files of others with the same ids; nothing of theirs is run."""

from __future__ import annotations

import base64
import json
import pydoc_data.topics
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers
from typer.testing import CliRunner

from transmamba.cli import app
from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.tiktoken_table import PATTERNS, byte_letters, read_table
from transmamba.data_pipeline.tokenizer import (
    encode_documents,
    end_of_text_id,
    load_tokenizer,
    token_bytes,
    train_tokenizer,
    vocab_size_of,
)
from transmamba.data_pipeline.vocabulary import import_tokenizer, train_on

TEXTS = list(dict.fromkeys(str(topic) for topic in pydoc_data.topics.topics.values()))
TOKENIZER = train_tokenizer(TEXTS, vocab_size=1500)


def ranks_of(tokenizer: Tokenizer) -> dict[bytes, int]:
    """A table as tiktoken keeps it: the bytes of every token and its rank."""
    byte_of = {letter: byte for byte, letter in byte_letters().items()}
    vocab = sorted(tokenizer.get_vocab(with_added_tokens=False).items(), key=lambda entry: entry[1])
    tokens = [bytes(byte_of[letter] for letter in token) for token, i in vocab if i != 0]
    return {token: rank for rank, token in enumerate(tokens)}


def write_table(path: Path, ranks: dict[bytes, int]) -> Path:
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
    path.write_bytes(b"".join(lines))
    return path


def encode_by_rank(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's definition: as long as two neighbours join to a token, the first of the lowest rank are joined."""
    if word in ranks:
        return [ranks[word]]
    parts = [word[i : i + 1] for i in range(len(word))]
    while True:
        joined = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not joined:
            return [ranks[part] for part in parts]
        _, i = min(joined)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


RANKS = ranks_of(TOKENIZER)


def odd_texts() -> list[str]:
    generator = random.Random(1)
    letters = "abcdeE ABC  012\n\r\t'sSréß漢字🙂..//-_"
    return ["".join(generator.choices(letters, k=generator.randrange(1, 60))) for _ in range(2000)]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_table_encodes_as_its_definition_says(tmp_path: Path, pattern: str) -> None:
    table = write_table(tmp_path / "x.tiktoken", RANKS)
    tokenizer = import_tokenizer(table, tmp_path / "tokenizer.json", pattern=pattern)
    words_of = pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated")
    for text in [*odd_texts(), *TEXTS[:3]]:
        words = [word for word, _ in words_of.pre_tokenize_str(text)]
        assert "".join(words) == text
        expected = [i for word in words for i in encode_by_rank(word.encode("utf-8"), RANKS)]
        (ids,) = encode_documents(tokenizer, [text], eod_id=len(RANKS))
        assert ids.tolist() == [*expected, len(RANKS)]
        assert tokenizer.decode(expected) == text
    assert end_of_text_id(tokenizer) == len(RANKS)
    assert token_bytes(tokenizer).tolist() == [*map(len, RANKS), 0]
    assert load_tokenizer(tmp_path / "tokenizer.json").to_str() == tokenizer.to_str()


def test_words_are_cut_as_the_public_encodings_cut_them() -> None:
    """Known answers: what GPT-2, cl100k and o200k make of contractions, numbers, capitals and spaces."""
    text = "I'LL say hello'll   12345 camelCase\n\n  x/"
    expected = {
        "gpt2": ["I", "'", "LL", " say", " hello", "'ll", "  ", " 12345", " camelCase", "\n\n ", " x", "/"],
        "cl100k": ["I", "'LL", " say", " hello", "'ll", "  ", " ", "123", "45", " camelCase", "\n\n", " ", " x", "/"],
        "o200k": ["I'LL", " say", " hello'll", "  ", " ", "123", "45", " camel", "Case", "\n\n", " ", " x", "/"],
    }
    for name, words in expected.items():
        found = pre_tokenizers.Split(Regex(PATTERNS[name]), "isolated").pre_tokenize_str(text)
        assert [word for word, _ in found] == words
    in_library = pre_tokenizers.ByteLevel(add_prefix_space=False)
    gpt2 = pre_tokenizers.Split(Regex(PATTERNS["gpt2"]), "isolated")
    for text in odd_texts():
        spans = [span for _, span in in_library.pre_tokenize_str(text)]
        assert [span for _, span in gpt2.pre_tokenize_str(text)] == spans


def test_the_letters_of_bytes_are_those_of_the_library() -> None:
    letters = byte_letters()
    assert sorted(letters.values()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for text in ("az~ \n\x00¡¬\xad®ÿ", "漢"):
        ((word, _),) = words.pre_tokenize_str(text)
        assert word == "".join(letters[byte] for byte in text.encode("utf-8"))


def test_the_end_token_gets_the_id_of_the_public_tables(tmp_path: Path) -> None:
    for size, end in ((50_256, 50_256), (100_256, 100_257), (199_998, 199_999)):
        ranks = {bytes([i]): i for i in range(256)}
        ranks |= {b"%09d" % i: i for i in range(256, size)}
        tokenizer = read_table(write_table(tmp_path / "x.tiktoken", ranks), pattern=None, eod_token="<|endoftext|>")
        assert end_of_text_id(tokenizer) == end
        assert vocab_size_of(tokenizer) == end + 1
        assert np.count_nonzero(token_bytes(tokenizer)) == size


def test_other_files_keep_their_ids(tmp_path: Path) -> None:
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    for i, source in enumerate((tmp_path, tmp_path / "tokenizer.json")):
        made = import_tokenizer(source, tmp_path / f"{i}.json")
        assert made.encode(TEXTS[0]).ids == TOKENIZER.encode(TEXTS[0]).ids
        assert load_tokenizer(tmp_path / f"{i}.json").to_str() == made.to_str()


ZERO = base64.b64encode(b"\0") + b" 0\n"
BYTES = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.tiktoken", b"not a table\n", "x.tiktoken: neither a tiktoken table nor JSON"),
        ("x.tiktoken", ZERO + b"!!!! 1\n", "x.tiktoken:2: not a token in base64 and its rank"),
        ("x.tiktoken", ZERO + b"AQ== one\n", "x.tiktoken:2: not a token in base64 and its rank"),
        ("x.tiktoken", ZERO * 2, "x.tiktoken:2: the token is there twice"),
        ("x.tiktoken", ZERO + b"AQ== 0\n", "x.tiktoken: two tokens have the same rank"),
        ("x.tiktoken", ZERO, r"x.tiktoken: 255 of the 256 bytes are no token \(first: 0x01\)"),
        ("x.tiktoken", BYTES, "x.tiktoken: a table of 256 tokens does not say .*; add --pattern gpt2, cl100k, o200k"),
        ("x.model", b"\x0a\x0f\x0a\x05<unk>", "x.model: neither a tiktoken table nor JSON; convert it"),
        ("x.json", b"{", "x.json: not a tokenizer"),
        ("x.json", None, "x.json: no such tokenizer file"),
        ("tokenizer_config.json", b'{"auto_map": {"AutoTokenizer": ["a.B", null]}}', "is code of its own"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json: cannot be read"),
        ("tokenizer_config.json", b"{}", "tokenizer.json: no such tokenizer file"),
    ],
)
def test_broken_files_and_code_are_refused_by_name(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    if content is not None:
        (folder / name).write_bytes(content)
    source = folder if "config" in name else folder / name
    with pytest.raises(DataError, match=message):
        import_tokenizer(source, tmp_path / "out" / "tokenizer.json")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_missing_end_token_an_existing_target_and_a_useless_pattern_are_refused(tmp_path: Path) -> None:
    TOKENIZER.save(str(tmp_path / "x.json"))
    with pytest.raises(DataError, match=r"no special token '</s>' .*it has: <\|endoftext\|>"):
        import_tokenizer(tmp_path / "x.json", tmp_path / "y.json", eod_token="</s>")
    with pytest.raises(DataError, match=r"x.json: exists already"):
        import_tokenizer(tmp_path / "x.json", tmp_path / "x.json")
    with pytest.raises(DataError, match=r"--pattern: .*x.json is no tiktoken table; leave --pattern out"):
        import_tokenizer(tmp_path / "x.json", tmp_path / "y.json", pattern="gpt2")
    with pytest.raises(DataError, match=r"y.txt: not the name of a JSON file"):
        import_tokenizer(tmp_path / "x.json", tmp_path / "y.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_training_on_files_is_training_on_their_texts(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"body": text}) + "\n" for text in TEXTS)
    (tmp_path / "x.jsonl").write_text(lines)
    sources = [str(tmp_path / "x.jsonl")]
    made, rate = train_on(sources, tmp_path / "a.json", vocab_size=500, field="body", progress=False)
    assert json.loads(made.to_str())["model"] == json.loads(train_tokenizer(TEXTS, vocab_size=500).to_str())["model"]
    assert load_tokenizer(tmp_path / "a.json").to_str() == made.to_str()
    ids = encode_documents(made, TEXTS, eod_id=0)
    exact = sum(len(text.encode("utf-8")) for text in TEXTS) / sum(len(one) - 1 for one in ids)
    assert rate == pytest.approx(exact, rel=0.02)
    less, _ = train_on(sources, tmp_path / "b.json", vocab_size=500, field="body", sample_chars=20_000, progress=False)
    assert less.to_str() != made.to_str()
    for options, message in (
        ({"vocab_size": 9}, "vocab_size: 9 is too small"),
        ({"vocab_size": 500, "sample_chars": 0}, "sample_chars: 0 is not positive"),
        ({"vocab_size": 500, "field": "none"}, r"x.jsonl:1: no text in field 'none' \(fields found: body\)"),
    ):
        with pytest.raises(DataError, match=message):
            train_on(sources, tmp_path / "c.json", progress=False, **options)  # pyright: ignore
    assert not (tmp_path / "c.json").exists()


def test_the_commands_answer_with_the_next_one(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("\n".join(TEXTS[:5]))
    run = CliRunner().invoke
    trained = run(
        app, ["data", "tokenizer", "train", str(tmp_path), "--out", f"{tmp_path}/t.json", "--vocab-size", "300"]
    )
    assert trained.exit_code == 0, trained.output
    assert "300 entries" in trained.output
    assert f"--tokenizer {tmp_path}/t.json --out DIR" in trained.output
    table = write_table(tmp_path / "x.tiktoken", RANKS)
    command = ["data", "tokenizer", "import", str(table), "--out", f"{tmp_path}/i.json"]
    refused = run(app, command)
    assert refused.exit_code == 2
    assert refused.output.count("\n") == 1
    made = run(app, [*command, "--pattern", "o200k", "--eod-token", "<end>"])
    assert made.exit_code == 0, made.output
    assert f"documents end with <end> (id {len(RANKS)})" in made.output
    assert "--eod-token '<end>'" in made.output
