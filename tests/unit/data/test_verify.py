"""`data verify` names what is damaged, all of it, and trusts no recorded number that it can count itself."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.unit.data.corpora import EOD, numbered_documents, rows_of, write_corpus, write_sealed
from transmamba.cli import app
from transmamba.data_pipeline.blocks import block_digest, blocks_name, rows_digest
from transmamba.data_pipeline.errors import DamagedData, DataError
from transmamba.data_pipeline.manifest import MANIFEST_NAME, Manifest, load_manifest
from transmamba.data_pipeline.tokens import TokenStore
from transmamba.data_pipeline.verify import verify_folder

MakeCorpus = Callable[..., Manifest]
LENGTHS = [5, 61, 2, 2, 90, 33, 7, 128, 40]


def lines(folder: Path, workers: int = 2) -> list[str]:
    found = verify_folder(folder, workers=workers, progress=False)
    return [f"{Path(fault.what).name}: {fault.problem}" for fault in found.faults]


def flip(path: Path, place: int, bit: int = 2) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def reseal(manifest: Manifest, change: Callable[[np.ndarray, np.ndarray], object]) -> Manifest:
    """Change the tokens and starts of the first block, as a faulty writer would: every digest is that of the change."""
    row = rows_of(manifest, 0)[0]
    path = manifest.folder / "train-000000.tar"
    data = bytearray(path.read_bytes())
    tokens = np.frombuffer(data, "<u4", int(row["n_tokens"]), int(row["tokens_offset"]))
    starts = np.frombuffer(data, "<u4", int(row["n_starts"]), int(row["starts_offset"]))
    change(tokens, starts)
    path.write_bytes(data)
    table = manifest.folder / blocks_name("train")
    rows = np.concatenate([rows_of(manifest, i) for i in range(len(manifest.splits["train"].shards))])
    rows["digest"][0] = np.void(block_digest(tokens, starts))
    table.write_bytes(rows.tobytes())
    record = json.loads((manifest.folder / MANIFEST_NAME).read_text())
    shard = record["splits"]["train"]["shards"][0]
    shard["sha256"] = hashlib.sha256(data).hexdigest()
    shard["blocks_sha256"] = rows_digest(rows[: shard["n_blocks"]])
    write_sealed(manifest.folder, record)
    return load_manifest(manifest.folder)


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
@pytest.mark.parametrize(("shard_tokens", "block_tokens"), [(64, 16), (100, 30), (7, 32), (10_000, 10_000)])
@pytest.mark.parametrize("lengths", [LENGTHS, [200], [1, 1, 1], [16, 16, 32]])
def test_what_was_written_is_found_whole(
    tmp_path: Path, dtype: str, shard_tokens: int, block_tokens: int, lengths: list[int]
) -> None:
    documents = numbered_documents(lengths)
    write_corpus(tmp_path, documents, shard_tokens=shard_tokens, block_tokens=block_tokens, dtype=dtype)
    found = verify_folder(tmp_path, progress=False)
    assert found.faults == ()
    assert found.n_shards == len(list(tmp_path.glob("*.tar")))
    assert found.n_bytes == sum(path.stat().st_size for path in tmp_path.glob("*.tar"))


def test_a_damaged_block_is_named_with_its_bytes_and_all_damaged_shards_are_told(make_corpus: MakeCorpus) -> None:
    manifest = make_corpus(LENGTHS)
    row = rows_of(manifest, 1)[2]
    first, end = int(row["tokens_offset"]), int(row["tokens_offset"]) + 4 * int(row["n_tokens"])
    flip(manifest.folder / "train-000001.tar", first + 9)
    start = int(rows_of(manifest, 2)["starts_offset"][0])
    flip(manifest.folder / "train-000002.tar", start)
    os.truncate(manifest.folder / "train-000003.tar", 2000)
    (manifest.folder / "validation-000000.tar").unlink()
    found = lines(manifest.folder)
    assert len(found) == 4
    assert re.fullmatch(rf"train-000001.tar: block 2 \(bytes {first} to {end}\) or its starts .* digest", found[0])
    assert re.fullmatch(rf"train-000002.tar: block 0 .*its starts \(bytes {start} to {start + 8}\).* digest", found[1])
    assert re.fullmatch(r"train-000003.tar: 2000 bytes instead of \d+, block 1 \(.*\) is cut off, .*", found[2])
    assert found[3] == "validation-000000.tar: cannot be read (No such file or directory)"
    assert lines(manifest.folder, workers=1) == found


def test_any_byte_of_a_shard_counts_and_damage_between_the_blocks_is_named(make_corpus: MakeCorpus) -> None:
    manifest = make_corpus([40, 30], shard_tokens=64)
    path = manifest.folder / "train-000000.tar"
    good = path.read_bytes()
    told: set[str] = set()
    assert len(good) == 10_240
    for place in range(0, len(good), 17):
        bad = bytearray(good)
        bad[place] ^= 1 << (place % 8)
        path.write_bytes(bad)
        (fault,) = lines(manifest.folder, workers=1)
        assert fault.startswith("train-000000.tar: ")
        told.add(re.sub(r"\d+", "N", fault.split(": ", 1)[1].split(" (")[0]))
        if (within := re.search(r"header of block \d's \w+ at bytes (\d+) to (\d+)", fault)) is not None:
            assert int(within[1]) <= place < int(within[2])
    path.write_bytes(good)
    assert lines(manifest.folder) == []
    assert "does not match its SHA-N: a byte between its blocks has changed" not in told
    assert {fault.split(" at ")[0] for fault in told} >= {
        "block N", "the header of block N's tokens", "the header of block N's starts", "the end of the archive",
        "the padding",
    }  # fmt: skip


def test_a_damaged_table_is_named_with_its_rows(make_corpus: MakeCorpus) -> None:
    manifest = make_corpus(LENGTHS)
    flip(manifest.folder / "train.blocks", 40 * 3 + 5)
    assert lines(manifest.folder) == [
        "train.blocks: the rows of train-000001.tar (bytes 120 to 240) do not match their digest"
    ]
    flip(manifest.folder / "train-000001.tar", 600)
    assert len(lines(manifest.folder)) == 2
    (manifest.folder / "train.blocks").write_bytes(b"")
    (manifest.folder / "validation.blocks").unlink()
    assert [fault.split(" (")[0] for fault in lines(manifest.folder)] == [
        "train.blocks: 0 bytes instead of 480",
        "train-000001.tar: does not match its SHA-256: a byte somewhere has changed",
        "validation.blocks: the table of blocks cannot be read",
    ]


def test_a_shard_in_the_place_of_another_and_one_too_many_are_named(make_corpus: MakeCorpus) -> None:
    manifest = make_corpus([300] * 4)
    one, other = (manifest.folder / f"train-00000{i}.tar" for i in (1, 2))
    shutil.copy(one, manifest.folder / "train-000099.tar")
    assert lines(manifest.folder) == ["train-000099.tar: is not in the manifest"]
    (manifest.folder / "train-000099.tar").unlink()
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    assert [fault.split(": ")[0] for fault in lines(manifest.folder)] == ["train-000001.tar", "train-000002.tar"]


def _set_token(place: int, value: int) -> Callable[[np.ndarray, np.ndarray], object]:
    return lambda tokens, starts: tokens.__setitem__(place, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set_token(10, 99_999), r"train-000000.tar: token ids 0 to 99999 instead of 0 to \d+"),
        (_set_token(10, EOD), r"block 0 .*: documents do not start where the one before ends"),
        (_set_token(4, 77), r"block 0 .*: documents do not start where the one before ends"),
        (lambda tokens, starts: starts.__setitem__(1, 6), r"block 0 .*: documents do not start"),
    ],
    ids=["token-out-of-range", "end-inside", "end-missing", "start-elsewhere"],
)
def test_content_that_contradicts_the_record_is_found_though_every_digest_matches(
    make_corpus: MakeCorpus, change: Callable[[np.ndarray, np.ndarray], object], message: str
) -> None:
    manifest = reseal(make_corpus(LENGTHS), change)
    TokenStore(manifest, "train").read(0, 10)
    (fault,) = lines(manifest.folder)
    assert re.search(message, fault), fault


@pytest.mark.parametrize(
    ("lengths", "order", "message"),
    [
        ([200, 96, 64], [1, 0], "begins a document inside another|does not begin a document"),
        ([64, 100], [0], "its last document has no end"),
    ],
    ids=["shards-in-another-order", "last-shard-left-out"],
)
def test_documents_are_followed_from_shard_to_shard(
    make_corpus: MakeCorpus, lengths: list[int], order: list[int], message: str
) -> None:
    manifest = make_corpus(lengths)
    record = json.loads((manifest.folder / MANIFEST_NAME).read_text())
    split = record["splits"]["train"]
    rows = [rows_of(manifest, i) for i in order]
    split["shards"] = [split["shards"][i] for i in order]
    split["n_tokens"] = sum(shard["n_tokens"] for shard in split["shards"])
    (manifest.folder / blocks_name("train")).write_bytes(np.concatenate(rows).tobytes())
    write_sealed(manifest.folder, record)
    found = [fault for fault in lines(manifest.folder) if "not in the manifest" not in fault]
    assert any(re.search(message, fault) for fault in found), found


def _edit_split(record: dict[str, Any], **changes: Any) -> None:
    record["splits"]["train"].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: _edit_split(r, n_documents=1), "documents and lengths of train are not those of its shards"),
        (lambda r: r["splits"]["train"]["lengths"][0].__setitem__(1, 9), "documents and lengths of train"),
        (lambda r: r["splits"]["train"]["shards"][0].update(n_documents=9), "documents start in it instead of 9"),
        (lambda r: r["splits"]["train"]["shards"][0].update(max_token_id=9), "token ids 0 to .* instead of 0 to 9"),
        (lambda r: r["splits"]["train"]["shards"][1].update(sha256="0" * 64), "a byte between its blocks"),
    ],
    ids=["documents", "histogram", "documents-of-a-shard", "largest-id", "hash"],
)
def test_a_manifest_that_counts_wrong_is_found(
    make_corpus: MakeCorpus, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    manifest = make_corpus(LENGTHS)
    record = json.loads((manifest.folder / MANIFEST_NAME).read_text())
    change(record)
    write_sealed(manifest.folder, record)
    (fault,) = lines(manifest.folder)
    assert re.search(message, fault), fault


def test_no_or_a_damaged_manifest_ends_the_search(make_corpus: MakeCorpus) -> None:
    folder = make_corpus(LENGTHS).folder
    with pytest.raises(DataError, match="no such manifest"):
        verify_folder(folder / "nothing", progress=False)
    flip(folder / "tokenizer.json", 0, bit=0)
    with pytest.raises(DamagedData, match=r"tokenizer\.json"):
        verify_folder(folder, progress=False)


def test_the_command_prints_a_line_per_damaged_file_and_ends_with_22(make_corpus: MakeCorpus) -> None:
    manifest = make_corpus(LENGTHS)
    command = ["data", "verify", str(manifest.folder)]
    good = CliRunner().invoke(app, command)
    assert good.exit_code == 0
    assert re.search(r"[\d,]+ bytes in \d+ shards are as written", good.stdout)
    names = ("train-000000.tar", "train-000002.tar")
    for name in names:
        flip(manifest.folder / name, 1600)
    bad = CliRunner().invoke(app, command)
    assert bad.exit_code == 22
    told = [line for line in bad.stderr.splitlines() if line.startswith("transmamba: error: ")]
    assert [Path(line.split(": ")[2]).name for line in told] == list(names)
    assert all(re.fullmatch(r"transmamba: error: /.*: .*\. Fix: .*\.", line) for line in told)
    assert bad.stdout == ""
    assert CliRunner().invoke(app, ["data", "verify", str(manifest.folder / "none")]).exit_code == 2
