"""No file that is reached by a source is passed over without a word."""

from __future__ import annotations

import gzip
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.listing import find_files
from transmamba.data_pipeline.parts import Piece, Reading
from transmamba.data_pipeline.sources import SourceFile


def places(*sources: Path | str, below: Path) -> list[str]:
    found = find_files([str(source) for source in sources])
    return [os.path.relpath(file.place, below) for file in found.files]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A folder with files at every depth, beside another one."""
    for name in ("in/d5.txt", "in/en/d1.txt", "in/en/deep/d2.md", "in/fr/d3.jsonl", "other/x.txt", "other/sub/y.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("words")
    return tmp_path / "in"


def forbid(monkeypatch: pytest.MonkeyPatch, forbidden: Path) -> None:
    """Let a folder be one that may not be listed or entered."""

    def refusing(call: Callable[..., Any], is_meant: Callable[[str], bool]) -> Callable[..., Any]:
        def act(path: Any = ".", *rest: Any, **options: Any) -> Any:
            if isinstance(path, str | os.PathLike) and is_meant(os.path.abspath(path)):
                raise PermissionError(13, "Permission denied", os.fspath(path))
            return call(path, *rest, **options)

        return act

    below = f"{forbidden}{os.sep}"
    monkeypatch.setattr(os, "scandir", refusing(os.scandir, lambda path: f"{path}{os.sep}".startswith(below)))
    for name in ("stat", "lstat", "open"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name), lambda path: path.startswith(below)))


def test_links_to_folders_are_followed_once_and_loops_end(tree: Path) -> None:
    before = places(tree, below=tree)
    (tree / "linked").symlink_to("../other")
    (tree / "second").symlink_to("../other/sub")
    (tree / "self").symlink_to(".")
    (tree / "en" / "up").symlink_to("..")
    assert before == ["d5.txt", "en/d1.txt", "en/deep/d2.md", "fr/d3.jsonl"]
    assert places(tree, below=tree) == [*before, "linked/sub/y.txt", "linked/x.txt"]
    (tree.parent / "other" / "back").symlink_to("../in")
    assert places(tree, below=tree) == [*before, "linked/sub/y.txt", "linked/x.txt"]


def test_a_link_to_a_folder_of_the_same_tree_changes_neither_names_nor_order(tree: Path) -> None:
    before = places(tree, below=tree)
    (tree / "a-link").symlink_to("fr")
    (tree / "en" / "link").symlink_to("deep")
    assert places(tree, below=tree) == before


def test_folders_that_a_pattern_matches_are_walked(tree: Path) -> None:
    everything = ["d5.txt", "en/d1.txt", "en/deep/d2.md", "fr/d3.jsonl"]
    (tree / "en" / ".hidden.txt").write_text("words")
    assert places(tree / "*", below=tree) == [everything[0], "en/.hidden.txt", *everything[1:]]
    assert places(f"{tree}/*/", below=tree) == ["en/.hidden.txt", *everything[1:]]
    assert places(f"{tree}/**/d*/", below=tree) == ["en/deep/d2.md"]
    # It has what is below a folder as matches of its own, but for what is hidden.
    assert places(tree / "**", below=tree) == everything
    assert places(tree / "**" / "*.txt", below=tree) == ["d5.txt", "en/d1.txt"]
    (tree / "self").symlink_to(".")
    assert places(tree / "**", below=tree) == everything


@pytest.mark.parametrize("target", ["/mnt/none/x", "gone.jsonl", "d5.txt/x"])
@pytest.mark.parametrize("name", ["gone.jsonl", "gone"])
@pytest.mark.parametrize("source", ["", "*", "**", "**/gone*", "{name}"])
def test_a_link_to_nothing_is_named(tree: Path, target: str, name: str, source: str) -> None:
    (tree / name).symlink_to(target)
    line = rf"in/{name}: is a link to {re.escape(target)}, where nothing is; mount or fetch that, or remove the link"
    if name == "gone" and target == "gone.jsonl":
        (tree / "gone.jsonl").symlink_to("none")
        line = "where nothing is"
    with pytest.raises(DataError, match=line):
        find_files([str(tree / source.format(name=name)) if source else str(tree)])


@pytest.mark.parametrize(
    "source", ["", "*", "*/*", "*/*.txt", "**", "**/*.txt", "shut", "shut/*.txt", "shut/d2.txt", "link", "shut/none/x"]
)
def test_a_folder_that_may_not_be_read_is_named(tree: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    (tree / "shut").mkdir()
    (tree / "shut" / "d2.txt").write_text("words")
    (tree / "link").symlink_to("shut")
    forbid(monkeypatch, tree / "shut")
    with pytest.raises(DataError, match=r"in/(shut|link)\S*: cannot be read \(Permission denied\); check its perm"):
        find_files([f"{tree}/{source}" if source else str(tree)])
    assert places(tree / "en", below=tree) == ["en/d1.txt", "en/deep/d2.md"]


def test_pipes_are_refused_and_other_things_left_alone(tree: Path) -> None:
    os.mkfifo(tree / "sock")
    assert len(places(tree, below=tree)) == 4
    os.mkfifo(tree / "pipe.txt")
    reader, writer = os.pipe()
    for source in (tree / "pipe.txt", tree, tree / "*", tree / "sock", Path(f"/dev/fd/{reader}")):
        with pytest.raises(DataError, match=r"is no regular file, .* read twice; write its text into a file first"):
            find_files([str(source)])
    os.close(reader)
    os.close(writer)


def test_an_empty_name_is_not_the_current_folder(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    with pytest.raises(DataError, match=r"sources: '' names nothing; .*is a variable unset"):
        find_files(["", "d5.txt"])
    assert len(find_files(["."]).files) == 4


def test_files_of_other_kinds_are_counted_by_suffix(tree: Path) -> None:
    for name in ("a.html", "en/b.HTML", "c.tsv", "README", "d.csv.gz"):
        (tree / name).write_text("words")
    found = find_files([str(tree)])
    assert found.n_skipped == 5
    assert found.skipped_words() == "2 .html, 1 .csv.gz, 1 .tsv, 1 without suffix"
    with pytest.raises(DataError, match=r"no documents found \(files of other kinds: 1 .tsv\); give files that end in"):
        find_files([str(tree / "c*")])


@pytest.mark.parametrize(("name", "packing"), [("x.jsonl.gz", "gzip"), ("x.txt.zst", "zstd")])
def test_a_packed_file_of_no_bytes_is_damaged(tree: Path, name: str, packing: str) -> None:
    (tree / name).write_bytes(b"")
    with pytest.raises(DataError, match=rf"{name}: its {packing} data are damaged or cut off \(0 bytes\); copy it aga"):
        find_files([str(tree)])
    # Of a web server's stream the length may not be known.
    file = SourceFile(str(tree / name), f".{name.split('.')[1]}", packing, 0, "", can_seek=False)
    with pytest.raises(DataError, match=rf"{name}: its {packing} data are damaged or cut off \(0 bytes\); copy it aga"):
        list(Reading((Piece(file, 0, 0),), "text").documents())
    (tree / name).write_bytes(gzip.compress(b"") if packing == "gzip" else b"\x28\xb5\x2f\xfd\x00\x58\x01\x00\x00")
    reading = Reading((Piece(find_files([str(tree / name)]).files[0], 0, 0),), "text")
    assert list(reading.documents()) == []


@pytest.fixture
def bucket() -> Iterator[str]:
    """A folder of fsspec's file system in memory."""
    files = fsspec.filesystem("memory")
    for name in ("readme.txt", "en/d1.txt", "en/deep/d2.md", "fr/d3.jsonl"):
        files.pipe(f"/bucket/{name}", b"words")
    yield "memory://bucket"
    files.rm("/bucket", recursive=True)


def test_folders_that_the_pattern_of_a_url_matches_are_walked(bucket: str) -> None:
    def names(source: str) -> list[str]:
        return [file.place.partition("bucket/")[2] for file in find_files([source]).files]

    assert names(f"{bucket}/*") == ["en/d1.txt", "en/deep/d2.md", "fr/d3.jsonl", "readme.txt"]
    assert names(f"{bucket}/e*") == ["en/d1.txt", "en/deep/d2.md"]
    assert names(f"{bucket}/*.txt") == ["readme.txt"]
    with pytest.raises(DataError, match="the pattern matches no file"):
        find_files([f"{bucket}/none*"])


def test_a_packed_object_of_no_bytes_is_damaged(bucket: str) -> None:
    fsspec.filesystem("memory").pipe("/bucket/en/x.jsonl.gz", b"")
    with pytest.raises(DataError, match=r"bucket/en/x.jsonl.gz: its gzip data are damaged or cut off \(0 by"):
        find_files([bucket])
