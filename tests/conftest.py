"""One thread per process, asleep when idle, as tests share their cores; Triton in its interpreter without a GPU."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a kernel is defined, so before any import of ours


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--layout-report", type=Path, help="write how near every layout came to one rank, as JSON")


@pytest.fixture
def safe_to_fork() -> Iterator[None]:
    """A fork finalises no garbage of other tests: process groups wait for threads that it does not copy."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def roomy_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints of any size fit, for tests that ask about models which this machine's disk need not hold."""
    monkeypatch.setattr("transmamba.validate_run.BYTES_PER_PARAMETER", 0)
