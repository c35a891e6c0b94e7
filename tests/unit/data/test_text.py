"""Text files give their documents in one order, however they are cut, and errors say where."""

from __future__ import annotations

import functools
import gzip
import http.server
import json
import os
import random
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from transmamba.data_pipeline import sources as module
from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.listing import find_files
from transmamba.data_pipeline.parts import LEAST_PART_BYTES, Piece, Reading, cut_parts, part_size
from transmamba.data_pipeline.sources import SourceFile, UnreadableSource
from transmamba.data_pipeline.text import nearest_existing

LINES = [{"text": f"zeile {i} ü" + "x" * (i % 37), "n": i} for i in range(300)]
JSONL = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in LINES).encode()


def read(sources: list[Path | str], field: str = "text", size: int = 1 << 40) -> list[tuple[str, str]]:
    files = find_files([str(source) for source in sources]).files
    parts = cut_parts(files, size)
    return [(found.name, found.text) for part in parts for found in Reading(part, field).documents()]


def test_folders_globs_and_files_give_documents_in_one_order(tmp_path: Path) -> None:
    (tmp_path / "b" / "deep").mkdir(parents=True)
    for name in ("b/z.txt", "b/a.md", "b/deep/k.txt", "c.txt"):
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "b" / "picture.png").write_bytes(b"\xff")
    (tmp_path / "b" / "empty.txt").write_text(" \n")
    sources = [str(tmp_path / "b"), str(tmp_path / "*.txt"), str(tmp_path / "b" / "z.txt")]
    found = find_files(sources)
    names = [Path(file.place).relative_to(tmp_path).as_posix() for file in found.files]
    assert names == ["b/a.md", "b/deep/k.txt", "b/empty.txt", "b/z.txt", "c.txt"]
    assert found.n_skipped == 1
    (part,) = cut_parts(found.files, 1 << 20)
    reading = Reading(part, "text")
    texts = [document.text for document in reading.documents()]
    assert texts == ["text of b/a.md", "text of b/deep/k.txt", "text of b/z.txt", "text of c.txt"]
    assert reading.n_empty == 1
    assert reading.n_bytes == sum(file.n_bytes for file in found.files)


def pack_gzip(data: bytes) -> bytes:
    # Two members, as parallel compressors write them.
    return gzip.compress(data[:1000]) + gzip.compress(data[1000:])


@pytest.mark.parametrize(
    ("name", "pack"),
    [("x.jsonl", bytes), ("x.jsonl.gz", pack_gzip), ("x.jsonl.zst", zstandard.compress), ("X.JSONL.GZ", pack_gzip)],
)
def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path, name: str, pack: Callable[[bytes], bytes]) -> None:
    (tmp_path / name).write_bytes(pack(JSONL))
    assert [text for _, text in read([tmp_path])] == [line["text"] for line in LINES]


def test_parquet_gives_the_rows_of_a_column(tmp_path: Path) -> None:
    texts = [line["text"] for line in LINES]
    columns = {"body": pa.array([*texts, None, " "], pa.large_string()), "n": list(range(302))}
    parquet.write_table(pa.table(columns), tmp_path / "x.parquet", row_group_size=70)
    names, found = zip(*read([tmp_path], field="body"), strict=True)
    assert list(found) == texts
    assert names[71] == f"{tmp_path}/x.parquet row 72"
    words = pa.table({"text": pa.array(["a", "b", "a"]).dictionary_encode()})
    parquet.write_table(words, tmp_path / "x.parquet")
    assert [text for _, text in read([tmp_path])] == ["a", "b", "a"]


def test_a_column_is_found_by_its_whole_name(tmp_path: Path) -> None:
    inner = pa.array([{"text": "wrong"}], pa.struct([("text", pa.string())]))
    parquet.write_table(pa.table({"meta": inner, "meta.text": ["right"], "text": ["other"]}), tmp_path / "x.parquet")
    assert [text for _, text in read([tmp_path], field="meta.text")] == ["right"]
    assert [text for _, text in read([tmp_path])] == ["other"]


@pytest.mark.parametrize("seed", range(8))
def test_cut_lines_are_read_exactly_once_wherever_the_cuts_fall(tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    lines = [json.dumps({"text": f"{i}" + "ü" * generator.choice([0, 1, 5, 100])}) for i in range(30)]
    # Blank lines, and a last line with and without its end.
    data = "\n".join(line for pair in zip(lines, generator.choices(["", " "], k=30), strict=True) for line in pair)
    (tmp_path / "x.jsonl").write_text(data + "\n" * (seed % 2))
    whole = read([tmp_path])
    assert len(whole) == 30
    for size in (2, 7, 64, 1000):
        assert read([tmp_path], size=size) == whole


def test_parts_are_runs_of_whole_files_or_pieces_of_a_big_one() -> None:
    def file(name: str, n_bytes: int) -> SourceFile:
        kind, packing = module.kind_of(name) or ("", "")
        return SourceFile(name, kind, packing, n_bytes, "")

    files = [file("a.txt", 40), file("b.md", 50), file("c.txt", 20), file("d.jsonl", 250), file("e.jsonl.gz", 500)]
    parts = cut_parts([*files, file("f.parquet", 10), file("g.txt", 0)], 100)
    shown = [[(piece.file.place, piece.start, piece.end) for piece in part] for part in parts]
    assert shown == [
        [("a.txt", 0, 40), ("b.md", 0, 50)],
        [("c.txt", 0, 20)],
        [("d.jsonl", 0, 83)],
        [("d.jsonl", 83, 166)],
        [("d.jsonl", 166, 250)],
        [("e.jsonl.gz", 0, 500)],
        [("f.parquet", 0, 10), ("g.txt", 0, 0)],
    ]
    assert part_size(1000, 10) == LEAST_PART_BYTES
    assert part_size(64 << 30, 64_000_000) == 256_000_000
    assert part_size(64 * 5 << 20, 64_000_000) == 5 << 20


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"body": "x", "id": 3}', r"x.jsonl:301: no text in field 'text' \(fields found: body, id\)"),
        (b'{"text": 3}', r"x.jsonl:301: no text in field 'text'"),
        (b'{"text": "x"', r"x.jsonl:301: not JSON"),
        (b'["text"]', r"x.jsonl:301: a JSON list"),
        (b'{"text": "\\ud800"}', r"x.jsonl:301: field 'text' has half a surrogate pair"),
        (b'{"text": "a", "id": 3, "text": "b"}', r"x.jsonl:301: field 'text' is there 2 times"),
        (b"[" * 100_000, r"x.jsonl:301: JSON that cannot be read"),
        (b'{"text": ' + b"9" * 10_000 + b"}", r"x.jsonl:301: JSON that cannot be read"),
        (b'{"text": "\xff"}', rf"x.jsonl: not UTF-8 at byte offset {len(JSONL) + 10}"),
    ],
)
@pytest.mark.parametrize("size", [100, 1 << 30])
def test_a_bad_json_line_is_named(tmp_path: Path, line: bytes, message: str, size: int) -> None:
    (tmp_path / "x.jsonl").write_bytes(JSONL + line + b"\n" + JSONL)
    with pytest.raises(DataError, match=message) as caught:
        read([tmp_path / "x.jsonl"], size=size)
    assert "\n" not in str(caught.value)
    with gzip.open(tmp_path / "x.jsonl.gz", "wb") as file:
        file.write(JSONL + line + b"\n")
    with pytest.raises(DataError, match=message.replace("jsonl", r"jsonl.gz")):
        read([tmp_path / "x.jsonl.gz"])


def test_other_members_may_be_there_twice_and_nested(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a", "id": {"text": "b", "n": [{}]}, "id": 4}\n')
    assert [text for _, text in read([tmp_path])] == ["a"]


def test_texts_of_nothing_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": ""}\n{"text": null}\n{"text": "a"}\n{"text": " \\n"}\n')
    (part,) = cut_parts(find_files([str(tmp_path)]).files, 100)
    reading = Reading(part, "text")
    assert [document.text for document in reading.documents()] == ["a"]
    assert reading.n_empty == 3


def test_bytes_that_are_not_utf8_are_named_by_file_and_offset(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes("ü".encode() * 3 + b"\xe9t\xe9")
    with pytest.raises(DataError, match=r"x.txt: not UTF-8 at byte offset 6; convert it"):
        read([tmp_path])
    (tmp_path / "x.txt").write_bytes(gzip.compress(b"text"))
    with pytest.raises(DataError, match=r"x.txt: holds packed data, not text \(.gz\); add .gz to its name"):
        read([tmp_path])
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfmarked")
    assert [text for _, text in read([tmp_path])] == ["marked"]


@pytest.mark.parametrize("name", ["x.txt.gz", "x.txt.zst", "x.parquet"])
def test_damaged_and_shortened_files_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("parquet"):
        parquet.write_table(pa.table({"text": [f"{i} text" for i in range(2000)]}), path)
    else:
        path.write_bytes((gzip.compress if name.endswith("gz") else zstandard.compress)(JSONL))
    whole = path.read_bytes()
    shorter = [b"not packed at all", *(whole[: len(whole) * k // 10] for k in range(1, 10)), whole[:-1]]
    for data in shorter:
        path.write_bytes(data)
        with pytest.raises(DataError, match=rf"{name}: (its \w+ data are damaged|not parquet, or damaged)"):
            read([path])


def test_a_flipped_bit_is_found_where_the_pages_of_parquet_have_checksums(tmp_path: Path) -> None:
    path, texts = tmp_path / "x.parquet", [f"{i} text" for i in range(2000)]
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    parquet.write_table(pa.table({"text": texts}), path, **options)
    assert [text for _, text in read([path])] == texts
    data = bytearray(path.read_bytes())
    data[data.index(b"1000 text")] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"x.parquet: not parquet, or damaged \(.*CRC.*\); copy or write it again"):
        read([path])


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    arrays = [pa.array(["a"]), pa.array(["z"])]
    parquet.write_table(pa.Table.from_arrays(arrays, names=["text", "text"]), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x.parquet: column 'text' is there 2 times; write it with one of them"):
        read([tmp_path])


def test_a_missing_or_foreign_column_is_named(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"body": ["a"], "id": [1]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"no column 'text' \(columns found: body, id\); name the text column"):
        read([tmp_path])
    with pytest.raises(DataError, match=r"column 'id' holds int64, not text"):
        read([tmp_path], field="id")


def test_a_missing_path_suggests_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "corpora").mkdir()
    with pytest.raises(DataError, match=r"no such file or folder; the nearest existing name is .*corpora$"):
        find_files([str(tmp_path / "corpus" / "deep" / "x.txt")])


def test_only_similar_names_are_suggested_and_only_folders_where_a_folder_is_meant(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "README.md").write_text("words")
    with pytest.raises(DataError, match=r"no such file or folder; check the path; .* holds no similar name$"):
        find_files([str(tmp_path / "nonexistent")])
    assert nearest_existing(tmp_path / "README.md" / "x").endswith("holds no similar name")
    assert nearest_existing(tmp_path / "REDME.md").endswith("README.md")
    (tmp_path / "README").mkdir()
    assert nearest_existing(tmp_path / "README.md" / "x").endswith("README")


@pytest.mark.parametrize(
    ("source", "message"),
    [("*.md", "matches no file"), ("x.pdf", r"unknown kind of file '.pdf'"), ("", "no documents found")],
)
def test_sources_without_text_are_refused(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "x.pdf").write_bytes(b"%PDF")
    with pytest.raises(DataError, match=message):
        find_files([str(tmp_path / source) if source else str(tmp_path)])


def test_a_file_that_may_not_be_read_is_named_with_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.txt").write_text("text")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(DataError, match=rf"x.txt: may not be read by you; chmod it or .* \(user id {os.getuid()}\)"):
        find_files([str(tmp_path)])


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("text")
    (file,) = find_files([str(tmp_path)]).files
    (tmp_path / "x.txt").unlink()
    with pytest.raises(UnreadableSource, match=r"x.txt: cannot be read \(No such file or directory\)"):
        list(Reading((Piece(file, 0, 4),), "text").documents())


@pytest.fixture
def bucket() -> Iterator[str]:
    """A folder of fsspec's file system in memory, with the lines in several forms."""
    files = fsspec.filesystem("memory")
    for name, data in {
        "a/x.jsonl": JSONL,
        "a/b/y.jsonl.gz": gzip.compress(JSONL),
        "a/z.png": b"",
        "c.txt": b"c",
    }.items():
        files.pipe(f"/corpus/{name}", data)
    yield "memory://corpus"
    files.rm("/corpus", recursive=True)


def test_urls_of_files_folders_and_globs_are_read_like_paths(bucket: str) -> None:
    texts = [str(line["text"]) for line in LINES]
    for source, expected in {
        f"{bucket}/a/x.jsonl": texts,
        f"{bucket}/a": [*texts, *texts],
        f"{bucket}/a/*.jsonl": texts,
        f"{bucket}/**/*.gz": texts,
        bucket: [*texts, *texts, "c"],
    }.items():
        assert [text for _, text in read([source], size=500)] == expected
    assert find_files([bucket]).n_skipped == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("memory://corpus/none.txt", "memory://corpus/none.txt: no such file or folder; check the URL"),
        ("memory://corpus/*.md", "the pattern matches no file"),
        ("nosuch://corpus/x.txt", "cannot be opened"),
        ("gs://corpus/x.txt", "no package for gs:// is installed; run `pip install gcsfs`"),
    ],
)
def test_bad_urls_are_refused_by_name(bucket: str, source: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_files([source])


class _Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        """Files, but of one only the first bytes, as when a connection breaks."""
        if self.path == "/locked.txt":
            self.send_error(401)
            return
        if self.path != "/cut.txt":
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"cut")

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The URL of a plain web server, which sends whole files only, over a folder of texts."""
    parquet.write_table(pa.table({"text": ["one", "two"]}), tmp_path / "x.parquet")
    (tmp_path / "x.jsonl").write_bytes(JSONL)
    (tmp_path / "y.jsonl.gz").write_bytes(pack_gzip(JSONL))
    (tmp_path / "big.txt").write_text("some words\n" * 1_000_000)
    handler = functools.partial(_Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


def test_a_plain_web_server_is_enough(server: str) -> None:
    texts = [line["text"] for line in LINES]
    assert [text for _, text in read([f"{server}/x.jsonl"], size=500)] == texts
    assert [text for _, text in read([f"{server}/y.jsonl.gz"])] == texts
    assert [text for _, text in read([f"{server}/x.parquet"])] == ["one", "two"]
    assert [text for _, text in read([f"{server}/big.txt"])] == ["some words\n" * 1_000_000]
    (file,) = find_files([f"{server}/x.jsonl"]).files
    assert (file.n_bytes, bool(file.stamp)) == (len(JSONL), True)
    with pytest.raises(DataError, match=r"none.txt: no such file or folder; check the URL"):
        find_files([f"{server}/none.txt"])
    with pytest.raises(DataError, match=r"locked.txt: cannot be read \(the server answers with status 401\); check"):
        find_files([f"{server}/locked.txt"])


def test_a_broken_connection_is_no_end_of_a_text(server: str, tmp_path: Path) -> None:
    (tmp_path / "cut.txt").write_text("x" * 1000)
    with pytest.raises(UnreadableSource, match=r"cut.txt: cannot be read \(.*; the same command goes on"):
        read([f"{server}/cut.txt"])


def test_secrets_in_urls_are_not_shown() -> None:
    with pytest.raises(DataError) as caught:
        find_files(["nosuch://user:secret@host/x.txt?token=secret"])
    assert "secret" not in str(caught.value)


def test_a_packed_file_is_read_in_little_memory(tmp_path: Path) -> None:
    line = json.dumps({"text": "word " * 200}).encode() + b"\n"
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(line * 20_000, 1))
    (part,) = cut_parts(find_files([str(tmp_path)]).files, 1 << 30)
    tracemalloc.start()
    assert sum(len(document.text) for document in Reading(part, "text").documents()) == 20_000 * 1000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Of 20 MB.
    assert peak < 4e6
