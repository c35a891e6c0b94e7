"""What is read is what was written, and damage is found before a token is used."""

from __future__ import annotations

import copy
import gzip
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.compat import WebDataset

from tests.unit.data.corpora import numbered_documents, rows_of, write_corpus, write_sealed
from transmamba.data_pipeline.blocks import ROW, blocks_name
from transmamba.data_pipeline.errors import DamagedData, DataError
from transmamba.data_pipeline.manifest import MANIFEST_NAME, Manifest, load_manifest
from transmamba.data_pipeline.tokens import TokenStore

MakeCorpus = Callable[..., Manifest]
LENGTHS = [5, 61, 2, 2, 90, 33, 7, 128, 40]


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize(("shard_tokens", "block_tokens"), [(64, 16), (100, 30), (7, 32), (10_000, 10_000)])
def test_any_range_reads_the_written_tokens_and_starts(
    tmp_path: Path, dtype: str, shard_tokens: int, block_tokens: int
) -> None:
    documents = numbered_documents(LENGTHS)
    manifest = write_corpus(
        tmp_path / "data", documents, shard_tokens=shard_tokens, block_tokens=block_tokens, dtype=dtype
    )
    store = TokenStore(manifest, "train")
    everything = np.concatenate(documents)
    starts = np.cumsum([0, *LENGTHS])[:-1]
    assert store.n_tokens == len(everything)
    assert store.read(0, store.n_tokens).dtype == np.dtype(dtype)
    draw = random.Random(1)
    for _ in range(300):
        low, high = sorted(draw.choices(range(store.n_tokens + 1), k=2))
        assert np.array_equal(store.read(low, high), everything[low:high])
        assert np.array_equal(store.starts(low, high), starts[(starts >= low) & (starts < high)])
    with pytest.raises(ValueError, match="outside"):
        store.read(0, store.n_tokens + 1)


@settings(max_examples=15, derandomize=True, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=10),
    shard_tokens=st.integers(1, 200),
    block_tokens=st.integers(1, 60),
)
def test_plain_webdataset_reads_the_same_tokens(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], shard_tokens: int, block_tokens: int
) -> None:
    folder = tmp_path_factory.mktemp("data")
    documents = numbered_documents(lengths)
    manifest = write_corpus(folder, documents, shard_tokens=shard_tokens, block_tokens=block_tokens)
    store = TokenStore(manifest, "train")
    urls = [str(folder / shard.name) for shard in manifest.splits["train"].shards]
    samples: list[dict[str, Any]] = list(WebDataset(urls, shardshuffle=False).decode())  # pyright: ignore[reportArgumentType]
    tokens = np.concatenate([sample["tokens.npy"] for sample in samples])
    firsts = np.cumsum([0, *(len(sample["tokens.npy"]) for sample in samples)])[:-1]
    starts = np.concatenate([sample["starts.npy"] + first for sample, first in zip(samples, firsts, strict=True)])
    assert np.array_equal(tokens, store.read(0, store.n_tokens))
    assert np.array_equal(tokens, np.concatenate(documents))
    assert np.array_equal(starts, store.starts(0, store.n_tokens))
    assert len({sample["__key__"] for sample in samples}) == len(samples)


def test_every_flipped_bit_is_found_before_a_token_is_used(make_corpus: MakeCorpus) -> None:
    manifest = make_corpus([40, 30, 50, 9])
    n_flips = n_found = first = 0
    for index, shard in enumerate(manifest.splits["train"].shards):
        path = manifest.folder / shard.name
        good = path.read_bytes()
        for offset, second, n_tokens, n_starts, _ in rows_of(manifest, index).tolist():
            for place in (*range(offset, offset + 4 * n_tokens), *range(second, second + 4 * n_starts)):
                bad = bytearray(good)
                bad[place] ^= 1 << (place % 8)
                path.write_bytes(bad)
                n_flips += 1
                with pytest.raises(DamagedData, match=rf"{shard.name}.*byte {offset} "):
                    TokenStore(manifest, "train").read(first, first + 1)
                n_found += 1
            first += n_tokens
        path.write_bytes(good)
    assert n_found == n_flips > 500
    store = TokenStore(manifest, "train")
    assert store.read(0, store.n_tokens).sum() == sum(range(1, 40 + 30 + 50 + 9 - 3))


def test_damage_in_one_block_leaves_the_others_readable(make_corpus: MakeCorpus) -> None:
    manifest = make_corpus([96, 96])
    offset = int(rows_of(manifest, 1)["tokens_offset"][1])
    path = _shard_path(manifest)
    data = bytearray(path.read_bytes())
    data[offset + 5] ^= 4
    path.write_bytes(data)
    store = TokenStore(manifest, "train")
    assert len(store.read(0, 96 + 32)) == 128
    assert len(store.read(96 + 64, 192)) == 32
    with pytest.raises(DamagedData, match=rf"byte {offset}"):
        store.read(0, 96 + 33)


def test_a_shard_cut_short_after_loading_is_damaged_data(make_corpus: MakeCorpus) -> None:
    manifest = make_corpus([96, 96])
    path = manifest.folder / manifest.splits["train"].shards[0].name
    for size in (0, 1, 700, 1701, path.stat().st_size // 2):
        os.truncate(path, size)
        with pytest.raises(DamagedData):
            TokenStore(manifest, "train").read(0, 96)


def test_a_row_of_the_table_that_lies_is_found_before_a_token_is_used(make_corpus: MakeCorpus) -> None:
    manifest = make_corpus([96, 96])
    table = manifest.folder / blocks_name("train")
    good = table.read_bytes()
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 8)
        table.write_bytes(bad)
        name = manifest.splits["train"].shards[place // (3 * ROW.itemsize)].name
        with pytest.raises(DamagedData, match=rf"train.blocks: the rows of {name} do not match"):
            TokenStore(manifest, "train").read(0, 192)


def _shard_path(manifest: Manifest) -> Path:
    return manifest.folder / manifest.splits["train"].shards[1].name


def _truncate(manifest: Manifest) -> None:
    os.truncate(_shard_path(manifest), 1000)


def _swap_for_gzip(manifest: Manifest) -> None:
    path = _shard_path(manifest)
    path.write_bytes(gzip.compress(path.read_bytes()).ljust(path.stat().st_size, b"\0"))


def _edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Manifest], None]:
    """A change by someone who seals the manifest again."""

    def edit(manifest: Manifest) -> None:
        record = json.loads((manifest.folder / MANIFEST_NAME).read_text())
        change(record)
        write_sealed(manifest.folder, record)

    return edit


def _cut_table(manifest: Manifest) -> None:
    os.truncate(manifest.folder / blocks_name("train"), 2 * ROW.itemsize)


def _shards(record: dict[str, Any]) -> list[dict[str, Any]]:
    return record["splits"]["train"]["shards"]


def test_a_folder_of_prepared_folders_is_told_their_first(tmp_path: Path) -> None:
    write_corpus(tmp_path / "mine", numbered_documents([40] * 4), shard_tokens=192, block_tokens=64)
    with pytest.raises(DataError, match=f"no such manifest; did you mean {tmp_path / 'mine'}, or make"):
        load_manifest(tmp_path)


FAULTS: dict[str, tuple[Callable[[Manifest], object], str]] = {
    "missing shard": (
        lambda m: _shard_path(m).unlink(),
        r"train-000001.tar: the shard is missing; .*prepare",
    ),
    "truncated shard": (_truncate, r"train-000001.tar: 1000 bytes instead of \d+.*copy it again"),
    "gzip under a tar's name": (_swap_for_gzip, r"train-000001.tar: not a tar file"),
    "no manifest": (
        lambda m: (m.folder / MANIFEST_NAME).unlink(),
        r"no such manifest; check the path; .* or make one with",
    ),
    "not JSON": (lambda m: (m.folder / MANIFEST_NAME).write_text("{"), r"manifest.json: cannot be read"),
    "not ours": (lambda m: (m.folder / MANIFEST_NAME).write_text("{}"), r"not a manifest of tokens"),
    "newer format": (
        _edit(lambda r: r.update(format_version=99)),
        r"format version 99, this program reads 2",
    ),
    "an edit without a new digest": (
        lambda m: (m.folder / MANIFEST_NAME).write_text((m.folder / MANIFEST_NAME).read_text().replace("test", "tset")),
        r"manifest.json: does not match its own digest",
    ),
    "table of blocks missing": (
        lambda m: (m.folder / blocks_name("train")).unlink(),
        r"train.blocks: the table .* missing",
    ),
    "table of blocks cut": (_cut_table, r"train.blocks: 80 bytes instead of \d+"),
    "field left out": (_edit(lambda r: r.pop("eod_id")), r"damaged \(TypeError.*eod_id"),
    "shard listed twice": (
        _edit(lambda r: _shards(r).append(_shards(r)[0])),
        r"lists train-000000.tar twice",
    ),
    "shard in both splits": (
        _edit(lambda r: _shards(r).append(r["splits"]["validation"]["shards"][0])),
        r"lists validation-000000.tar twice",
    ),
    "ids beyond the vocabulary": (
        _edit(lambda r: r.update(vocab_size=50)),
        r"token ids \d+ to \d+ with 50 in",
    ),
    "dtype too small": (_edit(lambda r: r.update(token_dtype="<u2")), r"100000 token ids do not fit.*<u2"),
    "no end-of-document id": (
        _edit(lambda r: r.update(eod_id=100_000)),
        r"end-of-document id 100000 is outside",
    ),
    "path out of the folder": (
        _edit(lambda r: _shards(r)[0].update(name="../train-000000.tar")),
        r"not a plain file name",
    ),
    "tokenizer gone": (lambda m: m.tokenizer_path.unlink(), r"tokenizer.json: the tokenizer .* is missing"),
    "tokenizer changed": (lambda m: m.tokenizer_path.write_text("[]"), r"tokenizer.json: does not match"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_at_loading_with_one_line_that_names_it(make_corpus: MakeCorpus, fault: str) -> None:
    manifest = make_corpus(LENGTHS)
    break_it, message = FAULTS[fault]
    break_it(manifest)
    with pytest.raises(DataError, match=message) as caught:
        load_manifest(manifest.folder)
    assert "\n" not in str(caught.value)
    assert caught.value.what
    assert caught.value.fix


def test_a_damaged_manifest_gives_an_error_or_the_same_tokens(make_corpus: MakeCorpus) -> None:
    manifest = make_corpus(LENGTHS)
    expected = np.concatenate(numbered_documents(LENGTHS))
    good = json.loads((manifest.folder / MANIFEST_NAME).read_text())
    draw = random.Random(2)
    n_refused = 0
    for _ in range(600):
        record = copy.deepcopy(good)
        node = record
        while True:
            key = draw.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if not isinstance(node[key], (dict, list)) or not node[key] or draw.random() < 0.1:
                break
            node = node[key]
        node[key] = draw.choice([None, -1, 3, 1 << 70, 0.5, "x", "", [], {}, True, [[1]], float("nan")])
        write_sealed(manifest.folder, record)
        try:
            store = TokenStore(load_manifest(manifest.folder), "train")
            tokens = store.read(0, store.n_tokens)
        except DataError:
            n_refused += 1
            continue
        assert np.array_equal(tokens, expected)
    assert n_refused > 300


def test_the_reading_side_imports_neither_torch_nor_webdataset() -> None:
    code = (
        "import sys, transmamba.data_pipeline.stream, transmamba.data_pipeline.manifest;"
        "bad = {'torch', 'webdataset', 'tokenizers', 'rich'} & set(sys.modules);"
        "sys.exit(repr(bad) if bad else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
