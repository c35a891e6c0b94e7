"""Processes share a cache of limited size: a shard is fetched once, none goes while it is read, damage is noticed."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.unit.data.corpora import numbered_documents, rows_of, write_corpus
from tests.unit.data.remote_server import FaultyServer
from transmamba.data_pipeline import crew
from transmamba.data_pipeline.errors import DamagedData, DataError
from transmamba.data_pipeline.folder import PreparedFolder
from transmamba.data_pipeline.manifest import Manifest
from transmamba.data_pipeline.mixture import Mixture
from transmamba.data_pipeline.remote import Patience, RemoteFolder
from transmamba.data_pipeline.remote_shards import RemoteFiles, open_remote
from transmamba.data_pipeline.shard_cache import Cache
from transmamba.data_pipeline.stream import Stream
from transmamba.data_pipeline.tokens import TokenStore

QUICK = Patience(attempts=3, first_pause_s=0.005, longest_pause_s=0.01)
ROOMY = 1 << 30
# Forked as the trainer's reader is, while threads of the parent run.
FORK = multiprocessing.get_context("fork")
pytestmark = pytest.mark.usefixtures("safe_to_fork")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Ten shards of three blocks."""
    folder = tmp_path_factory.mktemp("origin")
    return write_corpus(folder, numbered_documents([40] * 48), shard_tokens=192, block_tokens=64)


def opened(server: FaultyServer, folder: Path, max_bytes: int = ROOMY) -> PreparedFolder:
    return PreparedFolder(*open_remote(server.url, Cache(folder, max_bytes), QUICK))


def files_of(folder: PreparedFolder) -> RemoteFiles:
    assert isinstance(folder.files, RemoteFiles)
    return folder.files


def mixture_of(store: TokenStore, shuffle_shards: int = 2) -> Mixture:
    return Mixture({"only": Stream(store, seq_len=7, seed=3, shuffle_shards=shuffle_shards)})


def copies(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.glob("*-*/*.tar*")}


def size_of(folder: Path) -> int:
    """Bytes of all copies, complete or on their way; threads go on meanwhile, so one that just arrived counts once."""
    sizes: dict[str, int] = {}
    with Cache(folder, 0).locked("room"):
        for path in sorted(folder.glob("*-*/*.tar*")):
            with contextlib.suppress(FileNotFoundError):
                name = re.sub(r"\.\d+\.part$", "", path.name)
                sizes[name] = max(path.stat().st_size, sizes.get(name, 0))
    return sum(sizes.values())


def group_bytes(corpus: Manifest, n_shards: int) -> int:
    """What so many shards need with the heads of their neighbours."""
    head = 64 * 4 + 8 * 512
    return n_shards * (max(shard.n_bytes for shard in corpus.splits["train"].shards) + head)


class Child(NamedTuple):
    """A forked process, and where to send it a line to go on."""

    process: Any
    go_on: Any
    answers: Any


@contextlib.contextmanager
def forked(task: Callable[[Callable[[], object]], object]) -> Iterator[Child]:
    """Run a task in a forked process; it gets a function that answers True and waits for the word to go on."""
    here, there = FORK.Pipe()

    def run() -> None:
        def pause() -> None:
            there.send(True)
            there.recv()

        there.send(task(pause))
        os._exit(0)

    process = FORK.Process(target=run, daemon=True)
    process.start()
    try:
        yield Child(process, lambda: here.send(None), lambda: here.recv() if here.poll(8) else None)
    finally:
        process.kill()
        process.join()


def test_shuffled_reading_over_epochs_equals_the_folder_within_the_limit(
    corpus: Manifest, server: FaultyServer, tmp_path: Path
) -> None:
    limit = group_bytes(corpus, 4)
    folder = opened(server, tmp_path, limit)
    far, near = mixture_of(folder.store("train")), mixture_of(TokenStore(corpus, "train"))
    n_windows = near.streams["only"].n_windows
    sizes = []
    for first in range(0, 3 * n_windows, 5):
        assert np.array_equal(far.tokens(first, 5), near.tokens(first, 5))
        sizes.append(size_of(tmp_path))
    assert max(sizes) <= limit
    assert max(sizes) > group_bytes(corpus, 2)
    n_shards = len(corpus.splits["train"].shards)
    assert sum(server.wholes[shard.name] for shard in corpus.splits["train"].shards) >= 2 * n_shards


def test_what_is_read_soon_comes_by_itself(corpus: Manifest, server: FaultyServer, tmp_path: Path) -> None:
    folder = opened(server, tmp_path)
    store = folder.store("train")
    store.expect([3, 1], [5])
    deadline = time.monotonic() + 10
    while len(list(tmp_path.glob("*-*/*.tar"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(copies(tmp_path)) == {f"train-00000{i}.tar" for i in (1, 3, 5)}
    assert sum(server.wholes[shard.name] for shard in corpus.splits["train"].shards) == 3


def test_what_a_reader_waits_for_goes_before_what_it_will_read(
    corpus: Manifest, server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "_N_THREADS", 1)
    shards = corpus.splits["train"].shards
    for shard in shards:
        server.faults[shard.name] = ["slow"]
    files = opened(server, tmp_path).files
    files.expect(shards[:3], shards[3:6])
    files.path(shards[5])
    assert shards[5].name in [name for name in server.asked if name.endswith(".tar")][:2]


def test_a_cache_too_small_for_what_is_read_at_a_time_is_one_line(
    corpus: Manifest, server: FaultyServer, tmp_path: Path
) -> None:
    store = opened(server, tmp_path, group_bytes(corpus, 4) - 1).store("train")
    words = "data.cache_gib: .* GiB do not hold the .* GiB read at a time; raise it, or use a smaller"
    with pytest.raises(DataError, match=words):
        store.expect([0, 1], [2, 3])
    store.expect([0, 1], [2])


def test_the_least_recently_used_copy_goes_first(corpus: Manifest, server: FaultyServer, tmp_path: Path) -> None:
    shards = corpus.splits["train"].shards
    folder = opened(server, tmp_path, 3 * shards[0].n_bytes + 1000)
    for i in (0, 1, 2, 0, 3):
        files_of(folder).expect([shards[i]], [])
        os.utime(folder.files.path(shards[i]), (i, time.time() + 1))
    assert set(copies(tmp_path)) == {shards[i].name for i in (0, 2, 3)}


def test_several_processes_fetch_each_shard_once(corpus: Manifest, server: FaultyServer, tmp_path: Path) -> None:
    def read(pause: Callable[[], object]) -> bool:
        store = opened(server, tmp_path).store("train")
        pause()
        mixture = mixture_of(store, shuffle_shards=10)
        return bool((mixture.tokens(0, 60) == mixture_of(TokenStore(corpus, "train"), 10).tokens(0, 60)).all())

    with contextlib.ExitStack() as stack:
        children = [stack.enter_context(forked(read)) for _ in range(4)]
        assert all(child.answers() for child in children)
        for child in children:
            child.go_on()
        assert all(child.answers() for child in children)
    assert {server.wholes[shard.name] for shard in corpus.splits["train"].shards} == {1}
    assert server.asked["tokenizer.json"] == server.asked["train.blocks"] == 1


def test_a_reader_forked_from_a_process_that_has_read_reads(
    corpus: Manifest, server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All threads that there may be exist before the fork, and none after it.
    monkeypatch.setattr(crew, "_N_THREADS", 1)
    store = opened(server, tmp_path).store("train")
    store.expect([0], [])
    local = mixture_of(TokenStore(corpus, "train"), 10).tokens(0, 60)
    assert np.array_equal(store.read(0, 10), TokenStore(corpus, "train").read(0, 10))
    with forked(lambda pause: bool((mixture_of(store, 10).tokens(0, 60) == local).all())) as child:
        assert child.answers()
    assert np.array_equal(mixture_of(store, 10).tokens(0, 60), local)


def test_no_copy_goes_while_a_live_process_reads_it(corpus: Manifest, server: FaultyServer, tmp_path: Path) -> None:
    shards, limit = corpus.splits["train"].shards, group_bytes(corpus, 2)

    def hold(pause: Callable[[], object]) -> None:
        files = opened(server, tmp_path, limit).files
        files.expect([shards[0]], [])
        files.path(shards[0])
        pause()

    with forked(hold) as child:
        assert child.answers()
        files = opened(server, tmp_path, limit).files
        for i in (1, 2, 3):
            files.expect([shards[i]], [])
            files.path(shards[i])
            assert set(copies(tmp_path)) == {shards[0].name, shards[i].name}
    # The process was killed, and what it read is free.
    files.expect([shards[4]], [])
    files.path(shards[4])
    assert set(copies(tmp_path)) == {shards[3].name, shards[4].name}
    assert len(list((tmp_path / "leases").iterdir())) == 1


def test_a_killed_download_is_cleaned_up_and_done_again(corpus: Manifest, server: FaultyServer, tmp_path: Path) -> None:
    shard = corpus.splits["train"].shards[0]
    server.faults[shard.name] = ["slow"]
    server.slow_s = 5.0

    def fetch(pause: Callable[[], object]) -> None:
        opened(server, tmp_path).files.path(shard)

    with forked(fetch) as child:
        deadline = time.monotonic() + 10
        while not server.asked[shard.name] and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        os.kill(child.process.pid, signal.SIGKILL)
        child.process.join()
    assert set(copies(tmp_path)) == {f"{shard.name}.{shard.n_bytes}.part"}
    files = opened(server, tmp_path).files
    # Another shard's fetch finds the leftover; its own would write over it.
    files.path(corpus.splits["train"].shards[1])
    assert set(copies(tmp_path)) == {corpus.splits["train"].shards[1].name}
    assert files.path(shard).read_bytes() == (corpus.folder / shard.name).read_bytes()


def flip(path: Path, offset: int) -> None:
    """A wrong bit in a file that is mapped, too."""
    body = bytearray(path.read_bytes())
    body[offset] ^= 4
    path.write_bytes(body)


@pytest.mark.parametrize("is_mapped", [False, True])
def test_a_copy_damaged_on_disk_is_noticed_and_fetched_again(
    is_mapped: bool, corpus: Manifest, server: FaultyServer, tmp_path: Path
) -> None:
    store, local = opened(server, tmp_path).store("train"), TokenStore(corpus, "train")
    store.expect([0], [])
    assert np.array_equal(store.read(0, 20), local.read(0, 20))
    copy = next(tmp_path.glob("*-*/train-000000.tar"))
    # No token of that block was read yet.
    flip(copy, int(rows_of(corpus, 0)[1]["tokens_offset"]))
    if not is_mapped:
        store = opened(server, tmp_path).store("train")
    assert np.array_equal(store.read(0, 190), local.read(0, 190))
    assert np.array_equal(store.starts(0, 190), local.starts(0, 190))
    assert server.wholes[copy.name] == 2
    assert copy.read_bytes() == (corpus.folder / copy.name).read_bytes()


@pytest.mark.parametrize("is_damaged", [False, True])
def test_a_head_is_taken_from_a_sound_copy_that_is_here(
    is_damaged: bool, corpus: Manifest, server: FaultyServer, tmp_path: Path
) -> None:
    files, shards = opened(server, tmp_path).files, corpus.splits["train"].shards
    copy = files.path(shards[1])
    if is_damaged:
        flip(copy, int(rows_of(corpus, 1)[0]["tokens_offset"]))
    store, local = opened(server, tmp_path).store("train"), TokenStore(corpus, "train")
    end = int(store.shard_first_tokens[1])
    assert np.array_equal(store.read(end - 5, end + 5), local.read(end - 5, end + 5))
    assert server.asked[shards[1].name] == 1 + is_damaged


def test_damage_that_comes_back_is_raised(corpus: Manifest, server: FaultyServer, tmp_path: Path) -> None:
    store = opened(server, tmp_path).store("train")
    store.read(0, 20)
    copy = next(tmp_path.glob("*-*/train-000000.tar"))
    flip(copy, int(rows_of(corpus, 0)[1]["tokens_offset"]))
    server.faults[copy.name] = ["flip"] * 99
    with pytest.raises(DamagedData, match="its SHA-256 is"):
        store.read(0, 190)


@pytest.mark.parametrize("name", ["tokenizer.json", "train.blocks", "manifest.json"])
def test_damage_beside_the_shards_is_mended_when_the_folder_is_opened(
    name: str, corpus: Manifest, server: FaultyServer, tmp_path: Path
) -> None:
    path = opened(server, tmp_path).manifest.folder / name
    flip(path, path.stat().st_size // 2)
    assert opened(server, tmp_path).manifest == corpus
    assert path.read_bytes() == (corpus.folder / name).read_bytes()


def test_only_copies_are_removed_whatever_else_lies_in_the_folder(
    corpus: Manifest, server: FaultyServer, tmp_path: Path
) -> None:
    shutil.copytree(corpus.folder, tmp_path / "mine")
    (tmp_path / "notes.txt").write_text("x" * 100_000)
    store = opened(server, tmp_path, group_bytes(corpus, 2)).store("train")
    for i in range(5):
        store.expect([i], [])
        store.read(i * 192, i * 192 + 9)
    assert len([name for name in copies(tmp_path) if name.endswith(".tar")]) <= 2
    assert all((tmp_path / "mine" / shard.name).exists() for shard in corpus.splits["train"].shards)


def test_a_full_disk_is_one_line_with_need_and_free_bytes(
    corpus: Manifest, server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = corpus.splits["train"].shards
    files = opened(server, tmp_path).files
    files.path(shards[0])

    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RemoteFolder, "copy", refuse)
        with pytest.raises(DataError, match=f"{shards[1].n_bytes:,} bytes needed for a shard, [0-9,]+ free; make room"):
            files.path(shards[1])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    # Nothing is in use any more but the shard that is read, so the copy of the other one makes room.
    with pytest.raises(DataError, match=f"{shards[1].n_bytes:,} bytes needed for a shard, 100 free"):
        files.path(shards[1])
    files.expect([shards[1]], [])
    assert files.path(shards[1]).exists()
    assert set(copies(tmp_path)) == {shards[1].name}


def test_a_cache_that_cannot_be_made_is_one_line(server: FaultyServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/locks: the cache .* cannot be used \(Not a directory\); make it writ"):
        opened(server, tmp_path / "file")
