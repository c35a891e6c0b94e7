"""Finished work is not thrown away because its sources look different at the restart."""

from __future__ import annotations

import os
import pydoc_data.topics
from pathlib import Path

import pytest
from typer.testing import CliRunner

from transmamba.cli import app
from transmamba.data_pipeline import passes
from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.prepare import prepare
from transmamba.data_pipeline.work import work_folder_of

TOPICS = [str(text) for text in list(pydoc_data.topics.topics.values())[:12]]
OPTIONS = {"vocab_size": 300, "progress": False}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of a few texts, one of them with a name that is not UTF-8."""
    folder = tmp_path / "in"
    folder.mkdir()
    for i, text in enumerate(TOPICS):
        (folder / f"d{i:02}.txt").write_text(text)
    (folder / os.fsdecode(b"\xff.txt")).write_text("odd")
    return folder


def interrupt(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *, after: str = "join_surveys") -> None:
    """Leave what a kill leaves before the call of this name."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(passes, after, stop)
        with pytest.raises(KeyboardInterrupt):
            prepare([str(source)], out, **OPTIONS)


def marks_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir() if path.is_file()}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("after", ["join_surveys", "_manifest"])
def test_sources_that_are_gone_or_changed_do_not_cost_finished_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    prepare([str(source)], tmp_path / "expected", **OPTIONS)
    out, aside = tmp_path / "out", tmp_path / "aside"
    interrupt(source, out, monkeypatch, after=after)
    before = marks_of(work_folder_of(out))
    assert "survey-000000.json" in before
    stamp = (source / "d05.txt").stat().st_mtime_ns
    (source / "d03.txt").rename(aside)
    (source / "new.txt").write_text("new")
    os.utime(source / "d05.txt")
    pattern = (
        rf"out: was begun with other files \(gone: {source}/d03.txt; new: {source}/new.txt; "
        rf"changed: {source}/d05.txt\); put them back, or give --replace to begin anew"
    )
    with pytest.raises(DataError, match=pattern):
        prepare([str(source)], out, **OPTIONS)
    assert not out.exists()
    assert marks_of(work_folder_of(out)) == before
    aside.rename(source / "d03.txt")
    (source / "new.txt").unlink()
    os.utime(source / "d05.txt", ns=(stamp, stamp))
    prepare([str(source)], out, **OPTIONS)
    assert files_of(out) == files_of(tmp_path / "expected")


def test_the_command_says_it_in_one_line_and_begins_anew_when_told(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupt(source, out, monkeypatch)
    for i in range(5):
        (source / f"d0{i}.txt").unlink()
    command = ["data", "prepare", str(source), "--out", str(out), "--vocab-size", "300"]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2
    assert f"(gone: {source}/d00.txt, {source}/d01.txt, {source}/d02.txt and 2 more). Fix: put them" in refused.output
    again = CliRunner().invoke(app, [*command, "--replace"])
    assert again.exit_code == 0
    assert "starting anew, because of other sources than before" in again.output
    prepare([str(source)], tmp_path / "expected", **OPTIONS)
    assert files_of(out) == files_of(tmp_path / "expected")
    assert not work_folder_of(out).exists()


def test_the_same_files_in_another_order_are_other_sources(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(source, tmp_path / "out", monkeypatch)
    with pytest.raises(DataError, match=r"was begun with other files \(the same in another order, or by other URLs\)"):
        prepare([str(source / "d11.txt"), str(source)], tmp_path / "out", **OPTIONS)


def test_where_nothing_is_finished_other_sources_begin_anew(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupt(source, out, monkeypatch, after="start_workers")
    assert (work_folder_of(out) / "plan.json").exists()
    (source / "d03.txt").unlink()
    prepare([str(source)], out, **OPTIONS)
    prepare([str(source)], tmp_path / "expected", **OPTIONS)
    assert files_of(out) == files_of(tmp_path / "expected")
