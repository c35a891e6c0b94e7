"""Every command of the documentation is executed: as it is written, with tiny sizes, in a folder made for it."""

import gzip
import json
import os
import pydoc_data.topics
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from tests.integration.conftest import SMALL
from tests.integration.documented import DRY, RANKS, ROOT, ROWS, RUN, STANDS_FOR, Row, commands, documented, row_of
from transmamba import train as entry
from transmamba.cli import app
from transmamba.compose import load
from transmamba.data_pipeline.manifest import load_manifest
from transmamba.data_pipeline.megatron import export_megatron
from transmamba.data_pipeline.prepare import prepare
from transmamba.errors import EXIT_STOP_FILE
from transmamba.validate import validate

DOCUMENTED = documented()
TINY = [*(text for text in SMALL if "checkpoint" not in text), "train.steps=2"]
FOR_RANKS = ["model.n_heads=8", "model.d_model=64", "model.n_layers=4", "train.global_batch=8", "train.micro_batch=1"]
BIN = Path(sys.executable).parent
pytestmark = pytest.mark.xdist_group("readme")


def plain(command: str) -> str:
    """The name of a command's test."""
    return re.sub(r"[^\w.=-]+", " ", command).strip()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A folder in which the names of the documentation stand for something: texts, prepared data, finished runs."""
    world = tmp_path_factory.mktemp("world")
    topics = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    (world / "MY_TEXT").mkdir()
    for number, text in enumerate(topics):
        (world / "MY_TEXT" / f"{number}.txt").write_text(text)
    shutil.copytree(world / "MY_TEXT", world / "corpus")
    (world / "more").mkdir()
    with gzip.open(world / "more" / "a.jsonl.gz", "wt") as lines:
        lines.writelines(json.dumps({"text": text}) + "\n" for text in topics)
    pq.write_table(pa.table({"body": topics}), world / "big.parquet")
    for name in ("mine", "a", "web", "python-doc"):
        shutil.copytree(corpus, world / "data" / name)
    prepare(
        [str(world / "MY_TEXT" / "1*.txt")], world / "data" / "b", tokenizer=corpus / "tokenizer.json", progress=False
    )
    for name in ("code", "news"):
        shutil.copytree(world / "data" / "b", world / "data" / name)
    shutil.copyfile(corpus / "tokenizer.json", world / "tokenizer.json")
    # What one command leaves for another must not depend on which of them a worker runs first.
    export_megatron(load_manifest(corpus), world / "PREFIX", "train", progress=False)
    here = [f"data.path={world}/data/mine", f"run.dir={world}/runs/NAME", "data.ledger=true"]
    (world / "runs" / "NAME").mkdir(parents=True)
    (world / "runs" / "NAME" / "STOP").touch()
    assert entry.main([*TINY, *here]) == EXIT_STOP_FILE
    for name in ("A", "B"):
        shutil.copytree(world / "runs" / "NAME", world / "runs" / name)
    return world


@pytest.fixture
def inside(world: Path, monkeypatch: pytest.MonkeyPatch, roomy_disk: None) -> Iterator[Path]:
    monkeypatch.chdir(world)
    yield world
    (world / "runs" / "NAME" / "STOP").unlink(missing_ok=True)


def run(command: str) -> tuple[int, str]:
    """Execute a command; those of this package in this process, which saves their imports. Returns code and output."""
    for text, meant in STANDS_FOR.items():
        command = command.replace(text, meant)
    first, *arguments = words = shlex.split(command)
    if words[:3] == ["python", "-m", "transmamba.train"]:
        return entry.main(with_tiny_sizes(words[3:])), ""
    if first == "transmamba":
        done = CliRunner().invoke(app, arguments)
        unexpected = "" if done.exception is None or isinstance(done.exception, SystemExit) else repr(done.exception)
        return done.exit_code, done.output + unexpected
    shell = ["bash", "-c", f"cd {shlex.quote(str(ROOT))} && {command}"] if first == "source" else words
    path = {"PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    told = subprocess.run(shell, env=os.environ | path, capture_output=True, text=True, timeout=240)
    return told.returncode, told.stdout + told.stderr


def with_tiny_sizes(overrides: list[str]) -> list[str]:
    """The overrides, and tiny sizes for what they leave open."""
    given = {text.split("=")[0] for text in overrides}
    if "--config" in given:
        return overrides
    has_data = any(key == "data.path" or key.startswith("data.sources.") for key in given)
    tiny = [text for text in TINY if text.split("=")[0] not in given]
    return [*tiny, *([] if has_data else ["data.path=data/mine"]), *overrides]


def ranks_of(command: str) -> tuple[int, list[str]]:
    words = shlex.split(command)
    assert words[:2] == ["torchrun", "--nproc-per-node"] and words[3:5] == ["-m", "transmamba.train"]
    return int(words[2]), with_tiny_sizes([*words[5:], *FOR_RANKS])


def check(command: str, row: Row, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if row is DRY:
        # As from a shell, also when this suite was started by make.
        environ = {name: text for name, text in os.environ.items() if not name.startswith("MAKE") and name != "MFLAGS"}
        words = ["make", "-n", *shlex.split(command)[1:]]
        told = subprocess.run(words, cwd=ROOT, env=environ, capture_output=True, text=True)
        assert told.returncode == 0, told.stderr
        last = told.stdout.strip().splitlines()[-1]
        own = "python3 " if "VENV=" in words else ".venv/bin/python "
        assert last.startswith((own, "echo")), last
        if last.startswith(f"{own}-m transmamba.train"):
            code, _ = run(last.replace(own, "python ", 1))
            assert code == 0
        return
    if row is RANKS:
        n_ranks, overrides = ranks_of(command)
        validate(load(overrides), {**os.environ, "WORLD_SIZE": str(n_ranks), "RANK": "0"})
        return
    code, output = run(row.replaced or command)
    assert code in row.codes, f"{output}{capsys.readouterr().err}"
    assert row.makes is None or (world / row.makes).exists(), row.makes


@pytest.mark.parametrize("command", [text for text in DOCUMENTED if not (row_of(text) or DRY).is_long], ids=plain)
def test_a_documented_command_works(command: str, inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = row_of(command)
    assert row is not None, f"{DOCUMENTED[command]} says `{command}`: give it a row in tests/integration/documented.py"
    check(command, row, inside, capsys)


@pytest.mark.long
@pytest.mark.parametrize("command", [text for text in DOCUMENTED if (row_of(text) or DRY).is_long], ids=plain)
def test_a_documented_command_that_lasts_works(command: str, inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = row_of(command)
    assert row is not None
    check(command, row, inside, capsys)


@pytest.mark.long
@pytest.mark.parametrize("command", [text for text in DOCUMENTED if row_of(text) is RANKS], ids=plain)
def test_a_documented_layout_trains(command: str, inside: Path) -> None:
    n_ranks, overrides = ranks_of(command)
    words = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(n_ranks), "-m", "transmamba.train"]
    told = subprocess.run(
        [*words, *overrides],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert told.returncode == 0, told.stdout + told.stderr
    assert f"{n_ranks}: tp 2" in told.stdout and "step 2/2" in told.stdout


def test_both_commands_are_installed() -> None:
    told = subprocess.run([BIN / "transmamba", "--help"], capture_output=True, text=True)
    assert told.returncode == 0 and "runs" in told.stdout


def test_commands_are_found_in_blocks_prompts_and_sentences() -> None:
    text = """
```
make train      # sets up
transmamba a 'x # y'; transmamba b     # two
```
says `transmamba c --d` and `bench step`, not `transmamba` or `x=1`
```
$ transmamba e
its output
```
```json
{"transmamba": 1}
```
"""
    assert commands(text) == [
        *("make train", "transmamba a 'x # y'", "transmamba b", "transmamba e", "transmamba c --d"),
        "transmamba bench step",
    ]


def test_a_command_that_nobody_thought_of_is_noticed() -> None:
    assert row_of("transmamba launch-missiles") is None and row_of("python -m transmamba.train new=1") is None
    assert all(row.reason for row in ROWS.values() if row.replaced), "what is replaced says why"
    assert row_of("transmamba plan --search 64 model=400m") is RUN
    shown = row_of("transmamba launch slurm --nodes 2 -- model=small")
    assert shown is not None and shown.replaced == "transmamba launch slurm --print --nodes 2 -- model=small"
