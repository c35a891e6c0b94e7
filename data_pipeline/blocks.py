"""The table of a split's blocks: where each lies in its shard, and the digest that its bytes must have.

It is a flat file beside the shards, one row of 40 bytes per block, memory-mapped and checked shard by shard when a
shard is first opened: a table of any length costs no time and no memory at start.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import xxhash

# Byte offsets of the raw arrays in the tar, their lengths, and XXH3-128 over the bytes of both.
ROW = np.dtype(
    [("tokens_offset", "<u8"), ("starts_offset", "<u8"), ("n_tokens", "<u4"), ("n_starts", "<u4"), ("digest", "V16")]
)
STARTS_DTYPE = np.dtype("<u4")


def blocks_name(split: str) -> str:
    """File name of a split's table."""
    return f"{split}.blocks"


def block_digest(tokens: np.ndarray, starts: np.ndarray) -> bytes:
    """XXH3-128 over the raw bytes of a block's tokens and then of its document starts: 16 bytes.

    It finds accidents at memory speed; the SHA-256 of whole files in the manifest finds intent as well.
    """
    digest = xxhash.xxh3_128(tokens.data)
    digest.update(starts.data)
    return digest.digest()


def rows_digest(rows: np.ndarray) -> str:
    """SHA-256 of the rows of one shard, as the manifest keeps it."""
    return hashlib.sha256(rows.tobytes()).hexdigest()


def write_rows(path: Path, rows: np.ndarray) -> None:
    """Write a table; the same rows give the same bytes."""
    path.write_bytes(rows.astype(ROW).tobytes())


def map_rows(path: Path) -> np.ndarray:
    """The table as a read-only memory map; its size is checked with the manifest."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype=ROW)
    return np.asarray(np.memmap(path, dtype=ROW, mode="r"))


def faults_of(rows: np.ndarray, *, n_bytes: int, n_tokens: int, block_tokens: int, width: int) -> str | None:
    """What is wrong with the rows of one shard, or None.

    Args:
        rows: of the shard, in order.
        n_bytes: size of the shard file.
        n_tokens: of the shard.
        block_tokens: tokens in every block but the shard's last.
        width: bytes of a stored token id.
    """
    sizes = rows["n_tokens"].astype(np.int64)
    if int(sizes.sum()) != n_tokens or (sizes[:-1] != block_tokens).any() or not 0 < sizes[-1] <= block_tokens:
        return f"its blocks do not add up to {n_tokens} tokens in steps of {block_tokens}"
    offsets = rows["tokens_offset"].astype(np.int64)
    ends = np.maximum(offsets + width * sizes, rows["starts_offset"].astype(np.int64) + 4 * rows["n_starts"])
    if (offsets < 0).any() or (offsets % width).any() or (ends > n_bytes).any():
        return "a block does not fit into the file"
    return None
