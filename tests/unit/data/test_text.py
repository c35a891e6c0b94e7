"""Text files give their documents in one order, and errors say where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.text import find_files, read_documents


def read(sources: list[Path | str], field: str = "text") -> list[tuple[str, str]]:
    files = find_files([str(source) for source in sources])
    return [(document.name, document.text) for document in read_documents(files, field=field)]


def test_folders_globs_and_files_give_documents_in_one_order(tmp_path: Path) -> None:
    (tmp_path / "b" / "deep").mkdir(parents=True)
    for name in ("b/z.txt", "b/a.md", "b/deep/k.txt", "c.txt"):
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "b" / "picture.png").write_bytes(b"\xff")
    (tmp_path / "b" / "empty.txt").write_text(" \n")
    files = find_files([str(tmp_path / "b"), str(tmp_path / "*.txt"), str(tmp_path / "b" / "z.txt")])
    names = [path.relative_to(tmp_path).as_posix() for path in files.paths]
    assert names == ["b/a.md", "b/deep/k.txt", "b/empty.txt", "b/z.txt", "c.txt"]
    assert files.n_skipped == 1
    texts = [document.text for document in read_documents(files)]
    assert texts == ["text of b/a.md", "text of b/deep/k.txt", "text of b/z.txt", "text of c.txt"]


def test_json_lines_are_read_by_field_name_with_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    lines = [json.dumps({"body": "eins", "n": 1}), "", json.dumps({"body": "zwei ü\n", "n": 2})]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert read([path], field="body") == [(f"{path}:1", "eins"), (f"{path}:3", "zwei ü\n")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"body": "x", "id": 3}', r"x.jsonl:2: no text in field 'text' \(fields found: body, id\)"),
        (b'{"text": 3}', r"x.jsonl:2: no text in field 'text'"),
        (b'{"text": " "}', r"x.jsonl:2: field 'text' is empty"),
        (b'{"text": "x"', r"x.jsonl:2: not JSON"),
        (b'["text"]', r"x.jsonl:2: a JSON list"),
        (b'{"text": "\\ud800"}', r"x.jsonl:2: field 'text' has half a surrogate pair"),
        (b'{"text": "\xff"}', r"x.jsonl: not UTF-8 at byte offset 27"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "good"}\n' + line)
    with pytest.raises(DataError, match=message) as caught:
        read([tmp_path / "x.jsonl"])
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_utf8_are_named_by_file_and_offset(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes("ü".encode() * 3 + b"\xe9t\xe9")
    with pytest.raises(DataError, match=r"x.txt: not UTF-8 at byte offset 6; convert it"):
        read([tmp_path])


def test_a_missing_path_suggests_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "corpora").mkdir()
    with pytest.raises(DataError, match=r"no such file or folder; the nearest existing name is .*corpora$"):
        find_files([str(tmp_path / "corpus" / "deep" / "x.txt")])


@pytest.mark.parametrize(
    ("source", "message"),
    [("*.md", "matches no file"), ("x.pdf", r"unknown kind of file '.pdf'"), ("", "no documents found")],
)
def test_sources_without_text_are_refused(tmp_path: Path, source: str, message: str) -> None:
    (tmp_path / "x.pdf").write_bytes(b"%PDF")
    with pytest.raises(DataError, match=message):
        find_files([str(tmp_path / source) if source else str(tmp_path)])
