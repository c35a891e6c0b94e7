"""Damage of every kind: no damaged token is ever used, and `data verify` finds all of it.

Plain webdataset reads the same damaged shards, to show what is at stake. B windows, T tokens.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from webdataset.compat import WebDataset

from tests.unit.data.corpora import numbered_documents, write_corpus
from transmamba.data_pipeline import tokens as tokens_module
from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.manifest import load_manifest
from transmamba.data_pipeline.mixture import Mixture
from transmamba.data_pipeline.stream import Stream
from transmamba.data_pipeline.tokens import TokenStore
from transmamba.data_pipeline.verify import verify_folder

SEQ_LEN = 512
N_FLIPS, N_CUTS = 500, 60


@dataclass
class Row:
    """What became of the cases of one kind of damage."""

    damage: str
    ours: Counter[str] = field(default_factory=Counter)
    """refused: an error before a damaged token; equal: every token is right; wrong: neither."""
    verify: Counter[str] = field(default_factory=Counter)
    plain: Counter[str] = field(default_factory=Counter)
    """raised, short, changed or equal."""

    def line(self) -> str:
        columns = (self.ours, self.verify, self.plain)
        words = [", ".join(f"{count} {word}" for word, count in sorted(column.items())) for column in columns]
        return f"{self.damage:<34}{words[0]:<28}{words[1]:<12}{words[2]}"


def windows_of(folder: Path) -> Iterator[np.ndarray]:
    """Every window of an epoch in training order and the validation text, as a run reads them."""
    manifest = load_manifest(folder)
    stream = Stream(TokenStore(manifest, "train"), seq_len=SEQ_LEN, seed=1, shuffle_shards=2)
    held = Stream(TokenStore(manifest, "validation"), seq_len=SEQ_LEN, seed=1, shuffle_shards="all")
    mixture = Mixture({"train": stream})
    for first in range(stream.n_windows):
        yield mixture.rows(first, 1).tokens_BT[0]
    yield from held.sequential(0, held.n_sequential_windows).tokens_BT


def ours(folder: Path, good_BT: np.ndarray) -> str:
    """Whether the windows, those before an error included, are the right ones."""
    n_read = 0
    try:
        for window_T in windows_of(folder):
            if not np.array_equal(window_T, good_BT[n_read]):
                return "wrong"
            n_read += 1
    except DataError as error:
        assert "\n" not in str(error)
        return "refused"
    return "equal" if n_read == len(good_BT) else "wrong"


def verified(folder: Path) -> str:
    try:
        return "found" if verify_folder(folder, workers=1, progress=False).faults else "missed"
    except DataError:
        return "found"


def read_plain(names: list[Path]) -> np.ndarray:
    samples: Any = WebDataset([str(name) for name in names], shardshuffle=False).decode()  # pyright: ignore[reportArgumentType]
    return np.concatenate([sample["tokens.npy"] for sample in samples if "tokens.npy" in sample] or [np.empty(0)])


def plain(names: list[Path], good: np.ndarray) -> str:
    try:
        read = read_plain(names)
    except Exception:  # whatever it raises is told
        return "raised"
    if np.array_equal(read, good):
        return "equal"
    return "short" if len(read) < len(good) else "changed"


@contextmanager
def damaged(*files: tuple[Path, bytes | None]) -> Iterator[None]:
    """Other contents for files (None: missing) while the block runs."""
    contents = [path.read_bytes() for path, _ in files]
    try:
        for path, content in files:
            path.unlink() if content is None else path.write_bytes(content)
        yield
    finally:
        for (path, _), content in zip(files, contents, strict=True):
            path.write_bytes(content)


def flipped(path: Path, bit: int) -> tuple[Path, bytes]:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << (bit % 8)
    return path, bytes(data)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six training shards of four blocks and a validation shard."""
    folder = tmp_path_factory.mktemp("several")
    documents = numbered_documents([5000, 3, 90, 700] * 8)
    manifest = write_corpus(folder, documents, shard_tokens=8192, block_tokens=2048)
    assert len(manifest.splits["train"].shards) == 6
    return folder


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One shard of 200 blocks."""
    folder = tmp_path_factory.mktemp("single")
    write_corpus(folder, numbered_documents([256] * 200), shard_tokens=1 << 20, block_tokens=256, dtype="<u2")
    return folder


def flips(folder: Path, count: int) -> Iterator[tuple[Path, bytes]]:
    """Single bits of all files, each bit as likely as any other."""
    draw = random.Random(6)
    files = sorted(folder.iterdir())
    for path in draw.choices(files, weights=[path.stat().st_size for path in files], k=count):
        yield flipped(path, draw.randrange(8 * path.stat().st_size))


def whole_shard_cases(folder: Path) -> dict[str, list[tuple[tuple[Path, bytes | None], ...]]]:
    files, tars = sorted(folder.iterdir()), sorted(folder.glob("train-*.tar"))
    pairs = [(one, other) for i, one in enumerate(tars) for other in tars[i + 1 :]]
    return {
        "file missing": [((path, None),) for path in files],
        "shard in the place of another": [((one, other.read_bytes()),) for one, other in pairs],
        "two shards swapped": [((one, other.read_bytes()), (other, one.read_bytes())) for one, other in pairs],
        "file longer": [((path, path.read_bytes() + bytes(512)),) for path in files],
    }


def cases(
    several: Path, single: Path, one_in: int
) -> Iterator[tuple[str, Path, tuple[tuple[Path, bytes | None], ...], bool]]:
    """Kind of damage, folder, changed files, and whether plain webdataset is asked as well."""
    for change in flips(several, N_FLIPS // one_in):
        yield "bit flipped, in any file", several, (change,), False
    for kind, changes in whole_shard_cases(several).items():
        for change in changes:
            yield kind, several, change, all(path.suffix == ".tar" and "train" in path.name for path, _ in change)
    draw, tar = random.Random(7), single / "train-000000.tar"
    n_bytes = tar.stat().st_size
    for _ in range(N_CUTS // one_in):
        yield "shard of 200 blocks cut off", single, ((tar, tar.read_bytes()[: draw.randrange(n_bytes)]),), True
    for _ in range(N_CUTS // one_in):
        yield "bit flipped, in that shard", single, (flipped(tar, draw.randrange(8 * n_bytes)),), True


def measure(several: Path, single: Path, one_in: int) -> list[Row]:
    rows: dict[str, Row] = {}
    good = {folder: np.stack(list(windows_of(folder))) for folder in (several, single)}
    tars = {folder: sorted(folder.glob("train-*.tar")) for folder in (several, single)}
    good_plain = {folder: read_plain(names) for folder, names in tars.items()}
    for kind, folder, changes, ask_plain in cases(several, single, one_in):
        row = rows.setdefault(kind, Row(kind))
        with damaged(*changes):
            row.ours[ours(folder, good[folder])] += 1
            row.verify[verified(folder)] += 1
            if ask_plain:
                row.plain[plain(tars[folder], good_plain[folder])] += 1
    for folder, good_BT in good.items():
        assert (ours(folder, good_BT), verified(folder)) == ("equal", "missed")
    return list(rows.values())


@pytest.mark.parametrize("one_in", [5, pytest.param(1, marks=pytest.mark.long)])
def test_no_damaged_token_is_used_and_verify_finds_everything(
    several: Path, single: Path, one_in: int, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = measure(several, single, one_in)
    with capsys.disabled():
        print(f"\n{'damage':<34}{'read by us':<28}{'verify':<12}plain webdataset")
        print("\n".join(row.line() for row in rows))
    by_kind = {row.damage: row for row in rows}
    assert sum(row.ours["wrong"] for row in rows) == 0
    assert sum(row.verify["missed"] for row in rows) == 0
    # A flip that leaves the tokens equal lies between the arrays, where plain readers look and ours does not.
    assert by_kind["bit flipped, in any file"].ours.total() == N_FLIPS // one_in
    assert by_kind["bit flipped, in any file"].ours["refused"] > N_FLIPS // one_in / 2
    assert by_kind["shard of 200 blocks cut off"].ours == {"refused": N_CUTS // one_in}
    assert by_kind["shard of 200 blocks cut off"].plain["short"] > 0
    for kind in ("shard in the place of another", "two shards swapped"):
        assert by_kind[kind].ours == {"refused": 15}
        assert by_kind[kind].plain["raised"] == 0
    out = request.config.getoption("--damage-report", default=None)
    if out is not None and one_in == 1:
        versions = {name: version(name) for name in ("numpy", "webdataset", "xxhash")}
        report = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "versions": versions, "rows": [
            {"damage": row.damage, "cases": row.ours.total(), "ours": row.ours, "verify": row.verify,
             "webdataset": row.plain} for row in rows
        ]}  # fmt: skip
        out.write_text(json.dumps(report, indent=1) + "\n")


def test_a_reader_without_digests_would_use_damaged_tokens(several: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good_BT = np.stack(list(windows_of(several)))

    class Anything:
        def __ne__(self, other: object) -> bool:
            return False

    always: Callable[[np.ndarray, np.ndarray], Any] = lambda tokens, starts: Anything()  # noqa: E731
    monkeypatch.setattr(tokens_module, "block_digest", always)
    found = Counter()
    for change in flips(several, 60):
        with damaged(change):
            found[ours(several, good_BT)] += 1
    assert found["wrong"] > 20
