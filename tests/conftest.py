"""One thread per process, asleep when idle: tests share their cores with each other."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--layout-report", type=Path, help="write how near every layout came to one rank, as JSON")
