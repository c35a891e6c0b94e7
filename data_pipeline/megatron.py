"""Token data of Megatron-LM (`PREFIX.bin` and `PREFIX.idx`) in and out.

E vocabulary entries.
"""

from __future__ import annotations

import hashlib
import struct
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.manifest import Manifest, Split, load_manifest, save_manifest
from transmamba.data_pipeline.progress import show_step
from transmamba.data_pipeline.publish import check_target, publish_folder
from transmamba.data_pipeline.shards import BLOCK_TOKENS, SHARD_TOKENS, ShardWriter, join_parts
from transmamba.data_pipeline.tokenizer import END_OF_TEXT, end_of_text_id, load_tokenizer, token_bytes, vocab_size_of
from transmamba.data_pipeline.tokens import TokenStore

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from tokenizers import Tokenizer

TOKENIZER_NAME = "tokenizer.json"
_PIECE = 1 << 22
# An index begins with its magic, version, code of the numbers, sequences and bounds of documents.
_HEADER = struct.Struct("<9sQBQQ")
# uint8, int8, int16, int32, int64, uint16 of Megatron's table.
_TOKEN_CODES = (1, 2, 3, 4, 5, 8)
_FIX = "copy it again, or give the PREFIX of Megatron's PREFIX.bin and PREFIX.idx"


@dataclass(slots=True)
class Imported:
    """What became of the documents of a prefix."""

    n_read: int = 0
    n_empty: int = 0
    """Had no token and were left out."""
    n_ended: int = 0
    """Did not end with the end-of-document id and got one."""
    n_cut: int = 0
    """Had it inside as well and were cut there."""
    n_written: int = 0


def export_megatron(manifest: Manifest, prefix: Path, split: str, *, progress: bool = True) -> int:
    """Write one split as `PREFIX.bin` and `PREFIX.idx`, a sequence per document, its end-of-document id included.

    Ids are uint16 below 65,500 vocabulary entries, int32 otherwise, as Megatron chooses them.

    Returns:
        the number of documents.

    Raises:
        DataError: no such split, or the files exist or cannot be made.
        DamagedData: a block does not match its digest.
    """
    if not prefix.name:
        raise DataError(str(prefix), "names no file", "give FOLDER/NAME as --out")
    store = TokenStore(manifest, split)
    targets = [prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx")]
    for target in targets:
        if target.exists():
            raise DataError(str(target), "exists already", "choose another --out or remove it")
    module, n_documents = _indexed_dataset(), 0
    with _folder_beside(prefix) as aside, show_step("exporting", store.n_tokens, visible=progress) as advance:
        parts = [Path(aside) / target.name for target in targets]
        builder = module.IndexedDatasetBuilder(str(parts[0]), dtype=module.DType.optimal_dtype(manifest.vocab_size))
        for document in _documents_of(store):
            builder.add_document(document, [len(document)])
            n_documents += 1
            advance(len(document))
        builder.finalize(str(parts[1]))
        # The index last: without one there is no data set.
        for part, target in zip(parts, targets, strict=True):
            part.rename(target)
    return n_documents


def _folder_beside(prefix: Path) -> tempfile.TemporaryDirectory[str]:
    try:
        return tempfile.TemporaryDirectory(prefix=f".{prefix.name}.", dir=prefix.parent)
    except OSError as error:
        problem = f"its folder cannot be written ({error.strerror})"
        raise DataError(str(prefix), problem, "choose an --out in a folder that you can write") from error


def _documents_of(store: TokenStore) -> Iterator[np.ndarray]:
    """Documents in the order of the text, whatever blocks and shards they lie in."""
    rest = np.empty(0, dtype=store.dtype)
    for first in range(0, store.n_tokens, _PIECE):
        piece = store.read(first, min(first + _PIECE, store.n_tokens))
        *whole, tail = np.split(piece, np.flatnonzero(piece == store.eod_id) + 1)
        for document in whole:
            yield np.concatenate([rest, document]) if len(rest) else document
            rest = rest[:0]
        rest = np.concatenate([rest, tail])


def import_megatron(
    prefix: Path,
    tokenizer: Path,
    out: Path,
    *,
    validation: Path | None = None,
    validation_share: float = 0.02,
    eod_token: str = END_OF_TEXT,
    shard_tokens: int = SHARD_TOKENS,
    block_tokens: int = BLOCK_TOKENS,
    seed: int = 17,
    replace: bool = False,
    progress: bool = True,
) -> tuple[Manifest, Imported]:
    """Turn `PREFIX.bin` and `PREFIX.idx` into a folder like those of `transmamba data prepare`.

    Args:
        prefix: of the two files.
        tokenizer: the tokenizer.json that the tokens were made with, byte-level.
        out: folder to make.
        validation: prefix of the validation split; None holds out documents by the hash of their tokens.
        validation_share: part of the documents to hold out, 0 to 1.
        eod_token: special token that ends a document.
        shard_tokens: most tokens in a shard.
        block_tokens: tokens in a block.
        seed: of the hash.
        replace: take the place of prepared data that are there.
        progress: show progress on stderr.

    Raises:
        DataError: a file is missing, damaged or of another tokenizer, nothing is held out or what is trained on, or
            the target has files.
    """
    check_target(out, keep=not replace)
    if not 0 < validation_share < 1:
        raise DataError("validation_share", f"{validation_share} is no share", "use a number between 0 and 1")
    vocabulary = load_tokenizer(tokenizer)
    target = _Target(vocabulary, eod_token, shard_tokens, block_tokens)
    train = _Reader(prefix, target)
    held_out = None if validation is None else _other_reader(validation, prefix, target)
    counts = Imported()
    with publish_folder(out, replace=True) as folder:
        vocabulary.save(str(folder / TOKENIZER_NAME))
        writers = {name: _SplitOf(folder, name, target) for name in ("train", "validation")}
        with show_step("importing", train.n_tokens, visible=progress) as advance:
            for document in train.documents(counts):
                is_held = held_out is None and _fraction(document, seed) < validation_share
                writers["validation" if is_held else "train"].add(document)
                advance(len(document))
        for document in held_out.documents(counts) if held_out else ():
            writers["validation"].add(document)
        splits = {name: writer.finish() for name, writer in writers.items()}
        for name, split in splits.items():
            if not split.n_tokens:
                fix = "use another --validation-share, or give --validation PREFIX"
                raise DataError(str(prefix), f"no document is left for {name}", fix)
        manifest = Manifest(
            tokenizer_file=TOKENIZER_NAME,
            tokenizer_sha256=hashlib.sha256((folder / TOKENIZER_NAME).read_bytes()).hexdigest(),
            vocab_size=target.vocab_size,
            eod_id=target.eod_id,
            token_dtype=target.dtype.str,
            block_tokens=block_tokens,
            source=f"Megatron data {prefix}",
            splits=splits,
        )
        save_manifest(manifest, folder)
    return load_manifest(out), counts


class _Target:
    """The vocabulary that documents must fit, and how they are stored."""

    def __init__(self, tokenizer: Tokenizer, eod_token: str, shard_tokens: int, block_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.n_bytes_E = token_bytes(tokenizer)
        self.vocab_size = vocab_size_of(tokenizer)
        self.eod_id = end_of_text_id(tokenizer, eod_token)
        self.dtype = np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")
        self.sizes = {"shard_tokens": shard_tokens, "block_tokens": block_tokens}


class _SplitOf:
    """Writes one split and measures its text."""

    def __init__(self, folder: Path, name: str, target: _Target) -> None:
        self._folder, self._name, self._target = folder, name, target
        self._writer = ShardWriter(folder, name, dtype=target.dtype, eod_id=target.eod_id, **target.sizes)
        self._gzip = zlib.compressobj(level=9, wbits=31)
        self._n_text_bytes = self._n_gzip_bytes = 0

    def add(self, document: np.ndarray) -> None:
        """Append a document, its end included."""
        self._writer.add(document)
        self._n_text_bytes += int(self._target.n_bytes_E[document].sum())
        if self._name == "validation":
            text = self._target.tokenizer.decode(document[:-1].tolist(), skip_special_tokens=False)
            self._n_gzip_bytes += len(self._gzip.compress(text.encode("utf-8")))

    def finish(self) -> Split:
        """Write what is left."""
        bits = None
        if self._name == "validation" and self._n_text_bytes:
            bits = 8 * (self._n_gzip_bytes + len(self._gzip.flush())) / self._n_text_bytes
        written = [self._writer.finish()]
        return join_parts(self._folder, self._name, written, n_text_bytes=self._n_text_bytes, gzip9_bits_per_byte=bits)


class _Reader:
    """Documents of one prefix, each with one end-of-document id, at its end."""

    def __init__(self, prefix: Path, target: _Target) -> None:
        self._prefix, self._target = prefix, target
        self._data = _open(prefix)
        self.n_tokens = int(self._data.sequence_lengths.sum(dtype=np.int64))

    def documents(self, counts: Imported) -> Iterator[np.ndarray]:
        """All documents in order; what had to be done to them is added to `counts`.

        Raises:
            DataError: a token id is not in the vocabulary.
        """
        eod_id, vocab_size = self._target.eod_id, self._target.vocab_size
        bounds = self._data.document_indices
        for number in range(len(bounds) - 1):
            counts.n_read += 1
            sequences = [self._data[i] for i in range(int(bounds[number]), int(bounds[number + 1]))]
            tokens = np.concatenate(sequences) if sequences else np.empty(0, dtype=np.int64)
            if not len(tokens):
                counts.n_empty += 1
                continue
            low, high = int(tokens.min()), int(tokens.max())
            if low < 0 or high >= vocab_size:
                problem = f"token id {low if low < 0 else high} with {vocab_size} in the vocabulary"
                fix = "give the tokenizer that the data was made with as --tokenizer"
                raise DataError(f"document {number} of {self._prefix}", problem, fix)
            ends = np.flatnonzero(tokens == eod_id) + 1
            if not len(ends) or ends[-1] != len(tokens):
                counts.n_ended += 1
                tokens = np.append(tokens, eod_id)
                ends = np.append(ends, len(tokens))
            counts.n_cut += len(ends) > 1
            counts.n_written += len(ends)
            yield from np.split(tokens, ends[:-1])


def _other_reader(validation: Path, prefix: Path, target: _Target) -> _Reader:
    """Of documents that are not those of `prefix`, which exist."""
    reader = _Reader(validation, target)
    if Path(f"{validation}.bin").samefile(f"{prefix}.bin"):
        fix = "give the PREFIX of other documents, or leave --validation out to hold out a share of these"
        raise DataError("--validation", f"{validation} is what is trained on", fix)
    return reader


def _open(prefix: Path) -> IndexedDataset:
    """Open a data set whose files fit each other."""
    module = _indexed_dataset()
    _check_header(prefix)
    data = module.IndexedDataset(str(prefix))
    width = np.dtype(data.index.dtype).itemsize
    lengths, pointers, bounds = data.sequence_lengths, data.index.sequence_pointers, data.document_indices
    n_bytes = Path(f"{prefix}.bin").stat().st_size
    if (lengths < 0).any() or (pointers < 0).any() or (pointers + lengths.astype(np.int64) * width > n_bytes).any():
        raise DataError(f"{prefix}.bin", f"{n_bytes} bytes do not hold what the index names", _FIX)
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != len(lengths) or (np.diff(bounds) < 0).any():
        raise DataError(f"{prefix}.idx", "its documents are not its sequences in order", _FIX)
    return data


def _check_header(prefix: Path) -> None:
    """Megatron's reader checks little, and prints a traceback of its own when it fails half-way."""
    for path in (Path(f"{prefix}.idx"), Path(f"{prefix}.bin")):
        if not path.is_file() or not path.stat().st_size:
            raise DataError(str(path), "the file is empty" if path.is_file() else "no such file", _FIX)
    path = Path(f"{prefix}.idx")
    with path.open("rb") as file:
        header = file.read(_HEADER.size).ljust(_HEADER.size, b"\0")
    magic, version, code, n_sequences, n_documents = _HEADER.unpack(header)
    if (magic, version) != (b"MMIDIDX\0\0", 1):
        raise DataError(str(path), "not an index of Megatron", _FIX)
    if code not in _TOKEN_CODES:
        raise DataError(str(path), f"its type of number, code {code}, is none of token ids", _FIX)
    # Length and place of every sequence, bounds of the documents; with images a kind of every sequence.
    n_bytes = _HEADER.size + 12 * n_sequences + 8 * n_documents
    if path.stat().st_size not in (n_bytes, n_bytes + n_sequences):
        raise DataError(str(path), f"{path.stat().st_size} bytes instead of {n_bytes}", _FIX)


def _fraction(document: np.ndarray, seed: int) -> float:
    """A number in [0, 1) that depends on the tokens and the seed alone."""
    salt = str(seed).encode("ascii").ljust(16, b"\0")[:16]
    digest = hashlib.blake2b(document.astype("<u4").tobytes(), digest_size=6, salt=salt).digest()
    return int.from_bytes(digest, "big") / 2**48


def _indexed_dataset() -> ModuleType:
    """Megatron's module, imported only when it is needed: it brings torch and takes seconds."""
    with warnings.catch_warnings(action="ignore"):
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset
