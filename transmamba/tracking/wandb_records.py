"""Which steps wandb's offline files of a run hold: they are the only memory that offline attempts share."""

import struct
from collections.abc import Iterator
from pathlib import Path

_HEADER_BYTES, _BLOCK_BYTES, _FRAME = 7, 32768, struct.Struct("<IHB")  # checksum, length, kind
_FULL, _LAST = 1, 4  # kinds of the piece that ends a record


def offline_steps(folder: Path) -> set[int]:
    """Steps in all offline files under `folder`/wandb. A file that a kill has cut counts as far as it goes."""
    paths, found = list(folder.glob("wandb/offline-run-*/run-*.wandb")), set[int]()
    if not paths:
        return found
    from google.protobuf.message import DecodeError
    from wandb.proto import wandb_internal_pb2 as messages

    for path in paths:
        try:
            for data in _records(path.read_bytes()):
                record = messages.Record.FromString(data)  # pyright: ignore[reportAttributeAccessIssue]
                if record.HasField("history"):
                    found.add(record.history.step.num)
        except (OSError, DecodeError):
            continue
    return found


def _records(data: bytes) -> Iterator[bytes]:
    """The records of LevelDB's log format, which wandb writes after a header of its own."""
    offset, parts = _HEADER_BYTES, b""
    while offset + _FRAME.size <= len(data):
        left = _BLOCK_BYTES - offset % _BLOCK_BYTES
        if left < _FRAME.size:
            offset += left
            continue
        _, n_bytes, kind = _FRAME.unpack_from(data, offset)
        begin = offset + _FRAME.size
        offset = begin + n_bytes
        if offset > len(data):
            return
        parts += data[begin:offset]
        if kind in (_FULL, _LAST):
            yield parts
            parts = b""
