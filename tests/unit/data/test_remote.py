"""What comes from a URL equals what lies there, whatever happens on the way, or the reason is one line."""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from botocore.exceptions import NoCredentialsError
from moto.server import ThreadedMotoServer

from tests.unit.data.corpora import numbered_documents, write_corpus
from tests.unit.data.remote_server import FaultyServer, serve
from transmamba.data_pipeline import crew, remote
from transmamba.data_pipeline.errors import DamagedData, DataError
from transmamba.data_pipeline.folder import PreparedFolder, open_folder
from transmamba.data_pipeline.manifest import Manifest
from transmamba.data_pipeline.remote import Patience, RemoteFolder, shown_url
from transmamba.data_pipeline.remote_shards import open_remote
from transmamba.data_pipeline.shard_cache import Cache
from transmamba.data_pipeline.tokens import TokenStore

QUICK = Patience(attempts=4, first_pause_s=0.005, longest_pause_s=0.01)
FIRST = "train-000000.tar"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Ten shards of three blocks."""
    folder = tmp_path_factory.mktemp("origin")
    return write_corpus(folder, numbered_documents([40] * 48), shard_tokens=192, block_tokens=64)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 1 << 30)


def opened(url: str, cache: Cache, patience: Patience = QUICK) -> PreparedFolder:
    return PreparedFolder(*open_remote(url, cache, patience))


def assert_reads_all(folder: PreparedFolder, corpus: Manifest) -> None:
    for split in corpus.splits:
        local, store = TokenStore(corpus, split), folder.store(split)
        assert np.array_equal(store.read(0, store.n_tokens), local.read(0, local.n_tokens))
        assert np.array_equal(store.starts(0, store.n_tokens), local.starts(0, local.n_tokens))


def files_in(cache: Cache) -> set[str]:
    return {path.name for path in cache.folder.glob("*-*/*")}


@contextlib.contextmanager
def s3_bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    running = ThreadedMotoServer(port=0, verbose=False)
    running.start()
    try:
        _, port = running.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket/some/prefix"
    finally:
        running.stop()


@pytest.mark.parametrize("kind", ["memory", "file", "http", "s3"])
def test_every_kind_of_url_reads_the_tokens_of_the_folder(
    kind: str, corpus: Manifest, server: FaultyServer, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.ExitStack() as stack:
        url = {"memory": "memory://tokens/", "file": corpus.folder.as_uri(), "http": f"{server.url}/"}.get(kind, "")
        if kind == "s3":
            url = stack.enter_context(s3_bucket(monkeypatch))
        if kind in ("memory", "s3"):
            files, root = fsspec.core.url_to_fs(url)
            files.put(f"{corpus.folder}/", root, recursive=True)
        folder = open_folder(url, cache)
        assert folder.manifest == corpus
        assert folder.manifest.tokenizer_path.read_text() == "{}"
        assert_reads_all(folder, corpus)


@pytest.mark.parametrize("fault", ["500", "reset", "short", "cut", "flip"])
@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json", "train.blocks", FIRST])
def test_what_fails_or_comes_wrong_is_fetched_again(
    fault: str, name: str, corpus: Manifest, server: FaultyServer, cache: Cache
) -> None:
    if (fault, name) == ("cut", "tokenizer.json"):
        pytest.skip("it is shorter than what is cut")
    server.faults[name] = [fault] * (QUICK.attempts - 1)
    folder = opened(server.url, cache)
    assert folder.manifest == corpus
    assert np.array_equal(folder.store("train").read(0, 100), TokenStore(corpus, "train").read(0, 100))
    assert server.asked[name] >= QUICK.attempts
    assert not [file for file in files_in(cache) if file.endswith(".part")]


@pytest.mark.parametrize("fault", ["500", "reset", "flip", "cut", "ignore"])
def test_the_head_of_the_next_shard_is_checked_as_well(
    fault: str, corpus: Manifest, server: FaultyServer, cache: Cache
) -> None:
    store, local = opened(server.url, cache).store("train"), TokenStore(corpus, "train")
    end = int(store.shard_first_tokens[1])
    server.faults["train-000001.tar"] = [fault] * (QUICK.attempts - 1)
    assert np.array_equal(store.read(end - 5, end + 5), local.read(end - 5, end + 5))
    assert {file for file in files_in(cache) if ".tar" in file} == {FIRST, "train-000001.tar.head"}
    assert server.wholes["train-000001.tar"] == 0


def test_reading_on_block_by_block_fetches_a_growing_head_few_times(tmp_path: Path, cache: Cache) -> None:
    manifest = write_corpus(tmp_path / "long", numbered_documents([64] * 80), shard_tokens=64 * 40, block_tokens=64)
    with serve(manifest.folder) as server:
        store, local = opened(server.url, cache).store("train"), TokenStore(manifest, "train")
        assert np.array_equal(store.read(0, store.n_tokens), local.read(0, local.n_tokens))
        assert server.asked["train-000001.tar"] <= 8


def test_wrong_bytes_that_stay_wrong_name_shard_and_both_hashes(
    corpus: Manifest, server: FaultyServer, cache: Cache
) -> None:
    server.faults[FIRST] = ["flip"] * 99
    store = opened(server.url, cache).store("train")
    with pytest.raises(DamagedData, match=f"{server.url}/{FIRST}: its SHA-256 is [0-9a-f]{{64}}") as caught:
        store.read(0, 5)
    assert f"the manifest says {corpus.splits['train'].shards[0].sha256}" in str(caught.value)
    assert FIRST not in files_in(cache)


def test_missing_credentials_are_said_at_once() -> None:
    calls = []

    def ask() -> None:
        calls.append(1)
        raise NoCredentialsError

    with pytest.raises(DataError, match=r"access is refused \(NoCredentialsError: Unable to locate credentials\)"):
        RemoteFolder("s3://bucket/data", QUICK).attempt("manifest.json", ask)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("fault", "attempts", "words"),
    [
        ("500", QUICK.attempts, "cannot be fetched: 4 attempts, the last ended with ClientResponseError: 500"),
        ("reset", QUICK.attempts, "cannot be fetched: 4 attempts, the last ended with Client"),
        ("404", 1, "no such file"),
        ("403", 1, "access is refused"),
    ],
)
def test_what_cannot_be_fetched_is_one_line_with_url_attempts_and_cause(
    fault: str, attempts: int, words: str, server: FaultyServer, cache: Cache
) -> None:
    store = opened(server.url, cache).store("train")
    server.faults[FIRST] = [fault] * 99
    with pytest.raises(DataError, match=words) as caught:
        store.read(0, 5)
    assert caught.value.what == f"{server.url}/{FIRST}"
    assert not isinstance(caught.value, DamagedData)
    assert "\n" not in str(caught.value)
    # Once in the background and once because it was asked for, at most.
    assert attempts <= server.asked[FIRST] <= 2 * attempts
    # The connection is good again.
    server.faults.clear()
    store.read(0, 5)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://user:secret@127.0.0.1:9/x?token=abc", r"http://127.0.0.1:9/x/manifest.json: cannot be fetched: 4 att"),
        ("gs://bucket/x", "no package for gs:// is installed; run `pip install gcsfs`"),
        ("nowhere://x", "nowhere://x: cannot be opened .*not known.*; use a path or a URL"),
        ("memory://empty", "memory://empty/manifest.json: no such file; check the URL"),
    ],
)
def test_a_place_that_cannot_be_opened_is_one_line(
    url: str, words: str, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(DataError, match=words) as caught:
        opened(url, cache)
    assert "secret" not in str(caught.value)
    assert "abc" not in str(caught.value)
    assert not files_in(cache)


@pytest.mark.parametrize("text", ["{}", "[]", "no JSON", '{"tokenizer_file": "../../x"}'])
def test_something_else_than_a_manifest_is_refused_and_leaves_nothing(text: str, cache: Cache) -> None:
    fsspec.filesystem("memory").pipe_file("/other/manifest.json", text.encode())
    fsspec.filesystem("memory").pipe_file("/other/x", b"")
    with pytest.raises(DataError, match=r"memory://other/manifest.json: .*not a manifest"):
        opened("memory://other", cache)
    assert not files_in(cache)


def test_a_server_that_falls_silent_is_asked_again(
    corpus: Manifest, server: FaultyServer, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_SILENCE_S", 0.1)
    server.slow_s = 1.0
    store = opened(server.url, cache).store("train")
    server.faults[FIRST] = ["slow"]
    assert np.array_equal(store.read(0, 5), TokenStore(corpus, "train").read(0, 5))
    assert server.asked[FIRST] == 2


@pytest.mark.parametrize("name", ["manifest.json", "tokenizer.json"])
def test_a_login_page_is_said_at_once(name: str, server: FaultyServer, cache: Cache) -> None:
    server.faults[name] = ["page"] * 9
    words = rf"{server.url}/{name}: a web page came instead of the file \(<!DOCTYPE html> <html>.*the URL and the login"
    with pytest.raises(DataError, match=words) as caught:
        opened(server.url, cache)
    assert not isinstance(caught.value, DamagedData)
    assert server.asked[name] == 1


@pytest.mark.parametrize("status", ["401", "403"])
def test_a_refusal_is_no_missing_file(status: str, server: FaultyServer, cache: Cache) -> None:
    server.faults["manifest.json"] = [status]
    with pytest.raises(DataError, match=rf"manifest.json: access is refused \(ClientResponseError: {status}"):
        opened(server.url, cache)


def test_a_silent_server_is_told_about(
    server: FaultyServer, cache: Cache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(remote, "_PATIENT_S", 0.1)
    server.slow_s = 1.0
    server.faults["manifest.json"] = ["silent"]
    opened(server.url, cache)
    assert f"{server.url}/manifest.json: no answer for 0 s, still waiting" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tokenizer.json", "train.blocks"])
def test_what_is_missing_beside_a_manifest_is_named(name: str, server: FaultyServer, cache: Cache) -> None:
    server.faults[name] = ["404"]
    with pytest.raises(DataError, match=f"{server.url}/{name}: missing beside the manifest"):
        opened(server.url, cache)
    assert not files_in(cache)


def test_a_disk_that_is_full_before_the_first_shard_is_one_line(
    server: FaultyServer, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(DataError, match=r"cache: cannot be written \(No space left on device\); make room"):
        opened(server.url, cache)
    assert not list(cache.folder.glob(".new-*"))


@pytest.mark.parametrize("fault", ["slow", "silent"])
def test_a_slow_first_fetch_says_how_far_it_is(
    fault: str, server: FaultyServer, cache: Cache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(crew, "_PATIENT_S", 0.0)
    server.slow_s = 1.3
    store = opened(server.url, cache).store("train")
    server.faults[FIRST] = [fault]
    store.read(0, 5)
    assert f"waiting for {FIRST} from {server.url}: 0 of 0 MB" in capsys.readouterr().err


def test_a_long_pause_is_announced(
    server: FaultyServer, cache: Cache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(remote, "_NOTABLE_S", 0.0)
    server.faults["manifest.json"] = ["500"]
    opened(server.url, cache)
    line = f"{server.url}/manifest.json: attempt 1 of 4 failed (ClientResponseError: 500"
    assert capsys.readouterr().err.startswith(line)


def test_pauses_double_up_to_a_limit_and_differ() -> None:
    pauses = [list(Patience(attempts=8, first_pause_s=1.0, longest_pause_s=8.0).pauses_s()) for _ in range(20)]
    for i, longest in enumerate([1.0, 2.0, 4.0, 8.0, 8.0, 8.0, 8.0]):
        found = {row[i] for row in pauses}
        assert len(found) > 1
        assert all(longest / 2 <= pause <= longest for pause in found)


def test_urls_are_shown_without_secrets() -> None:
    assert shown_url("https://me:pw@host:1/a/b?sig=1#x") == "https://host:1/a/b"
    assert shown_url("s3://bucket/a b") == "s3://bucket/a b"
    assert shown_url("plain words: none") == "plain words: none"
