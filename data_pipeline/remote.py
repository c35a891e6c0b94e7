"""Files behind a URL: read or copied with fsspec, tried again when that fails, taken only as they should be."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from transmamba.data_pipeline.errors import DamagedData, DataError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

# Packages that fsspec needs for a kind of URL.
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
_PACKAGES |= {"abfs": "adlfs", "az": "adlfs", "sftp": "paramiko", "ssh": "paramiko", "hf": "huggingface_hub"}
_CONNECT_S, _SILENCE_S = 15.0, 60.0
# How long a store that has answered before may be away, and how often that is told.
OUTAGE_S = 3600.0
_TELL_EVERY_S = 30.0
# While a folder is opened: failures that cost longer are announced, and so is an answer that takes longer.
_NOTABLE_S, _PATIENT_S = 3.0, 10.0
# Of the answers "your request is wrong" these are about the moment: too slow, too early, too many.
_PASSING_STATUS = {408, 425, 429}
# And these about who asks.
_REFUSALS = {401, 403, 407}
# How libraries, which may not be installed, call that there is nothing to ask for access with.
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"}
# How a page of a login, a proxy or an error begins.
_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|\?xml)", re.IGNORECASE)
# Pauses need no seed, and must not disturb those who share the generator of the module.
_random = random.SystemRandom()

# Manifests that this process has read.
_answered: set[str] = set()

_Result = TypeVar("_Result")


class Unreachable(DataError):  # noqa: N818, named after what it is about
    """A store that has answered before does not, maybe only now."""


class NotThere(DataError):  # noqa: N818, named after what it is about
    """The store answers that it has no such file."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How often something is tried, and how long the pauses are: doubled each time, cut at random by up to half.

    All of that is done again for up to `outage_s` seconds where the store has answered before; refusals are then tried
    again as well, because credentials change.
    """

    attempts: int = 7
    first_pause_s: float = 0.5
    longest_pause_s: float = 30.0
    outage_s: float = 0.0

    def pauses_s(self) -> Iterator[float]:
        """Seconds to wait after each attempt but the last."""
        for i in range(self.attempts - 1):
            yield _random.uniform(0.5, 1.0) * min(self.first_pause_s * 2**i, self.longest_pause_s)


class RemoteFolder:
    """A folder behind a URL that fsspec understands.

    Nothing is opened before it is needed, and a forked process opens its own connections.

    Args:
        url: of the folder.
        patience: with which everything is tried.
        is_known: whether it has answered in another process.

    Attributes:
        on_wait: called about once a second while somebody waits for a file and knows for which.
    """

    def __init__(self, url: str, patience: Patience, *, is_known: bool = False) -> None:
        self.url = url.rstrip("/")
        self.patience = patience
        self.shown = shown_url(self.url)
        self.on_wait: Callable[[], None] = _do_nothing
        self._is_known = is_known
        # By process. Those of a parent are kept, because closing them would reach into its event loop.
        self._opened: dict[int, tuple[AbstractFileSystem, str]] = {}

    def read(self, name: str, n_bytes: int | None = None) -> bytes:
        """The bytes of a file, or its first `n_bytes`, as one attempt finds them.

        Raises:
            Exception: whatever the file system raises; see `attempt`.
        """
        files, root = self._open()
        body: bytes = files.cat_file(f"{root}/{name}", start=None if n_bytes is None else 0, end=n_bytes)  # pyright: ignore[reportAssignmentType]
        # A server that knows no ranges sends everything.
        return body[:n_bytes]

    def copy(self, name: str, target: Path, on_bytes: Callable[[int], None]) -> None:
        """Copy a file, as one attempt finds it, and report the bytes as they come.

        Raises:
            Exception: whatever the file system raises; see `attempt`.
        """
        from fsspec.callbacks import Callback

        class Report(Callback):
            def relative_update(self, inc: int = 1) -> None:
                on_bytes(inc)

        files, root = self._open()
        files.get_file(f"{root}/{name}", str(target), callback=Report())  # pyright: ignore[reportArgumentType]

    @property
    def is_known(self) -> bool:
        """Whether the store has answered before, so that what it says now may pass."""
        return self._is_known or self.url in _answered

    def answered(self) -> None:
        """Note that the folder was opened."""
        _answered.add(self.url)

    def endure(self, name: str, action: Callable[[], _Result]) -> _Result:
        """Do something with a file again and again while the store is away, and tell about it every half minute.

        Args:
            name: of the file, for messages.
            action: such as `attempt`; Unreachable means that the store is away.

        Raises:
            Unreachable: it was away for `outage_s`.
            Exception: what else `action` raises.
        """
        place = f"{self.shown}/{name}"
        away_since = told_at = None
        while True:
            try:
                result = action()
            except Unreachable as error:
                now = time.monotonic()
                away_since = now if away_since is None else away_since
                away_s = now - away_since
                if not self.patience.outage_s:
                    raise
                if away_s >= self.patience.outage_s:
                    problem = f"did not come for {away_s:.0f} s; {error.problem}"
                    raise Unreachable(place, problem, error.fix) from error
                if told_at is None or now - told_at >= _TELL_EVERY_S:
                    told_at = now
                    limit_s = self.patience.outage_s
                    _tell(f"{place}: {error.problem}; waiting for it, {away_s:.0f} of at most {limit_s:.0f} s")
                self.on_wait()
            else:
                if away_since is not None:
                    _tell(f"{place}: came after {time.monotonic() - away_since:.0f} s without it")
                return result

    def attempt(self, name: str, action: Callable[[], _Result], *, quietly: bool = False) -> _Result:
        """Do something with a file until it succeeds.

        Args:
            name: of the file, for messages.
            action: raises DamagedData or Unreachable when what came is not what should have come.
            quietly: somebody else tells that it takes long.

        Raises:
            NotThere: the store has no such file.
            Unreachable: no attempt succeeded, but the store has answered before.
            DataError: access is refused, a package is missing, or no attempt succeeded; the line names the URL, the
                attempts and the last cause.
            DamagedData: the last attempt brought other bytes.
            OSError: the local disk is full.
        """
        place = f"{self.shown}/{name}"
        last: Exception = DataError(place, "was not tried", "allow one attempt")
        for i, pause_s in enumerate((*self.patience.pauses_s(), 0.0), start=1):
            began = time.monotonic()
            try:
                with contextlib.nullcontext() if quietly else _told_when_late(place):
                    return action()
            except (DamagedData, Unreachable) as error:
                last = error
            except DataError:
                raise
            except Exception as error:  # every file system raises kinds of its own
                if is_disk_full(error):
                    raise
                self._must_pass(place, error)
                last = error
            if time.monotonic() - began + pause_s > _NOTABLE_S and not self.is_known:
                failed = f"attempt {i} of {self.patience.attempts} failed ({_cause(last)})"
                _tell(f"{place}: {failed}, next in {pause_s:.0f} s")
            time.sleep(pause_s)
        if isinstance(last, DataError):
            raise last
        problem = f"cannot be fetched: {self.patience.attempts} attempts, the last ended with {_cause(last)}"
        kind = Unreachable if self.is_known else DataError
        raise kind(place, problem, "check the URL, the network and the credentials, and start again") from last

    def refuse_page(self, name: str, data: bytes) -> None:
        """Refuse the first bytes of a file that are those of a web page.

        Raises:
            Unreachable: they are, and the store has sent other things before.
            DataError: they are.
        """
        if _PAGE.match(data):
            begin = " ".join(data[:60].decode("utf-8", "replace").split())
            kind = Unreachable if self.is_known else DataError
            problem = f"a web page came instead of the file ({begin}...)"
            raise kind(f"{self.shown}/{name}", problem, "check the URL and the login")

    def _must_pass(self, place: str, error: Exception) -> None:
        """Raise a line of its own for an error that another attempt does not change."""
        if isinstance(error, FileNotFoundError):
            fix = "check the URL; it is the folder that `transmamba data prepare` made"
            raise NotThere(place, "no such file", fix) from error
        status, is_refused = getattr(error, "status", None), isinstance(error, PermissionError)
        is_refused |= status in _REFUSALS or type(error).__name__ in _NO_CREDENTIALS
        is_wrong = isinstance(status, int) and 400 <= status < 500 and status not in _PASSING_STATUS
        if is_refused and self.is_known and self.patience.outage_s:
            # Opened anew, it reads credentials anew.
            self._opened.pop(os.getpid(), None)
        elif is_refused or is_wrong:
            kind = Unreachable if is_refused and self.is_known else DataError
            problem = f"access is refused ({_cause(error)})"
            raise kind(place, problem, "check the URL and the credentials") from error

    def _open(self) -> tuple[AbstractFileSystem, str]:
        opened = self._opened.get(os.getpid())
        if opened is None:
            files, root = connect(self.url)
            opened = self._opened.setdefault(os.getpid(), (files, root.rstrip("/")))
        return opened


def connect(url: str) -> tuple[AbstractFileSystem, str]:
    """A new file system for a URL, and the URL's path in it.

    Raises:
        DataError: fsspec does not know the protocol, or needs a package for it that is not installed.
    """
    from fsspec.core import url_to_fs

    protocol = url.split("://")[0]
    try:
        return url_to_fs(url, skip_instance_cache=True, **_options(protocol))
    except ImportError as error:
        package = _PACKAGES.get(protocol)
        fix = f"run `pip install {package}`" if package else f"install what fsspec asks for: {error}"
        raise DataError(shown_url(url), f"no package for {protocol}:// is installed", fix) from error
    except ValueError as error:
        fix = "use a path or a URL that fsspec knows, such as s3://, gs:// or https://"
        raise DataError(shown_url(url), f"cannot be opened ({error})", fix) from error


def shown_url(url: str) -> str:
    """A URL as it may be printed: without user, password and query."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


def file_fault(path: Path, *, n_bytes: int, sha256: str) -> str | None:
    """What is wrong with a file that should have this size and SHA-256, or None."""
    size = path.stat().st_size
    if size != n_bytes:
        return f"{size} bytes came instead of {n_bytes}"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return None if found == sha256 else f"its SHA-256 is {found}, the manifest says {sha256}"


def is_disk_full(error: BaseException) -> bool:
    """Whether the local disk, or what its user may have of it, is used up."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _options(protocol: str) -> dict[str, Any]:
    if protocol not in ("http", "https"):
        return {}
    import aiohttp

    # By default a transfer of more than five minutes fails, however well it goes on.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S, sock_read=_SILENCE_S)
    return {"client_kwargs": {"timeout": timeout}}


@contextlib.contextmanager
def _told_when_late(place: str) -> Iterator[None]:
    """Say so when the block takes long."""
    timer = threading.Timer(_PATIENT_S, _tell, (f"{place}: no answer for {_PATIENT_S:.0f} s, still waiting",))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _do_nothing() -> None:
    """Nobody looks after this reader."""


def _cause(error: Exception) -> str:
    if isinstance(error, DataError):
        return error.problem
    # The words of a library may hold the whole URL.
    words = " ".join(shown_url(word) for word in str(error).split())
    return f"{type(error).__name__}: {words[:200]}" if words else type(error).__name__
