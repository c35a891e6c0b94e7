"""Bad input of the commands that make data: exit code 2, one line with what, why and a fix, and nothing created."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from typer.testing import CliRunner

from transmamba.cli import app
from transmamba.data_pipeline.shards import BLOCK_TOKENS, ShardWriter
from transmamba.data_pipeline.tokenizer import train_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Good and bad input, and a folder to work in."""
    place = tmp_path / "in"
    place.mkdir()
    (place / "good.txt").write_text("some words\nand more\n" * 100)
    (place / "bad.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    (place / "half.jsonl").write_text('{"text": "a"}\n{"text": "b')
    (place / "latin.txt").write_bytes(b"caf\xe9")
    (place / "named.txt").write_bytes(gzip.compress(b"text"))
    (place / "cut.txt.gz").write_bytes(gzip.compress(b"text" * 1000)[:-4])
    (place / "blank.md").write_text(" \n")
    (place / "image.png").write_bytes(b"\x89PNG")
    parquet.write_table(pa.table({"body": ["a"]}), place / "x.parquet")
    (place / "broken.json").write_text("{")
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(["a b c"], trainers.WordLevelTrainer(special_tokens=["<unk>"]))
    words.save(str(place / "words.json"))
    train_tokenizer(["a b c"], vocab_size=257).save(str(place / "bytes.json"))
    (place / "remote").mkdir()
    (place / "remote" / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["t.T", None]}}))
    (place / "gone.txt").symlink_to("nowhere.txt")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "empty.txt.gz").write_bytes(b"")
    (place / "linked").symlink_to("../other")
    (place / "twice.jsonl").write_text('{"text": "a", "text": "b"}\n')
    return place


CASES = [
    (["goop.txt"], "goop.txt: no such file or folder. Fix: the nearest existing name is .*good.txt"),
    (["*.text"], "the pattern matches no file. Fix: quote it"),
    (["image.png"], "unknown kind of file '.png'. Fix: use .txt, .md, .jsonl, .parquet"),
    (
        ["bad.jsonl"],
        r"bad.jsonl:2: no text in field 'text' \(fields found: body\). Fix: name the text field",
    ),
    (["half.jsonl"], "half.jsonl:2: not JSON"),
    (["x.parquet"], r"no column 'text' \(columns found: body\). Fix: name the text column with --field"),
    (["good.txt", "latin.txt"], "latin.txt: not UTF-8 at byte offset 3. Fix: convert it"),
    (["named.txt"], "named.txt: holds packed data, not text"),
    (["cut.txt.gz"], "cut.txt.gz: its gzip data are damaged or cut off"),
    (["blank.md"], r"sources: no documents found \(1 are empty\)"),
    (["good.txt", "gone.txt"], "gone.txt: is a link to nowhere.txt, where nothing is. Fix: mount or fetch that"),
    (["linked"], "linked/empty.txt.gz: its gzip data are damaged or cut off .0 bytes.. Fix: copy it again"),
    (["good.txt", ""], "sources: '' names nothing. Fix: name files, folders, globs or URLs"),
    (["good.txt", "twice.jsonl"], "twice.jsonl:1: field 'text' is there 2 times. Fix: write the line with one of"),
    (["s4://bucket/x.txt"], "s4://bucket/x.txt: cannot be opened"),
    (["gs://bucket/x.txt"], "no package for gs:// is installed. Fix: run `pip install gcsfs`"),
    (["good.txt", "--tokenizer", "none.json"], "none.json: no such tokenizer file. Fix: give the tokenizer.json"),
    (["good.txt", "--tokenizer", "broken.json"], "broken.json: not a tokenizer"),
    (["good.txt", "--tokenizer", "words.json"], "tokenizer: not a byte-level tokenizer"),
    (["good.txt", "--tokenizer", "bytes.json", "--eod-token", "</s>"], "no special token '</s>'.*--eod-token"),
    (["good.txt", "--tokenizer", "remote"], "its tokenizer is code of its own .* never run. Fix: convert it"),
    (["good.txt", "--vocab-size", "100"], "vocab_size: 100 is too small. Fix: use 257 or more"),
    (
        ["good.txt", "--validation-share", "1"],
        "validation_share: 1.0 is no share to hold out. Fix: use a number",
    ),
    (["good.txt", "--workers", "0"], "workers: 0 is not positive. Fix: use 1 or more"),
    (["good.txt", "--block-tokens", "1"], "block_tokens: 1 is outside 1,024 to 16,777,216. Fix: use 131,072"),
    (["good.txt", "--out", "image.png"], "image.png: exists and is not a folder"),
    (["good.txt", "--out", "."], "is not empty and holds other files"),
]


@pytest.mark.parametrize(("arguments", "line"), CASES, ids=[" ".join(case[0]) for case in CASES])
def test_bad_input_is_refused_with_one_line_and_nothing_is_created(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], line: str
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.parent.rglob("*"))
    out = [] if "--out" in arguments else ["--out", "made"]
    result = CliRunner().invoke(app, ["data", "prepare", *arguments, *out])
    assert result.exit_code == 2
    (last,) = [said for said in result.output.splitlines() if ": done in " not in said]
    assert last.startswith("transmamba: error: ")
    assert re.search(line, last), last
    assert ". Fix: " in last
    assert sorted(folder.parent.rglob("*")) == before


def test_the_same_command_has_nothing_to_do_and_another_one_is_refused(folder: Path) -> None:
    command = ["data", "prepare", str(folder / "good.txt"), "--out", str(folder / "made"), "--workers", "1"]
    assert CliRunner().invoke(app, [*command, "--vocab-size", "300"]).exit_code == 0
    before = {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}
    again = CliRunner().invoke(app, [*command, "--vocab-size", "300"])
    assert again.exit_code == 0
    assert "is already there" in again.output
    assert "tokens/s" not in again.output
    other = CliRunner().invoke(app, [*command, "--vocab-size", "301"])
    assert other.exit_code == 2
    assert "made: holds data made with --vocab-size 300 instead of 301. Fix: choose another --out" in other.output
    assert {path: path.lstat().st_mtime_ns for path in folder.rglob("*")} == before
    assert CliRunner().invoke(app, [*command, "--vocab-size", "301", "--replace"]).exit_code == 0


def test_what_files_of_other_kinds_were_left_out_is_said(folder: Path) -> None:
    mixed = folder / "mixed"
    mixed.mkdir()
    for name in ("a.json", "b.json", "c.json", "d.png"):
        (mixed / name).touch()
    shutil.copyfile(folder / "good.txt", mixed / "good.txt")
    command = ["data", "prepare", str(mixed), "--out", str(folder / "made"), "--vocab-size", "300"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0
    assert "left out, as files of other kinds: 3 .json, 1 .png" in result.output
    assert "(4 files of other kinds skipped)" in result.output


def test_a_source_without_text_beside_others_is_refused(folder: Path) -> None:
    (folder / "mounted" / "nothing").mkdir(parents=True)
    sources = [str(folder / "good.txt"), str(folder / "mounted")]
    result = CliRunner().invoke(
        app, ["data", "prepare", *sources, "--out", str(folder / "made"), "--vocab-size", "300"]
    )
    assert result.exit_code == 2
    assert "mounted: no documents found. Fix: give files that end in .txt" in result.output
    assert not (folder / "made").exists()


def test_shards_are_little_larger_than_their_tokens(tmp_path: Path) -> None:
    """At most 2 % at the default block size, for ids of two bytes and documents of some 600 tokens."""
    draw = np.random.default_rng(1)
    writer = ShardWriter(tmp_path, "train", dtype=np.dtype("<u2"), eod_id=0, shard_tokens=2_000_000)
    for n_tokens in draw.geometric(1 / 600, size=6_000):
        writer.add(np.append(draw.integers(1, 50_000, n_tokens), 0))
    written = writer.finish()
    n_tokens = sum(shard.n_tokens for shard in written.shards)
    assert n_tokens > 20 * BLOCK_TOKENS
    assert sum((tmp_path / shard.name).stat().st_size for shard in written.shards) < 1.02 * 2 * n_tokens


def test_a_target_that_cannot_be_made_is_named(folder: Path) -> None:
    result = CliRunner().invoke(app, ["data", "prepare", str(folder / "good.txt"), "--out", "/proc/none/made"])
    assert result.exit_code == 2
    assert "/proc/none/made: cannot be made (No such file or directory). Fix: choose a folder that" in result.output
