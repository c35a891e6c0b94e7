"""`data inspect` says of a folder what counting its tokens one by one gives, on 80 columns."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from rich.cells import cell_len
from tokenizers import Tokenizer
from typer.testing import CliRunner

from tests.unit.data.corpora import EOD, Documents, english, rows_of, write_corpus
from transmamba.cli import app
from transmamba.data_pipeline import census as module
from transmamba.data_pipeline.census import lines_of, take_census
from transmamba.data_pipeline.manifest import Manifest


@pytest.fixture(scope="module")
def text() -> tuple[Tokenizer, Documents]:
    return english()


@pytest.fixture
def manifest(tmp_path: Path, text: tuple[Tokenizer, Documents]) -> Manifest:
    tokenizer, documents = text
    return write_corpus(
        tmp_path / "data", documents, shard_tokens=20_000, block_tokens=2_000, dtype="<u2", tokenizer=tokenizer
    )


def test_counts_are_those_of_the_documents(manifest: Manifest, text: tuple[Tokenizer, Documents]) -> None:
    tokenizer, documents = text
    train = take_census(manifest, samples=4, progress=False).splits["train"]
    tokens = np.concatenate(documents)
    counts = Counter(tokens.tolist())
    shares = [count / len(tokens) for count in counts.values()]
    n_bytes = sum(len(tokenizer.decode(document[:-1].tolist()).encode()) for document in documents)
    assert (train.n_tokens, train.n_counted, train.n_documents) == (len(tokens), len(tokens), len(documents))
    assert train.n_used == len(counts)
    assert train.bytes_per_token == n_bytes / len(tokens)
    assert math.isclose(train.entropy, -sum(share * math.log(share) for share in shares), rel_tol=1e-12)
    assert [(token.id, token.share) for token in train.top] == [
        (i, counts[i] / len(tokens)) for i in sorted(counts, key=lambda i: (-counts[i], i))[:10]
    ]
    for length, (of_documents, of_tokens) in train.at_least.items():
        longer = [len(document) for document in documents if len(document) >= length]
        assert of_documents == len(longer) / len(documents)
        assert of_tokens == sum(longer) / len(tokens)
    texts = [tokenizer.decode(document[:-1].tolist()) for document in documents]
    assert len(set(train.samples)) == 4
    assert all(any(text.startswith(sample) for text in texts) for sample in train.samples)


def test_large_data_is_counted_in_pieces_at_even_distances(
    manifest: Manifest, text: tuple[Tokenizer, Documents], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PIECE", 1_000)
    whole = take_census(manifest, progress=False).splits["train"]
    assert whole.n_counted == whole.n_tokens
    monkeypatch.setattr(module, "_COUNTED", 4_000)
    some = take_census(manifest, progress=False).splits["train"]
    tokens = np.concatenate(text[1])
    firsts = [i * (len(tokens) - 1_000) // 3 for i in range(4)]
    taken = np.concatenate([tokens[first : first + 1_000] for first in firsts])
    assert some.n_counted == 4_000
    assert some.n_used == len(np.unique(taken))
    assert some.top[0].share == np.bincount(taken).max() / 4_000


def test_the_page_fits_80_columns_whatever_the_text(manifest: Manifest, tmp_path: Path) -> None:
    lines = list(lines_of(take_census(manifest, progress=False)))
    assert max(map(len, lines)) <= 80
    assert any("of tokens" in line and "█" in line for line in lines)
    wide = take_census(manifest, progress=False)
    train = wide.splits["train"]
    object.__setattr__(train, "samples", ("漢字\x1b[2J\r\n" * 200, "", "\ud800"))
    object.__setattr__(wide, "folder", "/x" * 200)
    lines = list(lines_of(wide))
    assert max(map(cell_len, lines)) <= 80
    assert all(line.isprintable() for line in lines)


def test_one_document_in_one_token_and_no_samples_are_fine(tmp_path: Path, text: tuple[Tokenizer, Documents]) -> None:
    only = [np.array([EOD])]
    census = take_census(
        write_corpus(tmp_path, only, dtype="<u2", tokenizer=text[0], shard_tokens=10, block_tokens=10),
        samples=0,
        progress=False,
    )
    assert census.splits["train"].entropy == 0.0
    assert census.splits["train"].samples == ()
    assert list(lines_of(census))


def test_a_sample_is_found_when_no_document_starts_near(tmp_path: Path, text: tuple[Tokenizer, Documents]) -> None:
    long = [np.concatenate([document[:-1] for document in text[1]] + [[EOD]])]
    manifest = write_corpus(tmp_path, long, dtype="<u2", tokenizer=text[0], shard_tokens=10_000, block_tokens=500)
    samples = take_census(manifest, samples=2, progress=False).splits["train"].samples
    assert samples == (text[0].decode(long[0][:160].tolist()),) * 2


def test_the_command_writes_json_and_a_picture(manifest: Manifest, tmp_path: Path) -> None:
    command = ["data", "inspect", str(manifest.folder), "--samples", "1"]
    png = tmp_path / "lengths.png"
    done = CliRunner().invoke(app, [*command, "--json", "--png", str(png)])
    assert done.exit_code == 0
    record = json.loads(done.stdout)
    assert record["splits"]["train"]["n_documents"] == 40
    assert len(record["splits"]["validation"]["samples"]) == 1
    assert len(np.unique(imread(png).reshape(-1, 4), axis=0)) > 20
    page = CliRunner().invoke(app, command)
    assert "bytes per token" in page.stdout
    refused = CliRunner().invoke(app, ["data", "inspect", str(tmp_path / "nothing")])
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert refused.stderr.startswith("transmamba: error: ")


def test_damage_and_a_picture_that_cannot_be_written_are_one_line(manifest: Manifest, tmp_path: Path) -> None:
    command = ["data", "inspect", str(manifest.folder)]
    done = CliRunner().invoke(app, [*command, "--png", str(tmp_path / "none" / "lengths.png")])
    assert done.exit_code == 2
    assert "lengths.png: cannot be written (No such file or directory). Fix: " in done.stderr
    shard = manifest.folder / "train-000001.tar"
    data = bytearray(shard.read_bytes())
    data[int(rows_of(manifest, 1)["tokens_offset"][1]) + 7] ^= 8
    shard.write_bytes(data)
    done = CliRunner().invoke(app, command)
    assert (done.exit_code, done.stdout) == (22, "")
    assert done.stderr.splitlines()[-1].startswith(f"transmamba: error: {shard}: the block at byte ")
