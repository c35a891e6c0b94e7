"""The parts of a shard that are not tokens: tar headers, npy headers and padding, which plain readers go by."""

from __future__ import annotations

import io
import tarfile
import tokenize
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from transmamba.data_pipeline.blocks import STARTS_DTYPE
from transmamba.data_pipeline.shards import STARTS_MEMBER, TOKENS_MEMBER

_BLOCK = tarfile.BLOCKSIZE
_END = 2 * _BLOCK


def framing_faults(data: np.ndarray, rows: np.ndarray, dtype: np.dtype) -> Iterator[str]:
    """Compare what stands between the arrays of a shard with what the table of blocks says of them.

    Without a fault any tar reader finds the members in the order of the blocks, and any npy reader their arrays.

    Args:
        data: bytes of the whole shard, uint8.
        rows: of the shard in the table, which agree with its digest.
        dtype: of the stored token ids.

    Yields:
        one line per damaged part, with its bytes (end excluded); nothing after the end of a cut file.
    """
    position, keys = 0, set[str]()
    for number, row in enumerate(rows):
        members = ((STARTS_MEMBER, STARTS_DTYPE, "starts"), (TOKENS_MEMBER, dtype, "tokens"))
        names = []
        for name, kind, column in members:
            offset, count = int(row[f"{column}_offset"]), int(row[f"n_{column}"])
            if offset + kind.itemsize * count > len(data):
                return
            header_at = -(-position // _BLOCK) * _BLOCK
            if data[position:header_at].any():
                yield f"the padding at bytes {position} to {header_at} is not zero"
            member, fault = _member(data[header_at:offset].tobytes(), kind, count)
            if fault or not member.endswith(f".{name}"):
                where = f"bytes {header_at} to {offset}"
                yield f"the header of block {number}'s {column} at {where} {fault or f'names {member!r}'}"
            names.append(member.removesuffix(f".{name}"))
            position = offset + kind.itemsize * count
        if len(set(names)) > 1 or keys & set(names):
            yield f"block {number} is named {' and '.join(names)}, which is not a key of its own"
        keys |= set(names)
    if data[position:].any() or len(data) - position < _END:
        yield f"the end of the archive at bytes {position} to {len(data)} is not zero"


def _member(header: bytes, dtype: np.dtype, count: int) -> tuple[str, str | None]:
    """Name of the member that a tar header and an npy header announce, and what is wrong with them."""
    try:
        member = tarfile.TarInfo.frombuf(header[:_BLOCK], "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeError) as error:
        return "", f"is damaged ({error})"
    size = len(header) - _BLOCK + dtype.itemsize * count
    if not member.isreg() or member.size != size:
        return member.name, f"does not announce a file of {size} bytes"
    if member.tobuf(tarfile.USTAR_FORMAT) != header[:_BLOCK]:
        return member.name, "is damaged"
    return member.name, _npy_fault(header[_BLOCK:], dtype, count)


@lru_cache(maxsize=64)  # nearly all blocks have the same one
def _npy_fault(header: bytes, dtype: np.dtype, count: int) -> str | None:
    npy = io.BytesIO(header)
    try:
        version = np.lib.format.read_magic(npy)
        shape, _, found = np.lib.format.read_array_header_1_0(npy)
    except (ValueError, SyntaxError, tokenize.TokenError) as error:
        return f"is damaged ({str(error).splitlines()[0]})"
    if version != (1, 0) or shape != (count,) or found != dtype or npy.tell() != len(header):
        return f"announces {shape} of {found} instead of {count} of {dtype}"
    return None
