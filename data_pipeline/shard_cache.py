"""A folder for copies of remote files, of limited size, shared by all processes of a machine.

    FOLDER/KEY/              a remote folder: manifest, tokenizer, tables, and copies `NAME`, `NAME.head`
    FOLDER/KEY/NAME.SIZE.part   a copy on its way, of so many bytes in the end
    FOLDER/leases/           one file per process: the copies that it reads now, and soon
    FOLDER/locks/            one file per thing that only one process may do at a time

Locks and leases belong to open files, so they end with their process, however that ends. Space is bounded: a copy is
made when it fits after the least recently used ones that nobody reads are gone. A copy that goes while it is mapped
keeps its bytes on disk, but stores give up their maps before they give up their leases.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.publish import flush

HEAD_SUFFIX = ".head"
SCRATCH_PREFIX = ".new-"
_PART_SUFFIX = ".part"
_COPY_SUFFIXES = (".tar", HEAD_SUFFIX)
_SCRATCH_AGE_S = 3600.0
_LOOK_EVERY_S = 0.1
_KEY = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}")
_GIB = 2**30


def key_of(url: str, manifest: bytes) -> str:
    """The KEY of a remote folder with this manifest."""
    return "-".join(hashlib.sha256(part).hexdigest()[:16] for part in (url.encode("utf-8"), manifest))


class _Copy(NamedTuple):
    used_at: float
    key: str
    """KEY/NAME, the head of a shard under the name of the shard."""
    path: Path
    n_bytes: int


class _Claim(NamedTuple):
    """Sizes in bytes of what is read now and soon, by KEY/NAME."""

    now: dict[str, int]
    soon: dict[str, int]


class _Lease(NamedTuple):
    """What this process has claimed, by whom it was claimed, and the locked file that tells the others."""

    file: IO[str]
    claims: dict[object, _Claim]


class Cache:
    """Copies of remote shards.

    Args:
        folder: of the cache; made when it is first needed.
        max_bytes: most space for the copies; manifests and tables come on top. Only what other processes read at the
            same time can exceed it.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        # By process: a forked one has a lease of its own.
        self._leases: dict[int, _Lease] = {}

    @contextlib.contextmanager
    def locked(self, name: str, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
        """Hold the lock `name`; the others wait, and call `on_wait` meanwhile."""
        path = self._made("locks") / name
        while True:
            with _lock(path, wait=on_wait is None) as is_held:
                if is_held:
                    yield
                    return
            if on_wait is not None:
                on_wait()
                time.sleep(_LOOK_EVERY_S)

    def expect(self, owner: object, now: Mapping[str, int], soon: Mapping[str, int]) -> None:
        """Replace what `owner` reads, as sizes in bytes by KEY/NAME; those of `now` stay until it says otherwise.

        Raises:
            DataError: the cache does not hold what this process reads.
        """
        self._claim(owner, _Claim(dict(now), dict(soon)))

    def counts(self, owner: object, key: str) -> bool:
        """Whether a whole copy is among what `owner` reads."""
        lease = self._leases.get(os.getpid())
        claim = lease.claims.get(owner) if lease else None
        return claim is not None and bool(claim.now.get(key) or claim.soon.get(key))

    def keep(self, owner: object, key: str, n_bytes: int) -> None:
        """Add one to what `owner` reads now; `n_bytes` 0 leaves it out of the sum that must fit.

        Raises:
            DataError: the cache does not hold what this process reads.
        """
        lease = self._leases.get(os.getpid())
        known = lease.claims.get(owner) if lease else None
        claim = known or _Claim({}, {})
        if claim.now.get(key, -1) < n_bytes:
            self._claim(owner, _Claim({**claim.now, key: n_bytes}, claim.soon))

    def reserve(self, part: Path, n_bytes: int, *, urgent: bool) -> bool:
        """Make room for a copy of `n_bytes` and create its empty file `part`, of a name by `part_path`.

        Args:
            part: to create.
            n_bytes: in the end.
            urgent: whether copies that are read soon may go for it, and the limit be exceeded when all others are
                in use.

        Returns:
            whether it was made; always if `urgent`.

        Raises:
            DataError: the disk is full.
        """
        with self.locked("room"):
            copies, used, unwritten = self._survey()
            now, soon = self._wanted()
            spare = sorted(copy for copy in copies if copy.key not in now | soon)
            if urgent:
                spare += sorted(copy for copy in copies if copy.key in soon - now)
            free = shutil.disk_usage(self.folder).free - unwritten
            missing = max(used + n_bytes - self.max_bytes, n_bytes - free)
            going = []
            for copy in spare:
                if missing <= 0:
                    break
                going.append(copy)
                missing -= copy.n_bytes
            if missing > 0 and not urgent:
                return False
            free += sum(copy.n_bytes for copy in going)
            if free < n_bytes:
                raise full_error(self.folder, n_bytes, free)
            for copy in going:
                copy.path.unlink(missing_ok=True)
            part.touch()
        return True

    def _claim(self, owner: object, claim: _Claim) -> None:
        with self.locked("room"):
            lease = self._lease()
            lease.claims[owner] = claim
            sizes: dict[str, int] = {}
            for known in lease.claims.values():
                sizes |= known.soon | known.now
            n_bytes = sum(sizes.values())
            if n_bytes > self.max_bytes:
                problem = f"{self.max_bytes / _GIB:.6g} GiB do not hold the {n_bytes / _GIB:.6g} GiB read at a time"
                raise DataError("data.cache_gib", problem, "raise it, or use a smaller data.shuffle_shards")
            now = {key for known in lease.claims.values() for key in known.now}
            soon = {key for known in lease.claims.values() for key in known.soon}
            lease.file.seek(0)
            lease.file.truncate()
            json.dump({"now": sorted(now), "soon": sorted(soon)}, lease.file)
            lease.file.flush()

    def _lease(self) -> _Lease:
        pid = os.getpid()
        if pid not in self._leases:
            # Machines and containers that share a folder may share process ids, too.
            file = (self._made("leases") / f"{pid}-{os.urandom(4).hex()}").open("w", encoding="ascii")
            fcntl.flock(file, fcntl.LOCK_EX)
            self._leases[pid] = _Lease(file, {})
        return self._leases[pid]

    def _wanted(self) -> tuple[set[str], set[str]]:
        """What live processes read now and soon; leases of dead ones are removed."""
        now: set[str] = set()
        soon: set[str] = set()
        for path in self._made("leases").iterdir():
            with _lock(path, wait=False) as is_ours:
                if is_ours:
                    path.unlink()
                    continue
            text = path.read_text(encoding="ascii")
            lease = json.loads(text) if text else {"now": [], "soon": []}
            now.update(lease["now"])
            soon.update(lease["soon"])
        return now, soon

    def _survey(self) -> tuple[list[_Copy], int, int]:
        """The copies, the bytes that they and the parts have or will have, and those that are not written yet."""
        copies, used, unwritten = [], 0, 0
        for folder in self.folder.iterdir():
            if folder.name.startswith(SCRATCH_PREFIX):
                with contextlib.suppress(FileNotFoundError):  # its process has just done with it
                    if time.time() - folder.stat().st_mtime > _SCRATCH_AGE_S:
                        shutil.rmtree(folder, ignore_errors=True)
                continue
            # Whatever else lies in the folder that the user chose is not ours to count or to remove.
            for path in folder.iterdir() if _KEY.fullmatch(folder.name) else ():
                is_part = path.suffix == _PART_SUFFIX
                if not (is_part or path.suffix in _COPY_SUFFIXES) or (is_part and self._is_left_over(path)):
                    continue
                with contextlib.suppress(FileNotFoundError):  # a part that has just become a copy
                    state = path.stat()
                    n_bytes = int(path.suffixes[-2][1:]) if is_part else state.st_size
                    used += n_bytes
                    unwritten += max(n_bytes - state.st_size, 0)
                    if not is_part:
                        key = f"{folder.name}/{path.name.removesuffix(HEAD_SUFFIX)}"
                        copies.append(_Copy(state.st_mtime, key, path, n_bytes))
        return copies, used, unwritten

    def _is_left_over(self, part: Path) -> bool:
        """Remove a part whose process is gone."""
        name = part.name.removesuffix("".join(part.suffixes[-2:])).removesuffix(HEAD_SUFFIX)
        with _lock(self._made("locks") / lock_name(part.parent.name, name), wait=False) as is_ours:
            if is_ours:
                part.unlink(missing_ok=True)
            return is_ours

    def _made(self, name: str) -> Path:
        path = self.folder / name
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable(path, error) from error
        return path


def part_path(copy: Path, n_bytes: int) -> Path:
    """Where a copy of so many bytes is written before it is complete."""
    return copy.with_name(f"{copy.name}.{n_bytes}{_PART_SUFFIX}")


def publish(part: Path, copy: Path) -> None:
    """Give a complete part its name, after its bytes are on disk."""
    flush(part)
    part.replace(copy)
    flush(copy.parent)


def lock_name(key: str, name: str) -> str:
    """The lock of whoever fetches a file of a remote folder."""
    return f"{key}-{name}"


def full_error(folder: Path, n_bytes: int, free: int) -> DataError:
    """That a copy does not fit on the disk."""
    problem = f"{n_bytes:,} bytes needed for a shard, {max(free, 0):,} free"
    return DataError(str(folder), problem, "make room, or set data.cache_dir to another disk")


@contextlib.contextmanager
def _lock(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock of a file; yields whether it is held, which without waiting it may not be."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("ab"))
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise _unusable(path, error) from error
        try:
            yield True
        finally:
            # Closing is not enough: a process forked meanwhile has the same open file.
            fcntl.flock(file, fcntl.LOCK_UN)


def _unusable(path: Path, error: OSError) -> DataError:
    problem = f"the cache of remote shards cannot be used ({error.strerror or error})"
    return DataError(str(path), problem, "make it writable, or set data.cache_dir to a folder on a local disk")
