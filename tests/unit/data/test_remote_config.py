"""A configuration may name URLs wherever it may name folders; `verify` reads them, too."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from tests.unit.data.corpora import numbered_documents, write_corpus
from tests.unit.data.remote_server import FaultyServer
from transmamba.compose import load
from transmamba.config import Config
from transmamba.corpus import open_corpus
from transmamba.data_pipeline.manifest import Manifest
from transmamba.data_pipeline.remote import Patience
from transmamba.data_pipeline.remote_verify import verify_remote
from transmamba.validate_data import data_problems

QUICK = Patience(attempts=2, first_pause_s=0.005, longest_pause_s=0.01)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("origin")
    return write_corpus(folder, numbered_documents([40] * 20), shard_tokens=192, block_tokens=64)


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
        ("data.cache_gib", "data.cache_gib=1e-5", "of shards at a time", "a smaller data.shuffle_shards"),
    ],
)
def test_a_url_that_cannot_be_used_is_a_problem_of_its_key(
    key: str, override: str, words: str, fix: str, server: FaultyServer, tmp_path: Path
) -> None:
    config = config_of(server.url, tmp_path, override.format(url=server.url))
    (problem,) = [problem for problem in data_problems(config) if problem.key == key]
    assert words in problem.problem
    assert fix in problem.fix


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
