"""A hundred million documents: opening them and reading at 90 % of an epoch is quick, small, and still verified."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from transmamba.data_pipeline.blocks import blocks_name, write_rows
from transmamba.data_pipeline.manifest import Manifest, Split, save_manifest
from transmamba.data_pipeline.shards import BLOCK_TOKENS, ShardWriter, Written, join_parts

N_DOCUMENTS = 100_000_000
SHARD_TOKENS = 16_777_216
MEAN_LENGTH = 600

PROBE = """
import json, resource, sys, time
import numpy as np
from pathlib import Path
from transmamba.data_pipeline.errors import DamagedData
from transmamba.data_pipeline.manifest import load_manifest
from transmamba.data_pipeline.mixture import Mixture
from transmamba.data_pipeline.stream import Stream
from transmamba.data_pipeline.tokens import TokenStore

def memory():
    return int(Path("/proc/self/smaps_rollup").read_text().split("Anonymous:")[1].split()[0]) / 1024

share, before, started = float(sys.argv[2]), memory(), time.perf_counter()
manifest = load_manifest(Path(sys.argv[1]))
opened = time.perf_counter()
stream = Stream(TokenStore(manifest, "train"), seq_len=2048, seed=1, shuffle_shards=16)
mixture = Mixture({"train": stream})
first = int(share * stream.n_windows)
try:
    mixture.rows(first, 64)
    damaged = None
except DamagedData as error:
    damaged = str(error)
batch_s, n_verified = time.perf_counter() - opened, np.count_nonzero(stream.store._verified)
record = {"documents": manifest.splits["train"].n_documents, "open_s": opened - started, "batch_s": batch_s}
print(json.dumps(record | {"MB": memory() - before, "verified": int(n_verified), "damaged": damaged}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One real shard under thousands of names, which costs the disk of one."""
    folder = tmp_path_factory.mktemp("large")
    draw = np.random.default_rng(1)
    writer = ShardWriter(folder, "part", dtype=np.dtype("<u2"), eod_id=0, shard_tokens=SHARD_TOKENS)
    for length in draw.exponential(MEAN_LENGTH, SHARD_TOKENS // MEAN_LENGTH).astype(int) + 2:
        document = draw.integers(1, 50_000, length, dtype=np.uint16)
        document[-1] = 0
        writer.add(document)
    written = writer.finish()
    kept = Written(written.shards[:1], written.rows[: written.shards[0].n_blocks], written.lengths)
    one = join_parts(folder, "train", [kept], n_text_bytes=1)
    n_shards = -(-N_DOCUMENTS // one.shards[0].n_documents)
    for i in range(1, n_shards):
        os.link(folder / "train-000000.tar", folder / f"train-{i:06d}.tar")
    shards = tuple(dataclasses.replace(one.shards[0], name=f"train-{i:06d}.tar") for i in range(n_shards))
    write_rows(folder / blocks_name("train"), np.tile(kept.rows, n_shards))
    train = Split(shards, n_shards * one.n_tokens, n_shards * one.n_documents, 1, one.lengths, None)
    validation = join_parts(folder, "validation", [], n_text_bytes=0)
    os.link(folder / "train-000000.tar", folder / "validation-000000.tar")
    write_rows(folder / blocks_name("validation"), kept.rows)
    held = dataclasses.replace(one.shards[0], name="validation-000000.tar")
    validation = dataclasses.replace(validation, shards=(held,), n_tokens=held.n_tokens, n_documents=held.n_documents)
    (folder / "tokenizer.json").write_text("{}")
    digest = hashlib.sha256(b"{}").hexdigest()
    splits = {"train": train, "validation": validation}
    save_manifest(Manifest("tokenizer.json", digest, 50_000, 0, "<u2", BLOCK_TOKENS, "test", splits), folder)
    return folder


def probe(folder: Path, share: float) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", PROBE, folder, str(share)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_the_first_batch_comes_in_a_second_wherever_it_is(folder: Path) -> None:
    found = {share: probe(folder, share) for share in (0.0, 0.5, 0.9)}
    print("\n".join(f"{share:.0%} of the epoch: {record}" for share, record in found.items()))
    for record in found.values():
        assert record["documents"] >= N_DOCUMENTS
        assert record["damaged"] is None
        assert record["verified"] > 0
        assert record["MB"] <= 200
    assert min(record["open_s"] + record["batch_s"] for record in found.values()) <= 1
    assert found[0.9]["batch_s"] <= 2 * found[0.0]["batch_s"] + 0.3  # a share of the epoch would be hours


def test_a_damaged_block_far_out_is_found(folder: Path) -> None:
    path = folder / "train-000000.tar"
    data = bytearray(path.read_bytes())
    for offset in range(4096, len(data), 100_000):
        data[offset] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    assert "does not match its digest" in str(probe(folder, 0.9)["damaged"])
