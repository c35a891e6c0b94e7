"""Token data of Megatron goes out and comes back bit for bit; what it may not hold is mended or refused by name."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from typer.testing import CliRunner

from tests.unit.data.corpora import EOD, Documents, english, numbered_documents, write_corpus
from transmamba.cli import app
from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.manifest import Manifest
from transmamba.data_pipeline.megatron import Imported, export_megatron, import_megatron
from transmamba.data_pipeline.tokens import TokenStore
from transmamba.data_pipeline.verify import verify_folder

with warnings.catch_warnings(action="ignore"):
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder


@pytest.fixture(scope="module")
def text() -> tuple[Tokenizer, Documents]:
    return english()


@pytest.fixture
def manifest(tmp_path: Path, text: tuple[Tokenizer, Documents]) -> Manifest:
    return write_corpus(
        tmp_path / "data", text[1], shard_tokens=20_000, block_tokens=2_000, dtype="<u2", tokenizer=text[0]
    )


def write_megatron(prefix: Path, documents: list[list[list[int]]], dtype: type = np.int32) -> Path:
    """Documents of sequences of ids as Megatron writes them."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequences in documents:
        flat = np.array([token for sequence in sequences for token in sequence], dtype=dtype)
        builder.add_document(flat, [len(sequence) for sequence in sequences])  # pyright: ignore[reportArgumentType]
    builder.finalize(f"{prefix}.idx")
    return prefix


def documents_of(manifest: Manifest, split: str) -> list[list[int]]:
    store = TokenStore(manifest, split)
    tokens = store.read(0, store.n_tokens)
    return [part.tolist() for part in np.split(tokens, np.flatnonzero(tokens == EOD) + 1)[:-1]]


def test_megatron_reads_what_was_exported(manifest: Manifest, text: tuple[Tokenizer, Documents]) -> None:
    prefix = manifest.folder.parent / "out"
    assert export_megatron(manifest, prefix, "train", progress=False) == len(text[1])
    data = IndexedDataset(str(prefix))
    assert data.index.dtype == np.uint16
    assert all(np.array_equal(data[i], document) for i, document in enumerate(text[1]))
    assert data.document_indices.tolist() == list(range(len(text[1]) + 1))
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["data", "out.bin", "out.idx"]


def test_there_and_back_the_shards_are_the_same_bytes(manifest: Manifest, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        export_megatron(manifest, tmp_path / split, split, progress=False)
    back, counts = import_megatron(
        tmp_path / "train", manifest.tokenizer_path, tmp_path / "back", validation=tmp_path / "validation",
        shard_tokens=20_000, block_tokens=2_000, progress=False,
    )  # fmt: skip
    assert counts == Imported(n_read=41, n_written=41)
    for split in ("train", "validation"):
        ours, theirs = manifest.splits[split], back.splits[split]
        assert [shard.sha256 for shard in ours.shards] == [shard.sha256 for shard in theirs.shards]
        assert (ours.n_text_bytes, ours.lengths) == (theirs.n_text_bytes, theirs.lengths)
    assert (back.splits["validation"].gzip9_bits_per_byte or 0) > 1
    assert verify_folder(back.folder, progress=False).faults == ()


def test_large_ids_go_out_as_int32(tmp_path: Path) -> None:
    documents = numbered_documents([70_000, 5])
    manifest = write_corpus(tmp_path / "data", documents, shard_tokens=50_000, block_tokens=1_000)
    export_megatron(manifest, tmp_path / "out", "train", progress=False)
    data = IndexedDataset(str(tmp_path / "out"))
    assert data.index.dtype == np.int32
    assert all(np.array_equal(data[i], document) for i, document in enumerate(documents))


def test_documents_are_ended_cut_and_left_out_where_the_format_asks_for_it(
    tmp_path: Path, text: tuple[Tokenizer, Documents]
) -> None:
    text[0].save(str(tmp_path / "tokenizer.json"))
    given = [[[5, 6, EOD]], [[7, 8]], [[9, EOD, 10], [11, EOD]], [], [[EOD, EOD]], [[12], [], [13]]]
    prefix = write_megatron(tmp_path / "given", given)
    held = write_megatron(tmp_path / "held", [[[20, 21]]])
    manifest, counts = import_megatron(
        prefix, tmp_path / "tokenizer.json", tmp_path / "data", validation=held, progress=False
    )
    assert documents_of(manifest, "train") == [
        [5, 6, EOD], [7, 8, EOD], [9, EOD], [10, 11, EOD], [EOD], [EOD], [12, 13, EOD]
    ]  # fmt: skip
    assert documents_of(manifest, "validation") == [[20, 21, EOD]]
    assert counts == Imported(n_read=7, n_empty=1, n_ended=3, n_cut=2, n_written=8)


def test_held_out_documents_are_chosen_by_their_tokens_alone(tmp_path: Path, text: tuple[Tokenizer, Documents]) -> None:
    text[0].save(str(tmp_path / "tokenizer.json"))
    documents = [[document.tolist()] for document in text[1]]
    splits = []
    for name, given, dtype in (("one", documents, np.int32), ("other", documents[::-1] * 2, np.uint16)):
        prefix = write_megatron(tmp_path / name, given, dtype)
        manifest, _ = import_megatron(
            prefix, tmp_path / "tokenizer.json", tmp_path / f"{name}.data", validation_share=0.3, progress=False
        )
        splits.append({split: {tuple(d) for d in documents_of(manifest, split)} for split in ("train", "validation")})
    assert splits[0] == splits[1]
    assert 3 < len(splits[0]["validation"]) < 21
    assert not splits[0]["validation"] & splits[0]["train"]


def test_an_import_keeps_the_data_that_are_there(tmp_path: Path, text: tuple[Tokenizer, Documents]) -> None:
    text[0].save(str(tmp_path / "tokenizer.json"))
    prefix, held = write_megatron(tmp_path / "given", [[[5, 6, EOD]]]), write_megatron(tmp_path / "held", [[[7, EOD]]])
    call = partial(import_megatron, prefix, tmp_path / "tokenizer.json", tmp_path / "data", validation=held)
    call(progress=False)
    before = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    write_megatron(tmp_path / "given", [[[8, 9, EOD]]])
    with pytest.raises(DataError, match=r"holds prepared data.*--replace"):
        call(progress=False)
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()} == before
    manifest, _ = call(replace=True, progress=False)
    assert documents_of(manifest, "train") == [[8, 9, EOD]]


def _patch_idx(place: int, content: bytes) -> Callable[[Path], object]:
    def patch(prefix: Path) -> None:
        path = Path(f"{prefix}.idx")
        data = bytearray(path.read_bytes())
        data[place : place + len(content)] = content
        path.write_bytes(data)

    return patch


def _cut(suffix: str, n_bytes: int) -> Callable[[Path], object]:
    return lambda prefix: Path(f"{prefix}{suffix}").write_bytes(Path(f"{prefix}{suffix}").read_bytes()[:n_bytes])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda prefix: Path(f"{prefix}.bin").unlink(), r"given.bin: no such file"),
        (lambda prefix: Path(f"{prefix}.idx").unlink(), r"given.idx: no such file"),
        (_cut(".bin", 20), r"given.bin: 20 bytes do not hold what the index names"),
        (_cut(".bin", 0), r"given.bin: the file is empty"),
        (_cut(".idx", 40), r"given.idx: 40 bytes instead of 102"),
        (_cut(".idx", 5), r"given.idx: not an index of Megatron"),
        (_patch_idx(0, b"x"), r"given.idx: not an index of Megatron"),
        (_patch_idx(9, b"\x02"), r"given.idx: not an index of Megatron"),
        (_patch_idx(17, b"\x63"), r"given.idx: its type of number, code 99"),
        (_patch_idx(17, b"\x07"), r"given.idx: its type of number, code 7, is none"),
        (_patch_idx(34, struct.pack("<i", -3)), r"given.bin: 32 bytes do not hold"),
        (_patch_idx(34 + 3 * 4 + 3 * 8, struct.pack("<q", 1)), r"given.idx: its documents are not its sequences"),
        (lambda prefix: write_megatron(prefix, [[[400]]]), r"document 0 of .*given: token id 400 with 400 in the"),
        (lambda prefix: write_megatron(prefix, [[[1]], [[-1]]]), r"document 1 of .*given: token id -1 with 400 in"),
        (lambda prefix: write_megatron(prefix, [[[1]]]), r"given: no document is left for validation"),
    ],
)
def test_what_cannot_be_taken_in_is_refused_and_nothing_is_left_behind(
    tmp_path: Path, text: tuple[Tokenizer, Documents], fault: Callable[[Path], object], message: str
) -> None:
    text[0].save(str(tmp_path / "tokenizer.json"))
    prefix = write_megatron(tmp_path / "given", [[[1, 2, EOD]], [[3, 4]], [[5, 6, 7]]])
    fault(prefix)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(DataError, match=message) as caught:
        import_megatron(prefix, tmp_path / "tokenizer.json", tmp_path / "data", progress=False, seed=1)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--tokenizer", "none.json", "none.json: no such tokenizer file"),
        ("--eod-token", "</s>", "tokenizer: no special token '</s>' to end documents with (it has: <|endoftext|>)"),
        ("--validation-share", "0", "validation_share: 0.0 is no share"),
        ("--validation", "none", "none.idx: no such file"),
        ("--validation", "./here/../given", "--validation: here/../given is what is trained on"),
        ("--out", "given.bin", "given.bin: exists and is not a folder"),
    ],
)
def test_an_option_that_cannot_be_is_one_line_and_exit_2(
    tmp_path: Path, text: tuple[Tokenizer, Documents], option: str, value: str, message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    text[0].save("tokenizer.json")
    write_megatron(Path("given"), [[[1, 2, EOD]], [[3, 4]]])
    Path("here").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    options = {"--tokenizer": "tokenizer.json", "--out": "data"} | {option: value}
    words = [word for pair in options.items() for word in pair]
    done = CliRunner().invoke(app, ["data", "import-megatron", "given", *words])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"transmamba: error: {message}")
    assert "Fix: " in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_an_export_replaces_nothing(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "out.idx").write_text("mine")
    with pytest.raises(DataError, match=r"out.idx: exists already"):
        export_megatron(manifest, tmp_path / "out", "train", progress=False)
    with pytest.raises(DataError, match="no such split"):
        export_megatron(manifest, tmp_path / "other", "test", progress=False)
    with pytest.raises(DataError, match="cannot be written"):
        export_megatron(manifest, tmp_path / "none" / "out", "train", progress=False)
    with pytest.raises(DataError, match="names no file"):
        export_megatron(manifest, Path(), "train", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "out.idx"]
    assert (tmp_path / "out.idx").read_text() == "mine"


def test_the_commands_print_what_they_did(manifest: Manifest, tmp_path: Path) -> None:
    out = ["data", "export-megatron", str(manifest.folder), "--out", str(tmp_path / "mg")]
    done = CliRunner().invoke(app, out)
    assert (done.exit_code, done.stdout) == (0, f"40 documents in {tmp_path}/mg.bin and {tmp_path}/mg.idx\n")
    assert CliRunner().invoke(app, out).exit_code == 2
    back = ["data", "import-megatron", str(tmp_path / "mg"), "--tokenizer", str(manifest.tokenizer_path)]
    done = CliRunner().invoke(app, [*back, "--out", str(tmp_path / "back"), "--validation-share", "0.2"])
    assert done.exit_code == 0, done.stderr
    assert "read         40 documents, 0 of them empty" in done.stdout
    assert CliRunner().invoke(app, [*back, "--out", str(tmp_path)]).exit_code == 2
