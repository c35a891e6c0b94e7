"""Files behind a URL: read or copied with fsspec, tried again when that fails, taken only as they should be."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import sys
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
# Longer pauses than this are announced.
_NOTABLE_PAUSE_S = 3.0
# Of the answers "your request is wrong" these are about the moment: too slow, too early, too many.
_PASSING_STATUS = {408, 425, 429}
# How libraries, which may not be installed, call that there is nothing to ask for access with.
_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"}
# Pauses need no seed, and must not disturb those who share the generator of the module.
_random = random.SystemRandom()

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Patience:
    """How often something is tried, and how long the pauses are: doubled each time, cut at random by up to half."""

    attempts: int = 7
    first_pause_s: float = 0.5
    longest_pause_s: float = 30.0

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
    """

    def __init__(self, url: str, patience: Patience) -> None:
        self.url = url.rstrip("/")
        self.patience = patience
        self.shown = shown_url(self.url)
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

    def attempt(self, name: str, action: Callable[[], _Result]) -> _Result:
        """Do something with a file until it succeeds.

        Args:
            name: of the file, for messages.
            action: raises DamagedData when what came is not what should have come.

        Raises:
            DataError: the file is not there, access is refused, a package is missing, or no attempt succeeded;
                the line names the URL, the attempts and the last cause.
            DamagedData: the last attempt brought other bytes.
            OSError: the local disk is full.
        """
        place = f"{self.shown}/{name}"
        last: Exception = DataError(place, "was not tried", "allow one attempt")
        for i, pause_s in enumerate((*self.patience.pauses_s(), 0.0), start=1):
            try:
                return action()
            except DataError as error:
                if not isinstance(error, DamagedData):
                    raise
                last = error
            except Exception as error:  # every file system raises kinds of its own
                if is_disk_full(error):
                    raise
                if _is_final(error):
                    raise _final_error(place, error) from error
                last = error
            if pause_s > _NOTABLE_PAUSE_S:
                line = (
                    f"{place}: attempt {i} of {self.patience.attempts} failed ({_cause(last)}), next in {pause_s:.0f} s"
                )
                print(line, file=sys.stderr, flush=True)
            time.sleep(pause_s)
        if isinstance(last, DamagedData):
            raise last
        problem = f"cannot be fetched: {self.patience.attempts} attempts, the last ended with {_cause(last)}"
        raise DataError(place, problem, "check the URL, the network and the credentials, and start again") from last

    def _open(self) -> tuple[AbstractFileSystem, str]:
        if os.getpid() not in self._opened:
            files, root = connect(self.url)
            self._opened.setdefault(os.getpid(), (files, root.rstrip("/")))
        return self._opened[os.getpid()]


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


def _is_final(error: Exception) -> bool:
    status = getattr(error, "status", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in _PASSING_STATUS
    is_unknown = type(error).__name__ in _NO_CREDENTIALS
    return refused or is_unknown or isinstance(error, (FileNotFoundError, PermissionError))


def _final_error(place: str, error: Exception) -> DataError:
    if isinstance(error, FileNotFoundError):
        return DataError(place, "no such file", "check the URL; it is the folder that `transmamba data prepare` made")
    return DataError(place, f"access is refused ({_cause(error)})", "check the URL and the credentials")


def _cause(error: Exception) -> str:
    if isinstance(error, DamagedData):
        return error.problem
    # The words of a library may hold the whole URL.
    words = " ".join(shown_url(word) for word in str(error).split())
    return f"{type(error).__name__}: {words[:200]}" if words else type(error).__name__
