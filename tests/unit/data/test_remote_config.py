"""A configuration may name URLs wherever it may name folders; `verify` reads them, too."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

from tests.unit.data.corpora import numbered_documents, write_corpus
from tests.unit.data.remote_server import FaultyServer, serve
from transmamba.compose import load
from transmamba.config import Config
from transmamba.corpus import open_corpus
from transmamba.data_pipeline.errors import DamagedData, DataError
from transmamba.data_pipeline.manifest import Manifest
from transmamba.data_pipeline.remote import Patience
from transmamba.data_pipeline.remote_shards import bytes_in_order
from transmamba.data_pipeline.remote_verify import verify_remote
from transmamba.data_pipeline.tokens import TokenStore
from transmamba.validate_data import data_problems

QUICK = Patience(attempts=2, first_pause_s=0.005, longest_pause_s=0.01)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("origin")
    return write_corpus(folder, numbered_documents([40] * 20), shard_tokens=192, block_tokens=64)


@pytest.fixture(scope="module")
def held_long(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Validation shards that are far larger than those of training."""
    folder = tmp_path_factory.mktemp("long")
    documents = numbered_documents([40] * 60)
    manifest = write_corpus(folder, documents[:2], shard_tokens=64, block_tokens=64, held_out=documents[2:])
    return manifest


def config_of(url: str, cache: Path, *overrides: str) -> Config:
    sizes = ("data.seq_len=8", "train.global_batch=4", "train.steps=2")
    given = [override for override in overrides if override.startswith("data.path=")] or [f"data.path={url}"]
    rest = [override for override in overrides if override not in given]
    return load([*given, f"data.cache_dir={cache}", *sizes, *rest])


def test_a_run_reads_from_a_url_what_it_reads_from_the_folder(
    corpus: Manifest, server: FaultyServer, tmp_path: Path
) -> None:
    read = []
    for place in (server.url, str(corpus.folder)):
        config = config_of(place, tmp_path, "data.shuffle_shards=2")
        assert not [problem for problem in data_problems(config) if problem.key.startswith("data.path")]
        opened = open_corpus(config)
        read.append((opened.fingerprint(), opened.mixture(config).tokens(0, 100)))
    assert read[0][0] == read[1][0]
    assert np.array_equal(read[0][1], read[1][1])
    assert server.asked["train.blocks"] == server.asked["tokenizer.json"] == 1


@pytest.mark.parametrize(
    ("key", "override", "words", "fix"),
    [
        ("data.path", "data.path={url}/nothing", "no such file", "check the URL"),
        ("validation.sets.far", "+validation.sets.far={url}/nothing", "no such file", "check the URL"),
        ("data.path", "data.path=nowhere://x", "cannot be opened", "use a path or a URL"),
        (
            "data.cache_gib",
            "data.cache_gib=3e-5",
            "data.shuffle_shards=16 reads up to 6.79e-05 GiB of shards at a time",
            "use data.cache_gib=1, or data.shuffle_shards=1",
        ),
        (
            "data.cache_gib",
            "data.cache_gib=1e-6",
            "of shards at a time",
            "use data.cache_gib=1",
        ),
    ],
)
def test_a_url_that_cannot_be_used_is_a_problem_of_its_key(
    key: str, override: str, words: str, fix: str, server: FaultyServer, tmp_path: Path
) -> None:
    config = config_of(server.url, tmp_path, override.format(url=server.url))
    (problem,) = [problem for problem in data_problems(config) if problem.key == key]
    assert words in problem.problem
    assert problem.fix.startswith(fix)


def test_a_cache_that_validation_does_not_fit_into_is_refused_before_the_run(
    server: FaultyServer, held_long: Manifest, tmp_path: Path
) -> None:
    """Training needs two shards of one block, validation two of four."""
    with serve(held_long.folder) as far:
        needed = bytes_in_order(held_long, 2 * 8 + 1)
        config = config_of(far.url, tmp_path, "data.shuffle_shards=1", f"data.cache_gib={(needed - 1) / 2**30}")
        (problem,) = data_problems(config)
        assert (problem.key, problem.fix) == ("data.cache_gib", "use data.cache_gib=1")
        assert problem.problem.startswith("validation reads up to ")
        # The same set beside training data on disk, and a cache that it fits into.
        sets = ("data.shuffle_shards=1", f"+validation.sets.far={far.url}")
        own = config_of(str(held_long.folder), tmp_path, *sets, f"data.cache_gib={(needed - 1) / 2**30}")
        assert [problem.key for problem in data_problems(own)][-1:] == ["data.cache_gib"]
        config = config_of(far.url, tmp_path, "data.shuffle_shards=1", f"data.cache_gib={needed / 2**30}")
        assert list(data_problems(config)) == []
        near = TokenStore(held_long, "validation")
        stream = open_corpus(config).held_stream("validation", config)
        assert stream.n_sequential_windows > 100
        for first in range(0, stream.n_sequential_windows - 1, 2):
            windows = stream.sequential(first, 2)
            assert np.array_equal(windows.tokens_BT[0], near.read(8 * first, 8 * first + 9))
        # What every rank without windows of its own reads at the end.
        assert np.array_equal(stream.sequential(0, 1).tokens_BT[0], near.read(0, 9))


def test_a_shard_that_is_trained_on_and_validated_on_is_seen_whatever_its_names(tmp_path: Path) -> None:
    documents = numbered_documents([40] * 20)
    both = write_corpus(tmp_path / "both", documents, shard_tokens=192, block_tokens=64, held_out=documents)
    (problem,) = data_problems(config_of(str(both.folder), tmp_path))
    assert "validates on a shard that it trains on (train-000000.tar)" in problem.problem


def test_verify_says_no_damage_where_none_was_seen(server: FaultyServer, tmp_path: Path) -> None:
    for fault in ("403", "503"):
        server.faults["train-000001.tar"] = [fault] * 9
        server.faults["train-000002.tar"] = ["slow"]
        with (
            pytest.raises(DataError, match=r"access is refused|cannot be fetched") as caught,
            TemporaryDirectory(dir=tmp_path) as scratch,
        ):
            verify_remote(server.url, Path(scratch), patience=QUICK, progress=False)
        assert caught.value.what == f"{server.url}/train-000001.tar"
        assert not isinstance(caught.value, DamagedData)
        server.faults.clear()


def test_verify_names_every_shard_that_is_not_as_written(
    corpus: Manifest, server: FaultyServer, tmp_path: Path
) -> None:
    found = verify_remote(server.url, tmp_path, patience=QUICK, progress=False)
    assert (found.n_shards, found.faults) == (6, ())
    assert found.n_bytes == sum(os.path.getsize(path) for path in corpus.folder.glob("*.tar"))
    assert not list(tmp_path.glob("*-*/*.tar*"))
    server.faults["train-000001.tar"] = ["flip"] * 9
    server.faults["validation-000000.tar"] = ["404"] * 9
    found = verify_remote(server.url, tmp_path, patience=QUICK, progress=False)
    assert [fault.what for fault in found.faults] == [
        f"{server.url}/{name}" for name in ("train-000001.tar", "validation-000000.tar")
    ]
    assert "its SHA-256 is" in found.faults[0].problem
    assert found.faults[1].problem == "no such file"
