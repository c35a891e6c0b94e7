"""The second pass over the input: a part becomes shards of tokens, and all parts together a prepared split."""

from __future__ import annotations

import dataclasses
import hashlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from transmamba.data_pipeline.blocks import map_rows, rows_digest
from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.holdout import Holdout, text_fraction
from transmamba.data_pipeline.manifest import SPLITS, LengthBin, Shard, Split, check_shard
from transmamba.data_pipeline.parts import Part, Reading
from transmamba.data_pipeline.records import load_record, save_bytes, save_record
from transmamba.data_pipeline.shards import ShardWriter, Written, join_parts
from transmamba.data_pipeline.spelling import Spelling
from transmamba.data_pipeline.survey import DIGEST_BYTES, surveyed_digests
from transmamba.data_pipeline.tokenizer import BATCH_CHARS, batches, encode_documents, load_tokenizer
from transmamba.data_pipeline.workers import Advance

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SHARDS = "shards"
TOKENIZER_NAME = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How text becomes shards; the arguments of `transmamba data prepare` by these names.

    The tokenizer is `tokenizer.json` in the work folder, with this SHA-256.
    """

    field: str
    seed: int
    holdout: Holdout
    tokenizer_sha256: str
    eod_id: int
    dtype: str
    shard_tokens: int
    block_tokens: int


@dataclass(frozen=True, slots=True)
class _Piece:
    split: str
    name: str
    text: str
    data: bytes


def encode_part(
    number: int, part: Part, left_out: np.ndarray, n_expected: int, recipe: Recipe, folder: Path, advance: Advance
) -> None:
    """Write the shards of a part, their rows of the tables and, last, the record that says they are complete.

    Args:
        number: of the part.
        part: what to read.
        left_out: numbers of the documents that are not taken, sorted.
        n_expected: documents that the first pass found.
        recipe: how.
        folder: the work folder.
        advance: told the bytes read and the tokens written.

    Raises:
        DataError: as `Reading.documents`, or the text is not what the first pass read, or a document has the
            end-of-document token in it or does not come back from its tokens.
    """
    tokenizer, spelling = _tokenizer(folder, recipe.tokenizer_sha256)
    sizes = {"shard_tokens": recipe.shard_tokens, "block_tokens": recipe.block_tokens}
    writers: dict[str, ShardWriter] = {
        split: ShardWriter(
            folder / SHARDS, f"{split}-{number:06d}", dtype=np.dtype(recipe.dtype), eod_id=recipe.eod_id, **sizes
        )
        for split in SPLITS
    }
    n_text_bytes: dict[str, int] = dict.fromkeys(SPLITS, 0)
    gzip, n_gzip_bytes, n_bytes = zlib.compressobj(level=9, wbits=31), 0, 0
    n_changed = 0
    reading = Reading(part, recipe.field)
    texts = _split(number, reading, left_out, n_expected, surveyed_digests(number, folder), recipe)
    for batch in batches(texts, BATCH_CHARS, size=lambda piece: len(piece.text)):
        encoded = encode_documents(tokenizer, [piece.text for piece in batch], eod_id=recipe.eod_id)
        for piece, tokens in zip(batch, encoded, strict=True):
            _add(writers[piece.split], piece.name, tokens)
            n_changed += not spelling.is_kept(tokens, piece.data, name=piece.name)
            n_text_bytes[piece.split] += len(piece.data)
            if piece.split == "validation":
                n_gzip_bytes += len(gzip.compress(piece.data))
        advance(reading.n_bytes - n_bytes, sum(map(len, encoded)))
        n_bytes = reading.n_bytes
    n_gzip_bytes += len(gzip.flush())
    record: dict[str, Any] = {
        "n_gzip_bytes": n_gzip_bytes if n_text_bytes["validation"] else 0,
        "n_changed": n_changed,
    }
    for split, writer in writers.items():
        written = writer.finish()
        save_bytes(_rows_path(folder, number, split), written.rows.tobytes())
        record[split] = {
            "n_text_bytes": n_text_bytes[split],
            "shards": [dataclasses.asdict(shard) for shard in written.shards],
            "lengths": [dataclasses.astuple(entry) for entry in written.lengths],
        }
    save_record(_record_path(folder, number), record)


def is_encoded(number: int, folder: Path) -> bool:
    """Whether an earlier run has finished this part, and all of it is still there."""
    if not _record_path(folder, number).exists():
        return False
    try:
        for shard in (shard for split in SPLITS for shard in _written(folder, number, split).shards):
            check_shard(folder / SHARDS / shard.name, shard)
    except DataError:
        return False
    return True


def join_splits(folder: Path, n_parts: int) -> dict[str, Split]:
    """Give the shards of all parts their final names and write the tables beside them."""
    records = [load_record(_record_path(folder, i)) for i in range(n_parts)]
    splits = {}
    for split in SPLITS:
        n_text_bytes = sum(record[split]["n_text_bytes"] for record in records)
        if not n_text_bytes:
            raise source_changed()
        n_gzip_bytes = sum(record["n_gzip_bytes"] for record in records)
        splits[split] = join_parts(
            folder / SHARDS,
            split,
            [_written(folder, i, split) for i in range(n_parts)],
            n_text_bytes=n_text_bytes,
            gzip9_bits_per_byte=8 * n_gzip_bytes / n_text_bytes if split == "validation" else None,
        )
    return splits


def count_changed(folder: Path, n_parts: int) -> int:
    """Documents of encoded parts whose tokens spell other, equivalent characters; see `Spelling.is_kept`."""
    # Parts that an older program encoded have no count.
    return sum(load_record(_record_path(folder, i)).get("n_changed", 0) for i in range(n_parts))


def undo_join(folder: Path, n_parts: int) -> None:
    """Give shards that already had their final names when a run was interrupted those of their parts again."""
    shards = folder / SHARDS
    if not all(_record_path(folder, i).exists() for i in range(n_parts)):
        return
    for split in SPLITS:
        names = [shard.name for i in range(n_parts) for shard in _written(folder, i, split).shards]
        for i, name in enumerate(names):
            final = shards / f"{split}-{i:06d}.tar"
            if final.exists() and not (shards / name).exists():
                final.rename(shards / name)


def source_changed(name: str = "sources") -> DataError:
    """What is raised when the second pass reads something else than the first."""
    return DataError(name, "the text changed while it was read", "run it again")


@lru_cache(maxsize=1)
def _tokenizer(folder: Path, sha256: str) -> tuple[Tokenizer, Spelling]:
    path = folder / TOKENIZER_NAME
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise DataError(str(path), "was changed while it was used", "run it again")
    tokenizer = load_tokenizer(path)
    return tokenizer, Spelling(tokenizer)


def _split(
    number: int, reading: Reading, left_out: np.ndarray, n_expected: int, digests: bytes, recipe: Recipe
) -> Iterator[_Piece]:
    skipped = set(left_out.tolist())
    cut = recipe.holdout.cut
    n_documents = 0
    for i, document in enumerate(reading.documents()):
        n_documents += 1
        data = document.text.encode("utf-8")
        if xxhash.xxh3_128_digest(data) != digests[DIGEST_BYTES * i : DIGEST_BYTES * (i + 1)]:
            raise source_changed(f"{document.name} or one before it")
        if cut and (number, i) == (cut.part, cut.document):
            start, end = document.text[: cut.at], document.text[cut.at :]
            yield _Piece("train", document.name, start, start.encode("utf-8"))
            yield _Piece("validation", document.name, end, end.encode("utf-8"))
        elif i not in skipped:
            split = "validation" if text_fraction(data, recipe.seed) < recipe.holdout.threshold else "train"
            yield _Piece(split, document.name, document.text, data)
    if n_documents != n_expected:
        raise source_changed()


def _add(writer: ShardWriter, name: str, tokens: np.ndarray) -> None:
    try:
        writer.add(tokens)
    except DataError as error:
        raise DataError(name, error.problem, error.fix) from error


def _written(folder: Path, number: int, split: str) -> Written:
    record = load_record(_record_path(folder, number))[split]
    shards = tuple(Shard(**shard) for shard in record["shards"])
    rows = map_rows(_rows_path(folder, number, split))
    first = 0
    for shard in shards:
        if rows_digest(rows[first : first + shard.n_blocks]) != shard.blocks_sha256:
            path = _rows_path(folder, number, split)
            raise DataError(str(path), "does not match its digest", f"remove {folder} and run it again")
        first += shard.n_blocks
    return Written(shards, rows, tuple(LengthBin(*entry) for entry in record["lengths"]))


def _rows_path(folder: Path, number: int, split: str) -> Path:
    return folder / f"part-{number:06d}.{split}.rows"


def _record_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06d}.json"
