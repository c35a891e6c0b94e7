"""A store that has answered before and is away is waited for, told about and not taken for a hang; then it goes on."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from tests.unit.data.corpora import numbered_documents, write_corpus
from tests.unit.data.remote_server import FaultyServer
from tests.unit.data.test_exactly_once import one_rank_of, settings_of, tokens_of
from transmamba import batches, prefetch, session
from transmamba import corpus as opening
from transmamba.batches import Batches
from transmamba.compose import load
from transmamba.data_pipeline import crew, remote
from transmamba.data_pipeline.errors import DamagedData, DataError
from transmamba.data_pipeline.folder import PreparedFolder
from transmamba.data_pipeline.manifest import Manifest
from transmamba.data_pipeline.mixture import Mixture
from transmamba.data_pipeline.remote import Patience, Unreachable
from transmamba.data_pipeline.remote_shards import RemoteFiles, open_remote
from transmamba.data_pipeline.shard_cache import Cache
from transmamba.data_pipeline.stream import Stream
from transmamba.data_pipeline.tokens import TokenStore
from transmamba.errors import EXIT_CONFIG, EXIT_DATA, EXIT_HANG, RunError
from transmamba.prefetch import RowReader
from transmamba.validate_data import data_problems

LASTING = Patience(attempts=2, first_pause_s=0.05, longest_pause_s=0.05, outage_s=60.0)
pytestmark = pytest.mark.usefixtures("safe_to_fork", "nothing_known")
ROWS: dict[str, Any] = {"global_batch": 4, "first_row": 0, "n_rows": 4}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Ten shards of three blocks."""
    folder = tmp_path_factory.mktemp("origin")
    return write_corpus(folder, numbered_documents([40] * 48), shard_tokens=192, block_tokens=64)


@pytest.fixture
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has read no manifest."""
    monkeypatch.setattr(remote, "_answered", set())


def opened(server: FaultyServer, folder: Path, patience: Patience = LASTING, **known: bool) -> PreparedFolder:
    url = server.url.replace("//", "//me:secret@")
    return PreparedFolder(*open_remote(url, Cache(folder, 1 << 30), patience, **known))


@contextlib.contextmanager
def away(server: FaultyServer, fault: str, seconds: float) -> Iterator[None]:
    """The store fails in one way until some seconds have passed."""
    server.away = fault
    timer = threading.Timer(seconds, setattr, (server, "away", ""))
    timer.start()
    yield
    timer.join()


@pytest.mark.parametrize("fault", ["503", "429", "401", "403", "reset", "page"])
def test_an_outage_in_mid_run_is_waited_for(
    fault: str, corpus: Manifest, server: FaultyServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, local = opened(server, tmp_path).store("train"), TokenStore(corpus, "train")
    assert np.array_equal(store.read(0, 100), local.read(0, 100))
    with away(server, fault, 1.0):
        # A shard, and the head of the one in which the last tokens lie.
        assert np.array_equal(store.read(200, 400), local.read(200, 400))
    lines = capsys.readouterr().err.splitlines()
    (told,) = [line for line in lines if "waiting for it, 0 of at most 60 s" in line]
    assert told.startswith(f"{server.url}/train-000001.tar: ")
    assert any(line.startswith(f"{server.url}/train-000001.tar: came after ") for line in lines)
    assert "secret" not in "".join(lines)
    # At most two attempts in every pause of 25 to 50 ms, and some at the beginning.
    assert server.asked["train-000001.tar"] < 100


def test_the_head_of_a_shard_is_waited_for_as_well(
    corpus: Manifest, server: FaultyServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, local = opened(server, tmp_path).store("train"), TokenStore(corpus, "train")
    store.read(0, 100)
    with away(server, "503", 0.5):
        assert np.array_equal(store.read(150, 200), local.read(150, 200))
    assert f"{server.url}/train-000001.tar: came after" in capsys.readouterr().err


def test_shards_that_were_missed_meanwhile_are_asked_for_again(
    corpus: Manifest, server: FaultyServer, tmp_path: Path
) -> None:
    store = opened(server, tmp_path).store("train")
    with away(server, "503", 0.8):
        store.expect([0, 1], [2, 3])
        time.sleep(0.4)
        store.read(0, 5)
    deadline = time.monotonic() + 10
    while len(list(tmp_path.glob("*-*/*.tar"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(list(tmp_path.glob("*-*/*.tar"))) == 4


@pytest.mark.parametrize("name", ["train-000001.tar", "head"])
def test_a_store_that_stays_away_ends_the_wait_with_a_code_that_is_started_again(
    name: str, server: FaultyServer, tmp_path: Path
) -> None:
    patience = Patience(attempts=2, first_pause_s=0.05, outage_s=0.5)
    store = opened(server, tmp_path, patience).store("train")
    store.read(0, 100)
    server.away = "503"
    began = time.monotonic()
    with pytest.raises(Unreachable, match=r"train-000001.tar: did not come for [01] s; cannot be fetched") as caught:
        store.read(*((150, 200) if name == "head" else (200, 210)))
    assert 0.5 < time.monotonic() - began < 10
    assert session._code_of(caught.value) == EXIT_HANG
    # It may have been the network here: nothing is lost when it comes back.
    server.away = ""
    store.read(0, 400)


def test_what_does_not_pass_is_said_at_once(server: FaultyServer, tmp_path: Path) -> None:
    store = opened(server, tmp_path).store("train")
    server.faults["train-000000.tar"] = ["404"] * 9
    with pytest.raises(DataError, match="no such file") as missing:
        store.read(0, 5)
    server.faults["train-000001.tar"] = ["flip"] * 9
    with pytest.raises(DamagedData, match="its SHA-256 is") as damaged:
        store.read(200, 205)
    assert [session._code_of(error.value) for error in (missing, damaged)] == [EXIT_CONFIG, EXIT_DATA]


@pytest.mark.parametrize("fault", ["403", "503"])
def test_the_first_start_refuses_quickly_and_a_continued_run_waits(
    fault: str, corpus: Manifest, server: FaultyServer, tmp_path: Path
) -> None:
    server.away = fault
    with pytest.raises(DataError) as caught:
        opened(server, tmp_path)
    assert not isinstance(caught.value, Unreachable)
    assert server.asked["manifest.json"] == (1 if fault == "403" else LASTING.attempts)
    with away(server, fault, 0.6):
        assert opened(server, tmp_path, is_known=True).manifest == corpus
    # And so does what opens it again in this process.
    with away(server, fault, 0.6):
        assert opened(server, tmp_path).manifest == corpus


def test_credentials_that_were_renewed_are_read_anew(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, calls = opened(server, tmp_path).store("train"), []
    connect = remote.connect

    def count(url: str) -> Any:
        calls.append(url)
        return connect(url)

    monkeypatch.setattr(remote, "connect", count)
    with away(server, "403", 0.3):
        store.read(0, 5)
    assert len(calls) > 1


def config_of(server: FaultyServer, folder: Path) -> Any:
    sizes = ("data.seq_len=8", "train.global_batch=4", "train.steps=2", "data.shuffle_shards=1")
    return load([f"data.path={server.url}", f"data.cache_dir={folder}/cache", f"run.dir={folder}/run", *sizes])


def test_a_run_with_a_checkpoint_is_valid_while_its_store_is_away_and_waits_when_it_opens_it(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "Patience", partial(Patience, attempts=2, first_pause_s=0.05))
    monkeypatch.setattr("transmamba.data_pipeline.remote_shards.Patience", lambda: Patience(2, 0.05))
    config = config_of(server, tmp_path)
    server.away = "503"
    assert [problem.key for problem in data_problems(config)] == ["data.path"]
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    for fault in ("503", "403"):
        server.away = fault
        assert list(data_problems(config)) == []
        with away(server, fault, 0.6):
            assert opening.open_corpus(config).n_tokens
        monkeypatch.setattr(remote, "_answered", set())


def mixture_of(store: TokenStore) -> Mixture:
    return Mixture({"only": Stream(store, seq_len=7, seed=3, shuffle_shards=1)})


def test_the_reading_process_waits_longer_than_the_limit_of_a_hang(
    corpus: Manifest, server: FaultyServer, tmp_path: Path
) -> None:
    near = RowReader(mixture_of(TokenStore(corpus, "train")), **ROWS)
    far = RowReader(mixture_of(opened(server, tmp_path).store("train")), **ROWS, ahead=1, limit_s=1.5)
    try:
        for step in range(12):
            if step == 4:
                server.away = "503"
                threading.Timer(4.0, setattr, (server, "away", "")).start()
            assert torch.equal(far.rows(step, step + 1).tokens_BT, near.rows(step, step + 1).tokens_BT)
    finally:
        far.close()
    assert not server.away


def test_a_reading_process_that_waits_for_something_else_hangs(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mixture, "rows", lambda self, first, count: time.sleep(600))
    reader = RowReader(mixture_of(opened(server, tmp_path).store("train")), **ROWS, ahead=1, limit_s=1.5)
    with pytest.raises(RunError, match=r"gave no answer for 1\.5 s") as caught:
        reader.rows(0, 1)
    assert caught.value.code == EXIT_HANG


def test_a_store_that_never_comes_back_ends_the_reading_process_by_its_name(
    server: FaultyServer, tmp_path: Path
) -> None:
    patience = Patience(attempts=2, first_pause_s=0.05, outage_s=0.5)
    reader = RowReader(mixture_of(opened(server, tmp_path, patience).store("train")), **ROWS, ahead=1, limit_s=20)
    server.away = "403"
    try:
        with pytest.raises(Unreachable, match=r"did not come for [01] s; access is refused|cannot be fetched"):
            reader.rows(0, 1)
    finally:
        reader.close()


def test_a_fetch_that_gives_no_sign_is_no_known_wait(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, signs = opened(server, tmp_path).files, []
    assert isinstance(files, RemoteFiles)
    files.call_on_wait(lambda: signs.append(1))
    server.slow_s = 2.5
    server.faults["train-000000.tar"] = ["silent"]
    store = TokenStore(cast(Any, opened(server, tmp_path).manifest), "train", files)
    store.read(0, 5)
    assert len(signs) >= 2
    signs.clear()
    monkeypatch.setattr(crew, "_SILENT_S", 0.0)
    server.faults["train-000001.tar"] = ["silent"]
    store.read(200, 205)
    assert not signs


def test_ranks_wait_together_and_all_give_signs_of_life(
    corpus: Manifest, server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks as threads that meet in a sum; the store fails for one of them alone."""
    beats: list[str] = []
    monkeypatch.setattr(batches, "sign_of_life", lambda: beats.append(threading.current_thread().name))
    barrier, parts = threading.Barrier(2), [torch.zeros(()), torch.zeros(())]

    def topology(rank: int) -> Any:
        def sum_all(values: torch.Tensor) -> torch.Tensor:
            parts[rank] = values
            barrier.wait(30)
            total = parts[0] + parts[1]
            barrier.wait(30)
            return total

        return SimpleNamespace(**vars(one_rank_of(2, rank)), sum_all=sum_all, is_first=rank == 0)

    near = [Batches(mixture_of(TokenStore(corpus, "train")), settings_of(4, 2, []), topology(r)) for r in (0, 1)]
    far = []
    for rank in (0, 1):
        mixture = mixture_of(opened(server, tmp_path / str(rank)).store("train"))
        far.append(Batches(mixture, settings_of(4, 2, [], ahead=1), topology(rank)))
    # One rank has all that there is, the other one nothing.
    store = far[0].mixture.streams["only"].store
    store.read(0, store.n_tokens)
    for shard in corpus.splits["train"].shards:
        store.files.path(shard)
    found: dict[int, Any] = {}

    def steps(rank: int) -> None:
        found[rank] = []
        for step in range(3):
            assert far[rank].ready(step, lambda: False)
            found[rank].append(tokens_of(far[rank].of_step(step, [0])))

    threads = [threading.Thread(target=steps, args=(rank,), name=f"rank{rank}") for rank in (0, 1)]
    with away(server, "503", 3.0):
        for batch in far:
            batch._reader._start(0)  # a process is begun where signals are handled
        for thread in threads:
            thread.start()
    for thread in threads:
        thread.join(30)
    for batch in far:
        batch.close()
    assert beats.count("rank0") >= 2
    assert beats.count("rank1") == beats.count("rank0")
    for rank in (0, 1):
        assert found[rank] == [tokens_of(near[rank].of_step(step, [0])) for step in range(3)]


def test_a_word_that_the_reader_waits_does_not_hold_for_ever(corpus: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = RowReader(mixture_of(TokenStore(corpus, "train")), **ROWS)._steps
    assert not steps.waits()
    steps._say_that_it_waits()
    assert steps.waits()
    monkeypatch.setattr(prefetch, "_WAITS_S", 0.0)
    assert not steps.waits()
