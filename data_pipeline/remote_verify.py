"""Fetching every byte of prepared data behind a URL once and comparing it with its digest."""

from __future__ import annotations

from pathlib import Path

from transmamba.data_pipeline.errors import DamagedData, DataError
from transmamba.data_pipeline.progress import show_step
from transmamba.data_pipeline.remote import NotThere, Patience
from transmamba.data_pipeline.remote_shards import open_remote
from transmamba.data_pipeline.shard_cache import Cache
from transmamba.data_pipeline.verify import Fault, Verified

_N_AHEAD = 8


def verify_remote(url: str, scratch: Path, *, patience: Patience | None = None, progress: bool = True) -> Verified:
    """Check the SHA-256 of every shard as it lies behind the URL, and its manifest, tokenizer and tables.

    Args:
        url: of a folder made by `transmamba data prepare`.
        scratch: an empty folder, for a few shards at a time.
        patience: with errors of the network.
        progress: show progress on stderr.

    Raises:
        DataError: the folder or a shard cannot be reached, or the folder is unusable; nothing is known of it then.
        DamagedData: its manifest, its tokenizer or a table does not match its digest.
    """
    manifest, files = open_remote(url, Cache(scratch, 1 << 62), patience)
    n_shards = sum(len(split.shards) for split in manifest.splits.values())
    n_bytes = sum(shard.n_bytes for split in manifest.splits.values() for shard in split.shards)
    faults = []
    with show_step("verifying", n_bytes, visible=progress) as advance:
        for split in manifest.splits.values():
            for i, shard in enumerate(split.shards):
                files.expect([shard], split.shards[i + 1 :][:_N_AHEAD])
                try:
                    files.path(shard).unlink()
                except (DamagedData, NotThere) as error:
                    faults.append(Fault(error.what, error.problem, error.fix))
                except DataError:
                    # Whoever removes the scratch folder now must find nobody writing to it.
                    files.rest()
                    raise
                advance(shard.n_bytes)
    return Verified(n_bytes, n_shards, tuple(faults))
