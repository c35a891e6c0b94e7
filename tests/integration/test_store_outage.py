"""Runs whose store of data goes away in their midst: they go on with the same windows, or end to be requeued."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.conftest import SMALL
from tests.unit.data.corpora import english, write_corpus
from tests.unit.data.remote_server import FaultyServer, serve
from transmamba.compose import load
from transmamba.corpus import ONLY
from transmamba.data_pipeline.manifest import Manifest
from transmamba.data_pipeline.mixture import Mixture
from transmamba.data_pipeline.stream import Stream
from transmamba.data_pipeline.tokens import TokenStore
from transmamba.errors import EXIT_DONE, EXIT_HANG, EXIT_STOPPED
from transmamba.ledger import audit

ROOT = Path(__file__).parents[2]
# The command with small constants: how long a store may be away, and how often it is asked.
COMMAND = """
import sys
from functools import partial
from transmamba import corpus, train
corpus.OUTAGE_S = float(sys.argv[1])
corpus.Patience = partial(corpus.Patience, attempts=2, first_pause_s=0.1)
sys.exit(train.main(sys.argv[2:]))
"""
# Of a hang, and how long the store is away: longer.
LIMIT_S, AWAY_S = 10.0, 13.0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Some twenty shards, of which a cache of 1e-4 GiB holds a few."""
    folder = tmp_path_factory.mktemp("origin")
    tokenizer, documents = english()
    sizes = {"shard_tokens": 3000, "block_tokens": 1000, "dtype": "<u2", "tokenizer": tokenizer}
    return write_corpus(folder, documents[3:], **sizes, held_out=documents[:3])


@pytest.fixture
def server(corpus: Manifest) -> Iterator[FaultyServer]:
    with serve(corpus.folder) as running:
        yield running


class Job:
    """A run of `n_ranks` processes in `folder` on the data at a place."""

    def __init__(self, folder: Path, place: str, n_ranks: int = 1, outage_s: float = 120.0, steps: int = 60):
        self.folder = folder
        self.said = folder.with_suffix(".txt")
        small = [text for text in SMALL if not text.startswith("checkpoint.every")]
        overrides = [*small, f"data.path={place}", f"data.cache_dir={folder}-cache", "data.cache_gib=1e-4"]
        overrides += ["data.shuffle_shards=1", "data.ledger=true", f"checkpoint.every={steps}", f"train.steps={steps}"]
        overrides += [f"run.dir={folder}", f"watchdog.limit_s={LIMIT_S}"]
        overrides += [f"validation.every={steps // 2}"] if n_ranks == 1 else []
        with socket.socket() as free, self.said.open("w") as output:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            free.close()
            self.ranks = [
                subprocess.Popen(
                    [sys.executable, "-c", COMMAND, str(outage_s), *overrides],
                    cwd=ROOT,
                    stderr=output,
                    stdout=output,
                    env=os.environ | self._environment(rank, n_ranks, port),
                )
                for rank in range(n_ranks)
            ]

    def _environment(self, rank: int, n_ranks: int, port: int) -> dict[str, str]:
        if n_ranks == 1:
            return {}
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n_ranks, "LOCAL_WORLD_SIZE": n_ranks}
        return {name: str(value) for name, value in names.items()} | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }

    def wait_until(self, condition: Callable[[], bool], patience_s: float = 120.0) -> None:
        """Until it holds; the ranks must live."""
        deadline = time.monotonic() + patience_s
        while not condition():
            assert time.monotonic() < deadline, self.said.read_text()
            assert all(rank.poll() is None for rank in self.ranks), self.said.read_text()
            time.sleep(0.05)

    def n_steps(self) -> int:
        """Steps that are done."""
        metrics = self.folder / "metrics.jsonl"
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    def codes(self) -> list[int]:
        """Exit codes of the ranks."""
        try:
            return [rank.wait(120) for rank in self.ranks]
        finally:
            for rank in self.ranks:
                rank.kill()


def go_away_and_come_back(server: FaultyServer, job: Job) -> None:
    """The store refuses everything in mid-run, from when it is missed on for longer than a hang may take."""
    job.wait_until(lambda: job.n_steps() >= 3)
    server.away = "503"
    job.wait_until(lambda: "waiting for it, 0 of" in job.said.read_text())
    n_steps = job.n_steps()
    time.sleep(AWAY_S)
    assert all(rank.poll() is None for rank in job.ranks), job.said.read_text()
    assert job.n_steps() < n_steps + 20
    server.away = ""


@pytest.mark.long
@pytest.mark.parametrize("n_ranks", [1, 2])
def test_a_run_waits_for_its_store_and_goes_on_with_the_same_windows(
    n_ranks: int, corpus: Manifest, server: FaultyServer, tmp_path: Path
) -> None:
    job = Job(tmp_path / "far", server.url, n_ranks)
    try:
        go_away_and_come_back(server, job)
    finally:
        codes = job.codes()
    assert codes == [EXIT_DONE] * n_ranks, job.said.read_text()
    assert "came after" in job.said.read_text()
    assert not (job.folder / "verdict.json").exists()
    local = Stream(TokenStore(corpus, "train"), seq_len=48, seed=load([]).seed, shuffle_shards=1)
    assert audit(job.folder, Mixture({ONLY: local}), 4) == (60, [])


@pytest.mark.parametrize("n_ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_run_that_waits_for_its_store_stops_and_saves_at_once_when_it_is_asked_to(
    n_ranks: int, server: FaultyServer, tmp_path: Path
) -> None:
    job = Job(tmp_path / "far", server.url, n_ranks, steps=1000)
    try:
        job.wait_until(lambda: job.n_steps() >= 3)
        server.away = "503"
        job.wait_until(lambda: "waiting for it, 0 of" in job.said.read_text())
        n_steps = -1
        while n_steps != job.n_steps():  # what was read ahead still comes
            n_steps = job.n_steps()
            time.sleep(2.0)
        job.ranks[-1].send_signal(signal.SIGTERM)
        asked = time.monotonic()
    finally:
        codes = job.codes()
    assert time.monotonic() - asked < 30
    assert codes == [EXIT_STOPPED] * n_ranks, job.said.read_text()
    assert (job.folder / "checkpoints" / f"step-{n_steps:08d}" / "manifest.json").exists()
    assert Path(json.loads((job.folder / "exit.json").read_text())["checkpoint"]).name == f"step-{n_steps:08d}"


def test_a_store_that_never_comes_back_ends_the_run_with_a_code_that_is_requeued(
    server: FaultyServer, tmp_path: Path
) -> None:
    job = Job(tmp_path / "far", server.url, outage_s=3.0, steps=1000)
    try:
        job.wait_until(lambda: job.n_steps() >= 3)
        server.away = "403"
    finally:
        codes = job.codes()
    assert codes == [EXIT_HANG], job.said.read_text()
    last = job.said.read_text().splitlines()[-1]
    assert last.startswith(f"transmamba: error: {server.url}/train-0000"), last
    assert " s; access is refused" in last or " s; cannot be fetched" in last
    assert json.loads((job.folder / "exit.json").read_text())["code"] == EXIT_HANG
