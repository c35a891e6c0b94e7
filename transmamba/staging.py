"""A rank's part of a checkpoint on its way to the disk: divided into files, copied if training goes on, written.

What is hashed is the memory that is written. Files are safetensors: eight bytes with the length of a JSON header, the
header, then the tensors end to end.
"""

import hashlib
import json
import mmap
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from transmamba import disk
from transmamba.slices import Piece, Shard

FILE_BYTES = 1 << 28  # a file is closed when it holds this much
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class Slice(NamedTuple):
    """Where a piece lies: `length` elements from byte `offset` of `file`; and the XXH3 digest of its bytes."""

    name: str
    kind: str
    shard: Shard | None
    start: int
    length: int
    dtype: str
    file: str
    offset: int
    xxh3: str

    @property
    def n_bytes(self) -> int:
        """Bytes in the file."""
        return self.length * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class PlannedFile:
    """A file to be written: its header and the pieces that follow it."""

    name: str
    header: bytes
    pieces: list[Piece]

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(piece.values.nbytes for piece in self.pieces)

    def views(self) -> list[memoryview]:
        """The bytes of the file where they are now, piece by piece after the header; a GPU's are copied."""
        return [memoryview(self.header), *(_bytes_of(piece.values.cpu()).numpy().data for piece in self.pieces)]

    def slices(self, views: list[memoryview]) -> list[Slice]:
        """Where the pieces lie, with the digests of their bytes."""
        found, offset = [], len(self.header)
        for piece, view in zip(self.pieces, views[1:], strict=True):
            code = _CODES[piece.values.dtype]
            place = (piece.start, piece.values.numel(), code, self.name, offset, xxhash.xxh3_64_hexdigest(view))
            found.append(Slice(piece.name, piece.kind, piece.shard, *place))
            offset += len(view)
        return found


Image = tuple[PlannedFile, list[memoryview]]
Written = tuple[dict[str, Any], list[Slice]]  # a file's entry of the manifest, and its slices


def plan(pieces: Iterable[Piece], rank: int) -> Iterator[PlannedFile]:
    """Divide a rank's pieces into files, each as soon as it has enough of them; nothing is copied yet."""
    batch: list[Piece] = []
    n_bytes = n_files = 0
    for piece in pieces:
        if piece.values.numel() == 0:
            continue
        batch.append(piece)
        n_bytes += piece.values.nbytes
        if n_bytes >= FILE_BYTES:
            yield _planned(batch, rank, n_files)
            batch, n_bytes, n_files = [], 0, n_files + 1
    if batch:
        yield _planned(batch, rank, n_files)


def _planned(pieces: list[Piece], rank: int, number: int) -> PlannedFile:
    return PlannedFile(f"rank{rank:05d}-{number:05d}.safetensors", _header(pieces), pieces)


def _header(pieces: list[Piece]) -> bytes:
    entries: dict[str, dict[str, Any]] = {}
    start = 0
    for piece in pieces:
        end = start + piece.values.nbytes
        cut = "" if piece.shard is None else "{}.{}of{}/".format(*piece.shard)
        key = f"{piece.name}/{piece.kind}/{cut}{piece.start}"
        shape = [piece.values.numel()]
        entries[key] = {"dtype": _CODES[piece.values.dtype], "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that readers may map the tensors where they lie
    return len(text).to_bytes(8, "little") + text


class Memory:
    """Host memory for a copy of the files, kept from save to save; pinned when there is a GPU."""

    def __init__(self) -> None:
        self._bytes: Tensor | None = None

    def copy(self, files: list[PlannedFile]) -> list[Image]:
        """Copy the pieces of all files; the views last until the next call."""
        room, start, has_gpu = self._reserve(sum(file.n_bytes for file in files)), 0, False
        images: list[Image] = []
        for file in files:
            views = [memoryview(file.header)]
            for piece in file.pieces:
                part = room[start : start + piece.values.nbytes]
                part.copy_(_bytes_of(piece.values), non_blocking=True)
                views.append(part.numpy().data)
                start, has_gpu = start + piece.values.nbytes, has_gpu or piece.values.is_cuda
            images.append((file, views))
        if has_gpu:
            torch.cuda.current_stream().synchronize()
        return images

    def _reserve(self, n_bytes: int) -> Tensor:
        if self._bytes is None or self._bytes.numel() < n_bytes:
            runtime: Any = torch.cuda.cudart() if torch.cuda.is_available() else None
            if self._bytes is not None and runtime is not None:
                runtime.cudaHostUnregister(self._bytes.data_ptr())
            self._bytes = None  # before the next: they need not fit side by side
            private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            pages = mmap.mmap(-1, max(n_bytes, mmap.PAGESIZE), flags=private)
            pages.madvise(mmap.MADV_HUGEPAGE)  # the first copy would mostly wait for page faults
            self._bytes = torch.frombuffer(pages, dtype=torch.uint8)
            if runtime is not None:
                # torch's own pinned memory comes in powers of two.
                runtime.cudaHostRegister(self._bytes.data_ptr(), self._bytes.numel(), 0)
        return self._bytes


def _bytes_of(values: Tensor) -> Tensor:
    return values.detach().flatten().view(torch.uint8)


def write_image(folder: Path, image: Image) -> Written:
    """Write a file durably.

    Raises:
        OSError: the file system refused.
    """
    file, views = image
    # SHA-256 is about as fast as a disk: one after the other would take twice as long.
    with ThreadPoolExecutor(1) as other:
        sha256 = other.submit(_sha256, views)
        disk.write_file(folder / file.name, views)
        return {"bytes": file.n_bytes, "sha256": sha256.result()}, file.slices(views)


def _sha256(views: list[memoryview]) -> str:
    hasher = hashlib.sha256()
    for view in views:
        hasher.update(view)
    return hasher.hexdigest()
