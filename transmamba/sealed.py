"""A JSON file that proves itself: its first line holds the SHA-256 of all the others. And files opened with care."""

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transmamba import disk

MAX_BYTES = 1 << 28  # a million slices; more is no checkpoint of ours
_SEAL = b'{"sha256": "%s",\n'
_SEAL_BYTES = len(_SEAL % (b"0" * 64))


class CheckpointError(Exception):
    """A checkpoint that must not be used; the text names the file and what is wrong with it."""


def seal(values: dict[str, Any]) -> bytes:
    """JSON with one item of a list or section to a line, after a first line with the hash of all the others."""
    entries = [f"{json.dumps(key)}: {_lines(value)}" for key, value in sorted(values.items())]
    body = (",\n".join(entries) + "\n}\n").encode()
    return _SEAL % hashlib.sha256(body).hexdigest().encode() + body


def unseal(file: Path, version: int) -> dict[str, Any]:
    """The values of a sealed file whose `format_version` is `version`.

    Raises:
        CheckpointError: unreadable, too large, not JSON, of another version, or not as it was written.
    """
    with opened(file) as (descriptor, size):
        if size > MAX_BYTES:
            raise CheckpointError(f"{file}: {size} bytes, at most {MAX_BYTES} are read")
        data = b"".join(iter(lambda: os.read(descriptor, disk.CHUNK_BYTES), b""))
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not JSON ({type(error).__name__}: {error})") from error
    found = values.get("format_version") if isinstance(values, dict) else None
    if found != version:
        raise CheckpointError(f"{file}: format version {found}, this program reads {version}")
    sha256 = hashlib.sha256(data[_SEAL_BYTES:]).hexdigest()
    if data[:_SEAL_BYTES] != _SEAL % sha256.encode():
        raise CheckpointError(f"{file}: sha256 is {sha256}, its first line says {values.get('sha256')}")
    return {key: value for key, value in values.items() if key != "sha256"}


@contextmanager
def opened(path: Path) -> Iterator[tuple[int, int]]:
    """Descriptor and size of a regular file; neither links nor devices are followed, and a pipe does not block.

    Raises:
        CheckpointError: there is none, or reading it fails.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode):
                raise CheckpointError(f"{path}: not a regular file")
            yield descriptor, about.st_size
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CheckpointError(f"{path}: unreadable ({error.strerror})") from error


def _lines(value: Any) -> str:
    if isinstance(value, list):
        return "[\n" + ",\n".join(json.dumps(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)
