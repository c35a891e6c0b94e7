"""Reading every byte of prepared data once and comparing it with everything that is recorded of it.

T tokens of a block.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from transmamba.data_pipeline.blocks import ROW, STARTS_DTYPE, block_digest, blocks_name, faults_of, rows_digest
from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.framing import framing_faults
from transmamba.data_pipeline.manifest import LENGTH_EDGES, MANIFEST_NAME, LengthBin, Manifest, Shard, read_manifest
from transmamba.data_pipeline.progress import Advance, show_step
from transmamba.data_pipeline.text import nearest_existing

AGAIN = "copy it again or make it with `transmamba data prepare --replace`"
# Bytes hashed at once where there are no blocks to go by.
_CHUNK_BYTES = 1 << 24
# Damaged blocks of one shard that are named; the others are counted.
_MOST_NAMED = 3


@dataclass(frozen=True, slots=True)
class Fault:
    """A file that is not as written, on one line."""

    what: str
    problem: str
    fix: str = AGAIN


@dataclass(frozen=True, slots=True)
class Verified:
    """What was read, and all that was wrong."""

    n_bytes: int
    n_shards: int
    faults: tuple[Fault, ...]


def verify_folder(folder: Path, *, workers: int | None = None, progress: bool = True) -> Verified:
    """Check every byte of a prepared folder: hashes, tables, tar members, token ids, documents and counts.

    A shard whose hash is wrong is looked at block by block, so that the damaged bytes are named.

    Args:
        folder: made by `transmamba data prepare`.
        workers: threads; None is one per core, at most 16.
        progress: show progress on stderr.

    Raises:
        DataError: there is no manifest, or it is of another kind or version.
        DamagedData: the manifest or the tokenizer does not match its digest; nothing else can be judged then.
    """
    file = folder / MANIFEST_NAME
    if not file.is_file():
        fix = f"{nearest_existing(file)}, or give a folder made by `transmamba data prepare`"
        raise DataError(str(file), "no such manifest", fix)
    manifest = read_manifest(file)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    faults = []
    with (
        show_step("verifying", sum(shard.n_bytes for shard in shards), visible=progress) as advance,
        ThreadPoolExecutor(workers or min(os.cpu_count() or 1, 16)) as threads,
    ):
        for name, split in manifest.splits.items():
            tables, table_faults = _read_table(manifest, name)
            checks = [_ShardCheck(manifest, shard, rows) for shard, rows in zip(split.shards, tables, strict=True)]
            for _ in threads.map(lambda check: check.run(advance), checks):
                pass
            faults += table_faults
            faults += [check.fault for check in checks if check.fault]
            if not any(check.fault for check in checks) and not table_faults:
                faults += _split_faults(manifest, name, checks)
    listed = {shard.name for shard in shards}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in listed:
            faults.append(Fault(str(path), "is not in the manifest", "move it away; readers of *.tar would take it in"))
    return Verified(sum(shard.n_bytes for shard in shards), len(shards), tuple(faults))


def _read_table(manifest: Manifest, split: str) -> tuple[list[np.ndarray | None], list[Fault]]:
    """Rows of every shard of a split, None where they cannot be trusted."""
    path = manifest.folder / blocks_name(split)
    shards = manifest.splits[split].shards
    n_bytes = ROW.itemsize * sum(shard.n_blocks for shard in shards)
    try:
        data = path.read_bytes()
    except OSError as error:
        return [None] * len(shards), [Fault(str(path), f"the table of blocks cannot be read ({error.strerror})")]
    if len(data) != n_bytes:
        return [None] * len(shards), [Fault(str(path), f"{len(data)} bytes instead of {n_bytes}")]
    table, first = np.frombuffer(data, dtype=ROW), 0
    tables: list[np.ndarray | None] = []
    faults = []
    for shard in shards:
        rows = table[first : first + shard.n_blocks]
        sizes = {"n_bytes": shard.n_bytes, "n_tokens": shard.n_tokens, "block_tokens": manifest.block_tokens}
        problem = "do not match their digest" if rows_digest(rows) != shard.blocks_sha256 else None
        problem = problem or faults_of(rows, **sizes, width=np.dtype(manifest.token_dtype).itemsize)
        if problem:
            where = f"bytes {ROW.itemsize * first} to {ROW.itemsize * (first + shard.n_blocks)}"
            faults.append(Fault(str(path), f"the rows of {shard.name} ({where}) {problem}"))
        tables.append(None if problem else rows)
        first += shard.n_blocks
    return tables, faults


@dataclass(slots=True)
class _Lengths:
    """Document lengths of a shard: `first` is what it adds to the document that was open at its begin."""

    first: int | None = None
    open: int = 0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(len(LENGTH_EDGES), dtype=np.int64))
    sums: np.ndarray = field(default_factory=lambda: np.zeros(len(LENGTH_EDGES), dtype=np.int64))

    def add_block(self, n_tokens: int, ends_T: np.ndarray) -> None:
        """Go on over a block with documents that end at these indices."""
        if not len(ends_T):
            self.open += n_tokens
            return
        lengths = np.diff(ends_T, prepend=-1 - self.open)
        if self.first is None:
            self.first, lengths = int(lengths[0]), lengths[1:]
        self.add(lengths)
        self.open = n_tokens - 1 - int(ends_T[-1])

    def add(self, lengths: np.ndarray) -> None:
        """Count whole documents."""
        bins = np.searchsorted(LENGTH_EDGES, lengths, side="right") - 1
        np.add.at(self.counts, bins, 1)
        np.add.at(self.sums, bins, lengths)


class _ShardCheck:
    """One shard against its record and its rows (None where those are damaged); `run` fills in the rest."""

    def __init__(self, manifest: Manifest, shard: Shard, rows: np.ndarray | None) -> None:
        self._manifest, self._shard, self._rows = manifest, shard, rows
        self._path = manifest.folder / shard.name
        self._dtype = np.dtype(manifest.token_dtype)
        self._problems: list[str] = []
        self._damaged: list[str] = []
        self.lengths = _Lengths()
        self.begins_document = False

    @property
    def fault(self) -> Fault | None:
        """All that is wrong with the shard."""
        named = [*self._damaged[:_MOST_NAMED]]
        if len(self._damaged) > _MOST_NAMED:
            named.append(f"{len(self._damaged) - _MOST_NAMED} more blocks")
        problems = [*self._problems, *named]
        return Fault(str(self._path), ", ".join(problems)) if problems else None

    def run(self, advance: Advance) -> None:
        """Read the shard."""
        try:
            data = _mapped(self._path)
        except OSError as error:
            self._problems.append(f"cannot be read ({error.strerror})")
            advance(self._shard.n_bytes)
            return
        if len(data) != self._shard.n_bytes:
            self._problems.append(f"{len(data)} bytes instead of {self._shard.n_bytes}")
        digest = self._read(data, advance)
        if self._rows is not None:
            self._problems += framing_faults(data, self._rows, self._dtype)
        if digest != self._shard.sha256 and not self._problems and not self._damaged:
            where = "between its blocks" if self._rows is not None else "somewhere"
            self._problems.append(f"does not match its SHA-256: a byte {where} has changed")

    def _read(self, data: np.ndarray, advance: Advance) -> str:
        """Look at every block while its bytes pass through the hash of the file, which is returned."""
        digest, done = hashlib.sha256(), 0
        extremes: list[int] = []
        n_starts, ended = 0, None
        rows = [] if self._rows is None else self._rows.tolist()
        for number, (first, second, n_tokens, count, expected) in enumerate(rows):
            end = first + self._dtype.itemsize * n_tokens
            digest.update(data[done:end].data)
            advance(min(end, len(data)) - done)
            done = min(end, len(data))
            starts_end = second + STARTS_DTYPE.itemsize * count
            raw, starts = data[first:end], data[second:starts_end]
            where = f"block {number} (bytes {first} to {end})"
            if max(end, starts_end) > len(data):
                self._damaged.append(f"{where} is cut off")
                ended = None
            elif block_digest(raw, starts) != expected:
                where += f" or its starts (bytes {second} to {starts_end})"
                self._damaged.append(f"{where} do not match their digest")
                ended = None
            else:
                tokens_T = raw.view(self._dtype)
                extremes += [int(tokens_T.min()), int(tokens_T.max())]
                ended = self._read_documents(where, tokens_T, starts.view(STARTS_DTYPE), ended)
                n_starts += count
        for first in range(done, len(data), _CHUNK_BYTES):
            digest.update(data[first : first + _CHUNK_BYTES].data)
        advance(len(data) - done)
        if rows and not self._damaged:
            self._check_record(n_starts, min(extremes), max(extremes))
        return digest.hexdigest()

    def _read_documents(self, where: str, tokens_T: np.ndarray, starts: np.ndarray, ended: bool | None) -> bool:
        """Compare the starts of a block with the ends in its tokens; returns whether it ends with a document's."""
        ends_T = np.flatnonzero(tokens_T == self._manifest.eod_id)
        begins = bool(len(starts)) and starts[0] == 0
        if ended is None:
            self.begins_document = begins
        expected = np.append([0] if begins else [], ends_T[ends_T < len(tokens_T) - 1] + 1)
        if not np.array_equal(starts, expected) or ended not in (None, begins):
            self._problems.append(f"{where}: documents do not start where the one before ends")
        self.lengths.add_block(len(tokens_T), ends_T)
        return bool(tokens_T[-1] == self._manifest.eod_id)

    def _check_record(self, n_starts: int, low: int, high: int) -> None:
        shard = self._shard
        if (low, high) != (shard.min_token_id, shard.max_token_id):
            recorded = f"{shard.min_token_id} to {shard.max_token_id}"
            self._problems.append(f"token ids {low} to {high} instead of {recorded}")
        if n_starts != shard.n_documents:
            self._problems.append(f"{n_starts} documents start in it instead of {shard.n_documents}")


def _mapped(path: Path) -> np.ndarray:
    """Bytes of a file; an empty one cannot be mapped."""
    return np.asarray(np.memmap(path, np.uint8, mode="r")) if path.stat().st_size else np.empty(0, np.uint8)


def _split_faults(manifest: Manifest, name: str, checks: Sequence[_ShardCheck]) -> list[Fault]:
    """Compare documents that go on from shard to shard, and their lengths, with the manifest."""
    split, total, is_open = manifest.splits[name], _Lengths(), False
    faults = []
    for check, shard in zip(checks, split.shards, strict=True):
        if check.begins_document == is_open:
            problem = "does not begin a document" if not is_open else "begins a document inside another"
            faults.append(Fault(str(manifest.folder / shard.name), problem))
        if check.lengths.first is None:
            total.open += check.lengths.open
        else:
            total.add(np.array([total.open + check.lengths.first]))
            total.open = check.lengths.open
        total.counts += check.lengths.counts
        total.sums += check.lengths.sums
        is_open = total.open > 0
    if is_open:
        faults.append(Fault(str(manifest.folder / split.shards[-1].name), "its last document has no end"))
    bins = zip(LENGTH_EDGES.tolist(), total.counts.tolist(), total.sums.tolist(), strict=True)
    lengths = tuple(LengthBin(*entry) for entry in bins if entry[1])
    if lengths != split.lengths or int(total.counts.sum()) != split.n_documents:
        problem = f"documents and lengths of {name} are not those of its shards"
        faults.append(Fault(str(manifest.folder / MANIFEST_NAME), problem))
    return faults
