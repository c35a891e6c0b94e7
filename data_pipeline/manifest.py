"""What a prepared folder holds: counts and digests of every shard, and checks that cost nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from transmamba.data_pipeline.blocks import ROW, blocks_name
from transmamba.data_pipeline.errors import DamagedData, DataError
from transmamba.data_pipeline.text import nearest_existing

FORMAT = "transmamba-tokens"
FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
SPLITS = ("train", "validation")
# Token ids that each stored dtype can hold.
_DTYPE_LIMITS = {"<u2": 1 << 16, "<u4": 1 << 32}
# Where a tar header spells its format.
_TAR_MAGIC_OFFSET = 257
_TAR_MAGIC = b"ustar"
_REBUILD = "make it again with `transmamba data prepare --replace`"
# Lower edges of the length bins: four per doubling, so a bin's lengths differ by at most 19 %.
LENGTH_EDGES = np.unique(np.ceil(2.0 ** (np.arange(160) / 4)).astype(np.int64))


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar file; `n_bytes` and `sha256` are those of the whole file, `blocks_sha256` of its rows in the table."""

    name: str
    n_bytes: int
    sha256: str
    n_tokens: int
    n_documents: int
    n_blocks: int
    blocks_sha256: str
    min_token_id: int
    max_token_id: int


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
    """Description of a prepared folder; `folder` is where it was read from.

    Every document ends with `eod_id`, which is nowhere else. All blocks of a shard but its last have
    `block_tokens` tokens.
    """

    tokenizer_file: str
    tokenizer_sha256: str
    vocab_size: int
    eod_id: int
    token_dtype: str
    block_tokens: int
    source: str
    splits: dict[str, Split]
    folder: Path = field(default=Path(), compare=False)

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer.json these tokens were made with."""
        return self.folder / self.tokenizer_file


_Record = TypeVar("_Record", Shard, LengthBin, Split, Manifest)


def save_manifest(manifest: Manifest, folder: Path) -> None:
    """Write `manifest.json`; the same manifest gives the same bytes."""
    record = {"format": FORMAT, "format_version": FORMAT_VERSION, **dataclasses.asdict(manifest)}
    del record["folder"]
    for split in record["splits"].values():
        split["lengths"] = [list(entry.values()) for entry in split["lengths"]]
    record["sha256"] = _digest_of(record)
    (folder / MANIFEST_NAME).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _digest_of(record: dict[str, Any]) -> str:
    """SHA-256 of everything in a manifest but this digest itself."""
    rest = {key: value for key, value in record.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, separators=(",", ":"), sort_keys=True).encode("utf-8")).hexdigest()


def load_manifest(path: Path) -> Manifest:
    """Read the manifest of a prepared folder and check that its files are there, without reading tokens.

    Args:
        path: the folder, or the manifest file in it.

    Raises:
        DataError: no manifest, another format, a missing, truncated or foreign shard, token ids outside the
            vocabulary, a shard listed twice, or a missing tokenizer.
        DamagedData: the manifest or the tokenizer file does not match its digest.
    """
    file = path / MANIFEST_NAME if path.is_dir() or path.name != MANIFEST_NAME else path
    if not file.is_file():
        below = sorted(path.glob(f"*/{MANIFEST_NAME}")) if path.is_dir() else []
        advice = f"did you mean {below[0].parent}" if below else nearest_existing(file)
        make = "make one with `transmamba data prepare SRC... --out DIR`"
        raise DataError(str(file), "no such manifest", f"{advice}, or {make}")
    manifest = read_manifest(file)
    for name, split in manifest.splits.items():
        _check_blocks(manifest.folder / blocks_name(name), split)
        for shard in split.shards:
            check_shard(manifest.folder / shard.name, shard)
    return manifest


def read_manifest(file: Path) -> Manifest:
    """Read a manifest and the tokenizer beside it; whether the shards are there is not asked.

    Raises:
        DataError, DamagedData: as `load_manifest`.
    """
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(str(file), f"cannot be read ({error})", _REBUILD) from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise DataError(str(file), "not a manifest of tokens", "give a folder made by `transmamba data prepare`")
    if record.get("format_version") != FORMAT_VERSION:
        problem = f"format version {record.get('format_version')!r}, this program reads {FORMAT_VERSION}"
        raise DataError(str(file), problem, _REBUILD)
    if record.get("sha256") != _digest_of(record):
        raise DamagedData(str(file), "does not match its own digest", f"copy it again or {_REBUILD}")
    try:
        manifest = _manifest_of(record, file.parent)
        _check_counts(manifest, file)
    except DataError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise DataError(str(file), f"damaged ({type(error).__name__}: {error})", _REBUILD) from error
    _check_tokenizer(manifest)
    return manifest


_OUTER = ("format", "format_version", "sha256", "splits")


def _manifest_of(record: dict[str, Any], folder: Path) -> Manifest:
    fields = {key: value for key, value in record.items() if key not in _OUTER}
    splits = {}
    for name in SPLITS:
        split = dict(record["splits"][name])
        shards = [_checked(Shard(**shard)) for shard in split["shards"]]
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
            if shard.n_blocks != -(-shard.n_tokens // manifest.block_tokens) or not shard.n_tokens:
                problem = f"{shard.name} has {shard.n_blocks} blocks for {shard.n_tokens} tokens"
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


def _check_blocks(path: Path, split: Split) -> None:
    n_bytes = ROW.itemsize * sum(shard.n_blocks for shard in split.shards)
    size = path.stat().st_size if path.is_file() else None
    if size != n_bytes:
        problem = "the table of blocks is missing" if size is None else f"{size} bytes instead of {n_bytes}"
        raise DataError(str(path), problem, f"copy it again or {_REBUILD}")


def check_shard(path: Path, shard: Shard) -> None:
    """Compare a shard file with its record by size and kind.

    Raises:
        DataError: it is missing, truncated, unreadable or no tar.
    """
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
