"""A prepared folder opened for reading, wherever it lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transmamba.data_pipeline.manifest import Manifest, load_manifest
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


def open_folder(place: str, cache: Cache) -> PreparedFolder:
    """Open a folder made by `transmamba data prepare`.

    Args:
        place: its path, or its URL for fsspec (s3://, gs://, https://, memory://, ...).
        cache: for the shards of a URL.

    Raises:
        DataError: it is not there, or unusable, or cannot be reached.
        DamagedData: its manifest or tokenizer does not match its digest.
    """
    if is_remote(place):
        return PreparedFolder(*open_remote(place, cache))
    manifest = load_manifest(Path(place))
    return PreparedFolder(manifest, LocalFiles(manifest.folder))
