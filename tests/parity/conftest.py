"""One process group for the whole module: what a single process trains with."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from transmamba.config import ParallelConfig
from transmamba.parallel import topology as groups
from transmamba.parallel.topology import Topology


@pytest.fixture(scope="session")
def topology() -> Iterator[Topology]:
    yield groups.start(ParallelConfig())
    groups.stop()


@pytest.fixture(scope="session")
def layout_report(request: pytest.FixtureRequest) -> Iterator[dict[str, dict[str, Any]]]:
    """Rows to report, by layout; written where `--layout-report` says."""
    rows: dict[str, dict[str, Any]] = {}
    yield rows
    path = request.config.getoption("--layout-report")
    if path is not None:
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(before | rows, indent=1) + "\n")
