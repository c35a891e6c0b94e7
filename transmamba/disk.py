"""The few changes that a save makes on disk. All of them pass here, so one can record, refuse or stop at each."""

import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

CHUNK_BYTES = 8 << 20


def make_folder(path: Path) -> None:
    """A new, empty folder in the place of whatever is there."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file in the place of any former one; its bytes are on the medium when this returns.

    Raises:
        OSError: the file system refused; it names the file, and what was written so far may be there.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        offset = begun = 0
        for part in parts:
            for chunk in chunks(part):
                write_chunk(descriptor, chunk)
                offset += len(chunk)
                if offset - begun >= CHUNK_BYTES:
                    # Linux begins to write these pages now instead of at the end, while the next ones are prepared.
                    os.posix_fadvise(descriptor, begun, offset - begun, os.POSIX_FADV_DONTNEED)
                    begun = offset
        sync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def chunks(data: bytes | memoryview) -> Iterable[memoryview]:
    """`data` in pieces of at most CHUNK_BYTES."""
    view = memoryview(data)
    return (view[start : start + CHUNK_BYTES] for start in range(0, len(view), CHUNK_BYTES))


def write_chunk(descriptor: int, chunk: memoryview) -> None:
    """All of `chunk`: near a limit the system takes less than it is given."""
    while chunk:
        chunk = chunk[os.write(descriptor, chunk) :]


def sync(descriptor: int) -> None:
    """Until the medium has it."""
    os.fsync(descriptor)


def sync_folder(path: Path) -> None:
    """Make the names in a folder as durable as the files."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems know no such thing
            raise
    finally:
        os.close(descriptor)


def rename(old: Path, new: Path) -> None:
    """Give `old` the name `new` at once, in the place of any file of that name."""
    os.replace(old, new)


def remove(path: Path) -> None:
    """Delete a file or a whole folder."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
