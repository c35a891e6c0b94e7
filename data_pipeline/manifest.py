"""What a prepared folder holds: counts, offsets and digests of every shard, and checks that cost nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from transmamba.data_pipeline.errors import DamagedData, DataError
from transmamba.data_pipeline.text import nearest_existing

FORMAT = "transmamba-tokens"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
SPLITS = ("train", "validation")
# Token ids that each stored dtype can hold.
_DTYPE_LIMITS = {"<u2": 1 << 16, "<u4": 1 << 32}
# Where a tar header spells its format.
_TAR_MAGIC_OFFSET = 257
_TAR_MAGIC = b"ustar"
_REBUILD = "make it again with `transmamba data prepare`"
# Lower edges of the length bins: four per doubling, so a bin's lengths differ by at most 19 %.
LENGTH_EDGES = np.unique(np.ceil(2.0 ** (np.arange(160) / 4)).astype(np.int64))


@dataclass(frozen=True, slots=True)
class Block:
    """One block of a shard: byte offsets of the raw arrays in the tar, their lengths, a SHA-256 over both."""

    tokens_offset: int
    n_tokens: int
    starts_offset: int
    n_starts: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar file; `n_bytes` and `sha256` are those of the whole file."""

    name: str
    n_bytes: int
    sha256: str
    n_tokens: int
    n_documents: int
    min_token_id: int
    max_token_id: int
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class LengthBin:
    """Documents of `shortest` tokens or more, below the next bin: how many, and their tokens in all."""

    shortest: int
    n_documents: int
    n_tokens: int


@dataclass(frozen=True, slots=True)
class Split:
    """One stream of tokens. `gzip9_bits_per_byte` compresses the split's text (validation only)."""

    shards: tuple[Shard, ...]
    n_tokens: int
    n_documents: int
    n_text_bytes: int
    lengths: tuple[LengthBin, ...]
    gzip9_bits_per_byte: float | None


@dataclass(frozen=True, slots=True)
class Manifest:
    """Description of a prepared folder; `folder` is where it was read from."""

    tokenizer_file: str
    tokenizer_sha256: str
    vocab_size: int
    eod_id: int
    token_dtype: str
    source: str
    splits: dict[str, Split]
    folder: Path = field(default=Path(), compare=False)

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer.json these tokens were made with."""
        return self.folder / self.tokenizer_file


_Record = TypeVar("_Record", Block, Shard, LengthBin, Split, Manifest)


def length_bins(lengths: np.ndarray) -> tuple[LengthBin, ...]:
    """Histogram of document lengths in tokens, empty bins left out."""
    bins = np.searchsorted(LENGTH_EDGES, lengths, side="right") - 1
    counts = np.bincount(bins, minlength=1)
    sums = np.bincount(bins, weights=lengths, minlength=1)
    return tuple(LengthBin(int(LENGTH_EDGES[i]), int(counts[i]), int(sums[i])) for i in np.flatnonzero(counts).tolist())


def save_manifest(manifest: Manifest, folder: Path) -> None:
    """Write `manifest.json`; the same manifest gives the same bytes."""
    record = {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(manifest)}
    del record["folder"]
    for split in record["splits"].values():
        split["lengths"] = [list(entry.values()) for entry in split["lengths"]]
        for shard in split["shards"]:
            shard["blocks"] = [list(block.values()) for block in shard["blocks"]]
    (folder / MANIFEST_NAME).write_text(json.dumps(record, separators=(",", ":")) + "\n", encoding="utf-8")


def load_manifest(path: Path) -> Manifest:
    """Read the manifest of a prepared folder and check that its files are there, without reading tokens.

    Args:
        path: the folder, or the manifest file in it.

    Raises:
        DataError: no manifest, another format, a missing, truncated or foreign shard, token ids outside the
            vocabulary, a shard listed twice, or a missing tokenizer.
        DamagedData: the tokenizer file does not match its digest.
    """
    file = path / MANIFEST_NAME if path.is_dir() or path.name != MANIFEST_NAME else path
    if not file.is_file():
        make = "make one with `transmamba data prepare SRC... --out DIR`"
        raise DataError(str(file), "no such manifest", f"{nearest_existing(file)}, or {make}")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DataError(str(file), f"cannot be read ({error})", _REBUILD) from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise DataError(str(file), "not a manifest of tokens", "give a folder made by `transmamba data prepare`")
    if record.get("format_version") != FORMAT_VERSION:
        problem = f"format version {record.get('format_version')!r}, this program reads {FORMAT_VERSION}"
        raise DataError(str(file), problem, _REBUILD)
    try:
        manifest = _manifest_of(record, file.parent)
        _check_counts(manifest, file)
    except DataError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise DataError(str(file), f"damaged ({type(error).__name__}: {error})", _REBUILD) from error
    _check_tokenizer(manifest)
    for split in manifest.splits.values():
        for shard in split.shards:
            _check_shard(manifest, shard)
    return manifest


def _manifest_of(record: dict[str, Any], folder: Path) -> Manifest:
    fields = {key: value for key, value in record.items() if key not in ("format", "format_version", "splits")}
    splits = {}
    for name in SPLITS:
        split = dict(record["splits"][name])
        shards = [
            _checked(Shard(**{**shard, "blocks": tuple(_checked(Block(*block)) for block in shard["blocks"])}))
            for shard in split["shards"]
        ]
        bins = tuple(_checked(LengthBin(*entry)) for entry in split["lengths"])
        splits[name] = _checked(Split(**{**split, "shards": tuple(shards), "lengths": bins}))
    return _checked(Manifest(**fields, splits=splits, folder=folder))


def _checked(record: _Record) -> _Record:
    """JSON brings any type; every number here is a count, an offset or an id."""
    for entry in dataclasses.fields(record):
        value = getattr(record, entry.name)
        is_count = type(value) is int and value >= 0
        if (entry.type == "int" and not is_count) or (entry.type == "str" and not isinstance(value, str)):
            raise TypeError(f"{entry.name} is {value!r}")
    return record


def _check_counts(manifest: Manifest, file: Path) -> None:
    names = [shard.name for split in manifest.splits.values() for shard in split.shards]
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if doubled:
        raise DataError(str(file), f"lists {doubled[0]} twice", _REBUILD)
    for name in (*names, manifest.tokenizer_file):
        if Path(name).name != name:
            raise DataError(str(file), f"names {name!r}, which is not a plain file name", _REBUILD)
    if manifest.vocab_size > _DTYPE_LIMITS.get(manifest.token_dtype, 0):
        problem = f"{manifest.vocab_size} token ids do not fit the dtype {manifest.token_dtype!r}"
        raise DataError(str(file), problem, _REBUILD)
    for name, split in manifest.splits.items():
        if not split.shards or split.n_tokens != sum(shard.n_tokens for shard in split.shards):
            problem = f"the shards of {name} do not add up to {split.n_tokens} tokens"
            raise DataError(str(file), problem, _REBUILD)
        for shard in split.shards:
            if shard.n_tokens != sum(block.n_tokens for block in shard.blocks):
                problem = f"the blocks of {shard.name} do not add up to {shard.n_tokens} tokens"
                raise DataError(str(file), problem, _REBUILD)
            if not 0 <= shard.min_token_id <= shard.max_token_id < manifest.vocab_size:
                ids = f"{shard.min_token_id} to {shard.max_token_id}"
                problem = f"token ids {ids} with {manifest.vocab_size} in the vocabulary"
                raise DataError(shard.name, problem, f"the tokenizer does not belong to it; {_REBUILD}")
    if not 0 <= manifest.eod_id < manifest.vocab_size:
        problem = f"end-of-document id {manifest.eod_id} is outside the vocabulary of {manifest.vocab_size}"
        raise DataError(str(file), problem, _REBUILD)


def _check_tokenizer(manifest: Manifest) -> None:
    path = manifest.tokenizer_path
    if not path.is_file():
        raise DataError(str(path), "the tokenizer of these tokens is missing", f"copy it back or {_REBUILD}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != manifest.tokenizer_sha256:
        raise DamagedData(str(path), "does not match the digest in the manifest", f"copy it back or {_REBUILD}")


def _check_shard(manifest: Manifest, shard: Shard) -> None:
    path = manifest.folder / shard.name
    if not path.is_file():
        raise DataError(str(path), "the shard is missing", f"copy it back or {_REBUILD}")
    size = path.stat().st_size
    if size != shard.n_bytes:
        problem = f"{size} bytes instead of {shard.n_bytes}, so it is truncated or replaced"
        raise DataError(str(path), problem, f"copy it again or {_REBUILD}")
    try:
        with path.open("rb") as file:
            file.seek(_TAR_MAGIC_OFFSET)
            magic = file.read(len(_TAR_MAGIC))
    except OSError as error:
        raise DataError(str(path), f"cannot be read ({error.strerror})", "check its permissions") from error
    if magic != _TAR_MAGIC:
        raise DataError(str(path), "not a tar file", f"copy it again or {_REBUILD}")
    width = np.dtype(manifest.token_dtype).itemsize
    for block in shard.blocks:
        end = max(block.tokens_offset + width * block.n_tokens, block.starts_offset + 4 * block.n_starts)
        if end > size:
            problem = f"the block at byte {block.tokens_offset} does not fit into the file"
            raise DataError(str(path), problem, _REBUILD)
