"""Small prepared folders made from given token documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.data.corpora import numbered_documents, write_corpus
from tests.unit.data.remote_server import FaultyServer, serve
from transmamba.data_pipeline.manifest import Manifest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--damage-report", type=Path, help="write what was read of damaged data, as JSON")


@pytest.fixture
def make_corpus(tmp_path: Path) -> Callable[..., Manifest]:
    """Writes a corpus of numbered documents into the test's folder."""

    def make(lengths: list[int], *, shard_tokens: int = 96, block_tokens: int = 32) -> Manifest:
        documents = numbered_documents(lengths)
        return write_corpus(tmp_path / "data", documents, shard_tokens=shard_tokens, block_tokens=block_tokens)

    return make


@pytest.fixture
def server(corpus: Manifest) -> Iterator[FaultyServer]:
    """Serves the module's `corpus`, with faults on request."""
    with serve(corpus.folder) as running:
        yield running
