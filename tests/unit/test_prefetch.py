"""The reading process gives the same rows, outlives signals meant for the trainer, and is named when it fails."""

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.data.corpora import numbered_documents, write_corpus
from transmamba.data_pipeline.errors import DamagedData
from transmamba.data_pipeline.manifest import Manifest
from transmamba.data_pipeline.mixture import Mixture
from transmamba.data_pipeline.stream import Stream
from transmamba.data_pipeline.tokens import TokenStore
from transmamba.errors import EXIT_HANG, EXIT_RANK_DIED, RunError
from transmamba.prefetch import RowReader

SIZES = {"global_batch": 4, "first_row": 1, "n_rows": 3}


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return write_corpus(tmp_path, numbered_documents([61, 30, 90, 33, 128]), shard_tokens=96, block_tokens=32)


def mixture_of(manifest: Manifest) -> Mixture:
    return Mixture({"a": Stream(TokenStore(manifest, "train"), seq_len=8, seed=1, shuffle_shards="all")})


@contextmanager
def reading(manifest: Manifest, **options: Any) -> Iterator[RowReader]:
    reader = RowReader(mixture_of(manifest), **SIZES, **options)
    try:
        yield reader
    finally:
        reader.close()


def test_rows_read_ahead_are_those_read_at_once_also_after_jumps(manifest: Manifest) -> None:
    with reading(manifest) as direct, reading(manifest, ahead=3, limit_s=60) as ahead:
        for step, following in ((0, 1), (1, 2), (2, 7), (7, 8), (3, 4), (4, 5)):
            one, other = direct.rows(step, following), ahead.rows(step, following)
            assert torch.equal(one.tokens_BT, other.tokens_BT)
            assert torch.equal(one.weight_BT, other.weight_BT)
            assert [row.tolist() for row in one.starts] == [row.tolist() for row in other.starts]


def test_signals_meant_for_the_trainer_do_not_end_the_reader(manifest: Manifest) -> None:
    with reading(manifest, ahead=1, limit_s=60) as reader:
        reader.rows(0, 1)
        assert reader.process_id is not None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
            os.kill(reader.process_id, number)
        for step in range(1, 6):
            reader.rows(step, step + 1)


class Owner:
    """Part of a cycle; writes down who finalises it."""

    def __init__(self, file: Path):
        self.file, self.itself = file, self

    def __del__(self) -> None:
        self.file.write_text(str(os.getpid()))


def test_the_reader_finalises_nothing_of_the_trainers(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, rows = tmp_path / "finalised", Mixture.rows

    def collect_and_read(mixture: Mixture, first: int, count: int) -> object:
        gc.collect()
        return rows(mixture, first, count)

    monkeypatch.setattr(Mixture, "rows", collect_and_read)
    gc.disable()
    try:
        Owner(file)
        with reading(manifest, ahead=1, limit_s=60) as reader:
            reader.rows(0, 1)
        assert not file.exists()
    finally:
        gc.enable()
    gc.collect()
    assert file.read_text() == str(os.getpid())


def test_a_dead_reader_is_named_with_its_process_and_step(manifest: Manifest) -> None:
    with reading(manifest, ahead=1, limit_s=60) as reader:
        reader.rows(0, 1)
        pid = reader.process_id
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        words = rf"reader of rank 0 \(process {pid}\) died with exit code -9 at data step \d"
        with pytest.raises(RunError, match=words) as caught:
            for step in range(1, 9):  # what it had read ahead still comes
                reader.rows(step, step + 1)
    assert caught.value.code == EXIT_RANK_DIED


def test_a_blocked_reader_is_named_and_ended(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mixture, "rows", lambda self, first, count: time.sleep(600))
    with reading(manifest, ahead=1, limit_s=1.5) as reader:
        with pytest.raises(RunError, match=r"gave no answer for 1\.5 s at data step 0") as caught:
            reader.rows(0, 1)
        assert caught.value.code == EXIT_HANG
        assert reader.process_id is None


def test_an_error_of_the_reader_is_raised_and_shifts_no_step(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = Mixture.rows

    def fail_first(mixture: Mixture, first: int, count: int) -> object:
        if first < SIZES["global_batch"]:
            raise RuntimeError("can't start new thread")
        return rows(mixture, first, count)

    monkeypatch.setattr(Mixture, "rows", fail_first)
    with reading(manifest, ahead=2, limit_s=60) as reader, pytest.raises(RuntimeError, match="can't start new thread"):
        reader.rows(0, 1)


def test_damaged_data_is_damaged_data_from_the_reader_too(manifest: Manifest) -> None:
    path = manifest.folder / "train-000000.tar"
    data = bytearray(path.read_bytes())
    for byte in range(1600, len(data)):
        data[byte] ^= 1
    path.write_bytes(data)
    with reading(manifest, ahead=2, limit_s=60) as reader, pytest.raises(DamagedData, match=r"train-000000\.tar"):
        for step in range(12):
            reader.rows(step, step + 1)


def test_the_reader_ends_with_its_trainer(manifest: Manifest) -> None:
    code = (
        "import sys, time; from tests.unit.test_prefetch import *; from transmamba.data_pipeline.manifest import *;"
        "reader = RowReader(mixture_of(load_manifest(Path(sys.argv[1]))), **SIZES, ahead=1, limit_s=60);"
        "reader.rows(0, 1); print(reader.process_id, flush=True); time.sleep(600)"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code, str(manifest.folder)], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    with trainer:
        pid = int(trainer.stdout.readline())
        trainer.kill()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists() and "Z" not in _state(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists() or "Z" in _state(pid)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"
