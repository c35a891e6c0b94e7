"""A preparation that was killed goes on where it was and ends with the bytes of one that was not."""

from __future__ import annotations

import contextlib
import json
import os
import pydoc_data.topics
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from transmamba.data_pipeline.work import work_folder_of

ROOT = Path(__file__).parents[3]
# The command with parts that are small enough for a test.
COMMAND = (
    "import sys; from transmamba.data_pipeline import parts, prepare; "
    "parts.LEAST_PART_BYTES = prepare.LEAST_PART_BYTES = 50_000; "
    "from transmamba import cli; sys.exit(cli.app())"
)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A megabyte of JSON lines."""
    path = tmp_path_factory.mktemp("in") / "x.jsonl"
    texts = [f"{i} {text}" for i in range(2) for text in map(str, pydoc_data.topics.topics.values())]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def start(lines: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    options = ["--workers", "2", "--vocab-size", "400", "--dedup", "--block-tokens", "4096", "--shard-tokens", "8192"]
    command = [sys.executable, "-c", COMMAND, "data", "prepare", str(lines), "--out", str(out), *options, *more]
    environment = {**os.environ, "COLUMNS": "200"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True)


def finish(lines: Path, out: Path, *more: str) -> str:
    """Run to the end; returns what it said."""
    process = start(lines, out, *more)
    said, complained = process.communicate(timeout=120)
    assert process.returncode == 0, complained
    assert f"next         python -m transmamba.train data.path={out}" in said
    return complained


@pytest.fixture(scope="module")
def expected(lines: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed run makes."""
    out = tmp_path_factory.mktemp("expected") / "data"
    finish(lines, out)
    return files_of(out)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def children_of(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = status.read_text().rpartition(")")[2].split()
            if int(fields[1]) == pid:
                found.append(int(status.parent.name))
    return found


def wait_for_parts(work: Path, pattern: str, n_parts: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while len(list(work.glob(pattern))) < n_parts and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def marks_of(paths: Iterator[Path]) -> set[tuple[int, int]]:
    """What tells a file from one that was written again, whatever its name."""
    return {(path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def finished_shards(work: Path) -> set[tuple[int, int]]:
    records = [json.loads(path.read_text()) for path in work.glob("part-*.json")]
    shards = [shard for record in records for split in ("train", "validation") for shard in record[split]["shards"]]
    return marks_of(work / "shards" / shard["name"] for shard in shards)


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def interrupt(process: subprocess.Popen[str], how: str) -> str:
    """End a run in one of three ways; returns its last line."""
    workers = [pid for pid in children_of(process.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    if how == "kill":
        process.kill()
    elif how == "kill a worker":
        os.kill(workers[0], signal.SIGKILL)
    else:
        # As a terminal does, to all of them.
        for pid in (process.pid, *workers):
            os.kill(pid, signal.SIGINT)
    _, complained = process.communicate(timeout=60)
    assert "Traceback" not in complained
    deadline = time.monotonic() + 5
    while not all(map(is_gone, workers)):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.01)
    return complained.splitlines()[-1] if complained else ""


def test_however_it_is_interrupted_it_goes_on_without_redoing_finished_shards(
    lines: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "data"
    work = work_folder_of(out)
    kept: set[tuple[int, int]] = set()
    last = ""
    stages = [
        ("survey-*.json", 3, "kill", -9, ""),
        ("part-*.json", 1, "kill", -9, ""),
        ("part-*.json", 4, "ctrl-c", 10, "stopped; the same command goes on where it was"),
        ("part-*.json", 8, "kill a worker", 31, "use fewer --workers; the same command goes on where it was"),
    ]
    for pattern, n_parts, how, code, end in stages:
        process = start(lines, out)
        wait_for_parts(work, pattern, n_parts, process)
        last = interrupt(process, how)
        assert process.returncode == code
        assert last.rstrip(".").endswith(end)
        assert not out.exists()
        assert kept <= finished_shards(work)
        kept = finished_shards(work)
    assert last.startswith("transmamba: error: --workers: a worker process died; parts ")
    assert len(kept) > 8
    complained = finish(lines, out)
    assert "going on: " in complained
    assert files_of(out) == expected
    assert kept <= marks_of(out.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.long
def test_changed_text_is_refused_and_starts_anew_when_told(
    lines: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    copy, out = tmp_path / "x.jsonl", tmp_path / "data"
    copy.write_bytes(lines.read_bytes())
    process = start(copy, out)
    wait_for_parts(work_folder_of(out), "part-*.json", 2, process)
    interrupt(process, "kill")
    with copy.open("a") as file:
        file.write('{"text": "one more"}\n')
    kept = finished_shards(work_folder_of(out))
    process = start(copy, out)
    _, complained = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"was begun with other files (changed: {copy}). Fix: put them back, or give --replace" in complained
    assert kept == finished_shards(work_folder_of(out))
    complained = finish(copy, out, "--replace")
    assert "starting anew, because of other sources than before" in complained
    assert "going on" not in complained
    assert files_of(out) != expected


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    lines: Path, expected: dict[str, bytes], tmp_path: Path, seed: int
) -> None:
    generator = random.Random(seed)
    out = tmp_path / "data"
    for _ in range(6):
        process = start(lines, out)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(generator.uniform(0.5, 4.0))
        process.kill()
        process.communicate()
    finish(lines, out)
    assert files_of(out) == expected
