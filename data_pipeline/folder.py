"""A prepared folder opened for reading, wherever it lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transmamba.data_pipeline.manifest import Manifest, load_manifest
from transmamba.data_pipeline.remote import Patience
from transmamba.data_pipeline.remote_shards import CachedStore, RemoteFiles, open_remote
from transmamba.data_pipeline.shard_cache import Cache
from transmamba.data_pipeline.tokens import LocalFiles, ShardFiles, TokenStore


@dataclass(frozen=True)
class PreparedFolder:
    """A manifest and the way to its shards."""

    manifest: Manifest
    files: ShardFiles

    def store(self, split: str) -> TokenStore:
        """The tokens of "train" or "validation"."""
        if isinstance(self.files, RemoteFiles):
            return CachedStore(self.manifest, split, self.files)
        return TokenStore(self.manifest, split, self.files)


# Shards whose windows are shuffled together when they have to be fetched.
REMOTE_GROUP = 16


def is_remote(place: str) -> bool:
    """Whether a place is a URL and not a path."""
    return "://" in place


def open_folder(
    place: str, cache: Cache, patience: Patience | None = None, *, is_known: bool = False
) -> PreparedFolder:
    """Open a folder made by `transmamba data prepare`.

    Args:
        place: its path, or its URL for fsspec (s3://, gs://, https://, memory://, ...).
        cache: for the shards of a URL.
        patience: with errors of the network.
        is_known: whether its store has answered in another process.

    Raises:
        DataError: it is not there, or unusable, or cannot be reached.
        Unreachable: it cannot be reached, but has answered before.
        DamagedData: its manifest or tokenizer does not match its digest.
    """
    if is_remote(place):
        return PreparedFolder(*open_remote(place, cache, patience, is_known=is_known))
    manifest = load_manifest(Path(place))
    return PreparedFolder(manifest, LocalFiles(manifest.folder))
