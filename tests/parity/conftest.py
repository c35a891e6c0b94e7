"""One process group for the whole module: what a single process trains with."""

from collections.abc import Iterator

import pytest

from transmamba.config import ParallelConfig
from transmamba.parallel import topology as groups
from transmamba.parallel.topology import Topology


@pytest.fixture(scope="session")
def topology() -> Iterator[Topology]:
    yield groups.start(ParallelConfig())
    groups.stop()
