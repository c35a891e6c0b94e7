"""Reading every byte of prepared data once and comparing it with its digest."""

from __future__ import annotations

import hashlib

from transmamba.data_pipeline.errors import DamagedData
from transmamba.data_pipeline.manifest import Manifest
from transmamba.data_pipeline.progress import show_step


def verify_shards(manifest: Manifest, *, progress: bool = True) -> int:
    """Check the SHA-256 of every shard file; blocks are checked again whenever they are read.

    Returns:
        the number of bytes read.

    Raises:
        DamagedData: names all the shards that do not match.
    """
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    n_bytes = sum(shard.n_bytes for shard in shards)
    damaged = []
    with show_step("verifying shards", n_bytes, visible=progress) as advance:
        for shard in shards:
            with (manifest.folder / shard.name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                    damaged.append(shard.name)
            advance(shard.n_bytes)
    if damaged:
        problem = f"{len(damaged)} of {len(shards)} shards do not match their digest ({', '.join(damaged)})"
        raise DamagedData(str(manifest.folder), problem, "copy them again or run `transmamba data prepare`")
    return n_bytes
