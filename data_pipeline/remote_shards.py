"""Prepared folders behind a URL: shards are fetched ahead of the reader into a cache, and read from there."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from transmamba.data_pipeline.blocks import block_digest, blocks_name, map_rows, rows_digest
from transmamba.data_pipeline.crew import Crew, Transfer
from transmamba.data_pipeline.errors import DamagedData, DataError
from transmamba.data_pipeline.manifest import MANIFEST_NAME, Manifest, Shard, Split, read_manifest
from transmamba.data_pipeline.remote import Patience, RemoteFolder, file_fault, is_disk_full
from transmamba.data_pipeline.shard_cache import (
    HEAD_SUFFIX,
    SCRATCH_PREFIX,
    Cache,
    full_error,
    key_of,
    lock_name,
    part_path,
    publish,
)
from transmamba.data_pipeline.tokens import Places, TokenStore

_TAR_BLOCK = 512
# What a block of a shard has beside its tokens: headers, padding and document starts, more or less.
_BLOCK_EXTRA = 8 * _TAR_BLOCK
_UPLOAD = "upload the folder again"


def open_remote(
    url: str, cache: Cache, patience: Patience | None = None, *, is_known: bool = False
) -> tuple[Manifest, RemoteFiles]:
    """Open a prepared folder behind a URL: reads its manifest, and what lies beside it once per cache.

    Args:
        url: for fsspec.
        cache: for everything that is fetched.
        patience: with errors of the network.
        is_known: whether it has answered in another process.

    Raises:
        DataError: it cannot be reached, is not there or is unusable, or the cache cannot be written.
        Unreachable: it cannot be reached, but has answered before.
        DamagedData: what is there does not match its digests.
    """
    remote = RemoteFolder(url, patience or Patience(), is_known=is_known)

    def opened() -> Manifest:
        body = remote.read(MANIFEST_NAME)
        key = key_of(remote.url, body)
        folder = cache.folder / key
        with cache.locked(key):
            if _is_complete(folder, body):
                return read_manifest(folder / MANIFEST_NAME)
            with tempfile.TemporaryDirectory(prefix=SCRATCH_PREFIX, dir=cache.folder) as scratch:
                names = _fetch_description(remote, body, Path(scratch))
                folder.mkdir(exist_ok=True)
                # Not flushed: all of it is compared with its digests whenever the folder is opened.
                for name in names:
                    (Path(scratch) / name).replace(folder / name)
            return read_manifest(folder / MANIFEST_NAME)

    try:
        manifest = remote.endure(MANIFEST_NAME, lambda: remote.attempt(MANIFEST_NAME, opened))
    except OSError as error:
        fix = "make room, or set data.cache_dir to another disk"
        raise DataError(str(cache.folder), f"cannot be written ({error.strerror})", fix) from error
    remote.answered()
    return manifest, RemoteFiles(remote, manifest, cache)


def bytes_at_a_time(manifest: Manifest, shuffle_shards: int | str) -> int:
    """Most bytes of training shards that a cache must hold: those that are mixed, and those that are next."""
    allowed = _block_bytes(manifest)
    sizes = sorted((shard.n_bytes + allowed for shard in manifest.splits["train"].shards), reverse=True)
    return sum(sizes if shuffle_shards == "all" else sizes[: 2 * int(shuffle_shards)])


def bytes_in_order(manifest: Manifest, n_tokens: int) -> int:
    """Most bytes of validation shards that a cache must hold: those with `n_tokens` in a row, and the one after them.

    See `Stream.sequential`.
    """
    allowed, shards = _block_bytes(manifest), manifest.splits["validation"].shards
    first_bytes = np.cumsum([0, *(shard.n_bytes + allowed for shard in shards)])
    ends = np.cumsum([shard.n_tokens for shard in shards])
    # The reading that reaches furthest from a shard begins with its last token.
    last = np.searchsorted(ends, ends - 2 + n_tokens, side="right")
    return int(max(first_bytes[np.minimum(last + 1, len(shards) - 1) + 1] - first_bytes[:-1]))


class RemoteFiles:
    """Shards behind a URL, by way of a cache that other processes share."""

    def __init__(self, remote: RemoteFolder, manifest: Manifest, cache: Cache) -> None:
        self._remote, self._cache, self._folder = remote, cache, manifest.folder
        self._splits = {shard.name: name for name, split in manifest.splits.items() for shard in split.shards}
        self._width = np.dtype(manifest.token_dtype).itemsize
        self._block_bytes = _block_bytes(manifest)
        # Of each shard its first row in the table of its split.
        self._first_rows: dict[str, int] = {}
        for split in manifest.splits.values():
            firsts = np.cumsum([0, *(shard.n_blocks for shard in split.shards)]).tolist()
            self._first_rows |= {shard.name: first for shard, first in zip(split.shards, firsts, strict=False)}
        # By process: threads do not survive a fork. Of each split the shards that were handed out.
        self._crews: dict[int, Crew] = {}
        self._handed: dict[str, dict[str, Shard]] = {name: {} for name in manifest.splits}

    def path(self, shard: Shard, n_bytes: int | None = None) -> Path:
        """A local copy of the shard, or of its first `n_bytes` or more, compared with its digests on arrival.

        Raises:
            DataError: it cannot be fetched, or the disk or the cache is full.
            DamagedData: its bytes do not match their digests, whenever they are fetched.
        """
        split = self._splits[shard.name]
        self._handed[split][shard.name] = shard
        n_head = shard.n_bytes if n_bytes is None else self._head_size(shard, n_bytes)
        owner, key = (id(self), split), self._key(shard)
        # A whole copy that was not asked for would count as one.
        is_head = n_head < shard.n_bytes and not (self._is_whole(shard) and self._cache.counts(owner, key))
        self._cache.keep(owner, key, 0 if is_head else self._size(shard))
        if is_head:
            return self._remote.endure(shard.name, lambda: self._head(shard, n_head))
        while not self._is_whole(shard):
            self._remote.endure(shard.name, lambda: self._crew().wait_for(shard, self._remote.on_wait))
        path = self._folder / shard.name
        os.utime(path)
        return path

    def expect(self, now: Sequence[Shard], soon: Sequence[Shard]) -> None:
        """Fetch these shards in the background, and let others of their split go when there is no room.

        Raises:
            DataError: the cache is too small for them.
        """
        splits = {self._splits[shard.name] for shard in (*now, *soon)}
        for split in splits:
            self._handed[split] = {}
            self._cache.expect((id(self), split), self._sizes(split, now), self._sizes(split, soon))
        missing = {shard.name: shard for shard in (*now, *soon) if not self._is_whole(shard)}
        urgent = {shard.name for shard in now}
        self._crew().plan([(shard, name in urgent) for name, shard in missing.items()])

    def renew(self, split: str) -> None:
        """Remove the copies that were handed out and do not match their digests, and all heads, from the cache."""
        for shard in self._handed[split].values():
            path = self._folder / shard.name
            with self._cache.locked(lock_name(self._folder.name, shard.name)):
                path.with_name(path.name + HEAD_SUFFIX).unlink(missing_ok=True)
                if path.exists() and file_fault(path, n_bytes=shard.n_bytes, sha256=shard.sha256):
                    path.unlink()

    def rest(self) -> None:
        """Fetch nothing more in the background, and wait for the end of what is on its way."""
        self._crew().rest()

    def call_on_wait(self, on_wait: Callable[[], None]) -> None:
        """Have something called about once a second while a reader waits for shards and knows for which."""
        self._remote.on_wait = on_wait

    def _fetch(self, shard: Shard, urgent: bool, transfer: Transfer) -> bool:
        """Make a copy of a shard unless somebody has; False if there is no room for one that is not urgent."""
        path = self._folder / shard.name

        def copied() -> None:
            transfer.add(0)
            self._remote.copy(shard.name, part, transfer.add)
            with part.open("rb") as file:
                self._remote.refuse_page(shard.name, file.read(_TAR_BLOCK))
            fault = file_fault(part, n_bytes=shard.n_bytes, sha256=shard.sha256)
            if fault:
                raise DamagedData(f"{self._remote.shown}/{shard.name}", fault, _UPLOAD)

        with self._cache.locked(lock_name(self._folder.name, shard.name), transfer.stir):
            if self._is_whole(shard):
                return True
            path.unlink(missing_ok=True)
            part = part_path(path, shard.n_bytes)
            if not self._cache.reserve(part, shard.n_bytes, urgent=urgent):
                return False
            with self._arriving(part, path, shard.n_bytes):
                self._remote.attempt(shard.name, copied, quietly=True)
            path.with_name(path.name + HEAD_SUFFIX).unlink(missing_ok=True)
        return True

    def _head_size(self, shard: Shard, n_bytes: int) -> int:
        """Bytes to fetch for a head; one that grows is doubled, or reading block by block would be quadratic."""
        path = self._folder / f"{shard.name}{HEAD_SUFFIX}"
        known = _size_of(path) or 0
        wanted = max(n_bytes, 2 * known) if n_bytes > known else known
        return min(-(-wanted // _TAR_BLOCK) * _TAR_BLOCK, shard.n_bytes)

    def _head(self, shard: Shard, n_bytes: int) -> Path:
        path = self._folder / f"{shard.name}{HEAD_SUFFIX}"

        def written() -> None:
            self._remote.on_wait()
            data = self._first_bytes(shard, n_bytes)
            self._remote.refuse_page(shard.name, data[:_TAR_BLOCK].tobytes())
            fault = self._head_fault(shard, data, n_bytes)
            if fault:
                raise DamagedData(f"{self._remote.shown}/{shard.name}", fault, _UPLOAD)
            part.write_bytes(data.data)

        with self._cache.locked(lock_name(self._folder.name, shard.name), self._remote.on_wait):
            if (_size_of(path) or 0) >= n_bytes:
                os.utime(path)
                return path
            part = part_path(path, n_bytes)
            self._cache.reserve(part, n_bytes, urgent=True)
            with self._arriving(part, path, n_bytes):
                self._remote.attempt(shard.name, written)
        return path

    def _first_bytes(self, shard: Shard, n_bytes: int) -> np.ndarray:
        """From a whole copy that happens to be here and is sound, or from the URL."""
        with contextlib.suppress(OSError), (self._folder / shard.name).open("rb") as copy:
            data = np.frombuffer(copy.read(n_bytes), dtype=np.uint8)
            if self._head_fault(shard, data, n_bytes) is None:
                return data
        return np.frombuffer(self._remote.read(shard.name, n_bytes), dtype=np.uint8)

    @contextlib.contextmanager
    def _arriving(self, part: Path, path: Path, n_bytes: int) -> Iterator[None]:
        """Turn a part into a copy when the block has filled it, and remove it when it has not."""
        try:
            yield
            publish(part, path)
        except OSError as error:
            if not is_disk_full(error):
                raise
            state = os.statvfs(path.parent)
            raise full_error(path.parent, n_bytes, state.f_bavail * state.f_frsize) from error
        finally:
            part.unlink(missing_ok=True)

    def _head_fault(self, shard: Shard, data: np.ndarray, n_bytes: int) -> str | None:
        if len(data) != n_bytes:
            return f"{len(data)} bytes came instead of the first {n_bytes}"
        first_row = self._first_rows[shard.name]
        for row in map_rows(self._folder / blocks_name(self._splits[shard.name]))[first_row:][: shard.n_blocks]:
            first, second = int(row["tokens_offset"]), int(row["starts_offset"])
            end, starts_end = first + self._width * int(row["n_tokens"]), second + 4 * int(row["n_starts"])
            if max(end, starts_end) > n_bytes:
                break
            if block_digest(data[first:end], data[second:starts_end]) != row["digest"].tobytes():
                return f"the block at byte {first} does not match its digest"
        return None

    def _is_whole(self, shard: Shard) -> bool:
        return _size_of(self._folder / shard.name) == shard.n_bytes

    def _key(self, shard: Shard) -> str:
        return f"{self._folder.name}/{shard.name}"

    def _sizes(self, split: str, shards: Sequence[Shard]) -> Mapping[str, int]:
        return {self._key(shard): self._size(shard) for shard in shards if self._splits[shard.name] == split}

    def _size(self, shard: Shard) -> int:
        """Bytes to allow for a shard: itself, and the head of the one in which its last window ends."""
        return shard.n_bytes + self._block_bytes

    def _crew(self) -> Crew:
        return self._crews.setdefault(os.getpid(), Crew(self._fetch, self._remote.shown))


class CachedStore(TokenStore):
    """The tokens of a split behind a URL; copies that were damaged on this machine are fetched once more."""

    def __init__(self, manifest: Manifest, split: str, files: RemoteFiles) -> None:
        super().__init__(manifest, split, files)
        self._name, self._copies = split, files
        self._wanted: tuple[Sequence[int], Sequence[int]] = ((), ())

    def gather(self, places: Places) -> np.ndarray:
        """As `TokenStore`."""
        try:
            return super().gather(places)
        except DamagedData:
            self._renew()
            return super().gather(places)

    def starts(self, start: int, stop: int) -> np.ndarray:
        """As `TokenStore`."""
        try:
            return super().starts(start, stop)
        except DamagedData:
            self._renew()
            return super().starts(start, stop)

    def expect(self, now: Sequence[int], soon: Sequence[int]) -> None:
        """As `TokenStore`."""
        self._wanted = (now, soon)
        super().expect(now, soon)

    def _renew(self) -> None:
        """Give up all maps and the damaged copies behind them; another process may have put them right already."""
        self._copies.renew(self._name)
        super().expect((), ())
        super().expect(*self._wanted)


def _size_of(path: Path) -> int | None:
    # Another process may remove what this one does not read.
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _block_bytes(manifest: Manifest) -> int:
    return manifest.block_tokens * np.dtype(manifest.token_dtype).itemsize + _BLOCK_EXTRA


def _is_complete(folder: Path, body: bytes) -> bool:
    """Whether all that belongs to this manifest is there and matches its digests."""
    try:
        if (folder / MANIFEST_NAME).read_bytes() != body:
            return False
        manifest = read_manifest(folder / MANIFEST_NAME)
    except (OSError, DataError):
        return False
    return all(_table_fault(folder, name, split) is None for name, split in manifest.splits.items())


def _fetch_description(remote: RemoteFolder, body: bytes, scratch: Path) -> list[str]:
    """Fetch tokenizer and tables of a manifest into a folder and compare them; the names, the manifest last."""
    remote.refuse_page(MANIFEST_NAME, body)
    (scratch / MANIFEST_NAME).write_bytes(body)
    try:
        tokenizer = Path(json.loads(body)["tokenizer_file"]).name
    except (ValueError, LookupError, TypeError) as error:
        raise DamagedData(f"{remote.shown}/{MANIFEST_NAME}", "not a manifest of tokens", _UPLOAD) from error
    _fetch_beside(remote, tokenizer, scratch)
    try:
        manifest = read_manifest(scratch / MANIFEST_NAME)
    except DataError as error:
        # It was read from a scratch folder, of which nobody knows.
        raise type(error)(f"{remote.shown}/{Path(error.what).name}", error.problem, error.fix) from error
    for name, split in manifest.splits.items():
        _fetch_beside(remote, blocks_name(name), scratch)
        fault = _table_fault(scratch, name, split)
        if fault:
            raise DamagedData(f"{remote.shown}/{blocks_name(name)}", fault, _UPLOAD)
    return [tokenizer, *(blocks_name(name) for name in manifest.splits), MANIFEST_NAME]


def _fetch_beside(remote: RemoteFolder, name: str, scratch: Path) -> None:
    try:
        body = remote.read(name)
    except FileNotFoundError as error:
        raise DataError(f"{remote.shown}/{name}", "missing beside the manifest", _UPLOAD) from error
    remote.refuse_page(name, body)
    (scratch / name).write_bytes(body)


def _table_fault(folder: Path, name: str, split: Split) -> str | None:
    try:
        rows = map_rows(folder / blocks_name(name))
    except (OSError, ValueError) as error:
        return f"cannot be read ({error})"
    first = 0
    for shard in split.shards:
        if rows_digest(rows[first : first + shard.n_blocks]) != shard.blocks_sha256:
            return f"the rows of {shard.name} do not match their digest"
        first += shard.n_blocks
    return None if first == len(rows) else f"{len(rows)} rows instead of {first}"
