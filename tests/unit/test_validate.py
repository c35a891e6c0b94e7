"""Every input that can be known to be wrong gives a line with its key and fix, and creates nothing."""

import json
import os
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.unit.wrong_inputs import CASES, NOT_HERE, Case, with_other, with_run
from transmamba import validate_run
from transmamba.compose import load
from transmamba.data_pipeline.prepare import prepare
from transmamba.errors import ConfigError
from transmamba.validate import validate
from transmamba.validate_data import data_problems

LINE = re.compile(r"transmamba: error: .+: .+ \(got .*\)\. Fix: .+\.")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    for number in range(40):
        words = " ".join(f"word{(number * 7 + i) % 50}" for i in range(300))
        (folder / f"{number}.txt").write_text(f"Document {number}. {words}\n")
    prepare([str(folder / "*.txt")], folder / "data", vocab_size=300, validation_share=0.2, progress=False)
    return folder / "data"


def snapshot(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.row}-{case.sentence.replace(' ', '-')}")
def test_wrong_input_names_its_key_and_its_fix_and_creates_nothing(
    case: Case, tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_data = "{data}" in case.argv or case.row == 61
    if needs_data:
        shutil.copytree(prepared, tmp_path / "data")
    if case.setup is not None:
        case.setup(tmp_path)
    pretend(case, monkeypatch)
    monkeypatch.chdir(tmp_path)
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        names = {"here": tmp_path, "data": tmp_path / "data", "port": listener.getsockname()[1]}
        argv = [argument.format(**names) for argument in case.argv.split(" ") if argument]
        environ = {name: text.format(**names) for name, text in case.environ.items()}
        before = snapshot(tmp_path)
        with pytest.raises(ConfigError) as error:
            validate(load(argv), environ)
    problems = {problem.key: problem for problem in error.value.problems}
    key = next((name for name in problems if name == case.key or name.endswith(f"/{case.key}")), None)
    assert key is not None, error.value.lines()
    wanted = case.fix.format(**names)
    assert any(text in problems[key].fix for text in wanted.split("|")), problems[key].line()
    assert all(LINE.fullmatch(line) for line in error.value.lines())
    assert snapshot(tmp_path) == before


def pretend(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Facts of the machine that a test cannot bring about, because root may do everything."""
    if case.row == 95:
        monkeypatch.setattr("transmamba.validate.version", lambda name: "2.3.1+cpu")
    if case.sentence == "run folder not writable":
        monkeypatch.setattr(validate_run.os, "access", lambda path, mode: "locked" not in str(path))
    if case.sentence == "shards unreadable":
        opened = Path.open

        def refuse(path: Path, *args: Any, **options: Any) -> Any:
            if path.suffix == ".tar":
                raise PermissionError(13, "Permission denied", str(path))
            return opened(path, *args, **options)

        monkeypatch.setattr(Path, "open", refuse)


def test_every_kind_of_wrong_input_is_covered_or_named_as_not_applicable() -> None:
    assert {case.row for case in CASES} | set(NOT_HERE) == set(range(1, 97))
    assert not {case.row for case in CASES} & set(NOT_HERE)


@pytest.mark.parametrize(
    "argv",
    [
        "",
        "train.steps=1",
        "train.steps=20",
        "train.global_batch=12",
        "optim.lr=1e-4",
        "train.tokens=1M",
        "model=tiny_hybrid",
    ],
)
def test_defaults_fit_themselves_to_what_is_given(argv: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    validate(load(argv.split()), {})


def test_good_data_passes(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load([f"data.path={prepared}", f"run.dir={tmp_path}/run"])
    validate(config, {"WORLD_SIZE": "1", "RANK": "0", "MASTER_PORT": "29500"})


def test_good_sources_in_a_blend_with_stages_pass(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(prepared, tmp_path / "data")
    with_other()(tmp_path)
    argv = ["data.sources.a=data", "data.sources.b=other", "data.blend={a:0.7,b:0.3}", "train.steps=20"]
    argv += ["data.stages=[{step:5,blend:{b:1}},{step:9,blend:{a:2,b:1}}]"]
    assert list(data_problems(load(argv))) == []
    assert list(data_problems(load(["data.sources.a=data"]))) == []


def test_a_run_folder_continues_with_more_steps_and_after_a_dead_job(tmp_path: Path) -> None:
    run = f"run.dir={tmp_path}/run"
    with_run(config=run, step=5, lock__json=json.dumps({"host": socket.gethostname(), "pid": 2**22 + 1}))(tmp_path)
    validate(load([run, "train.steps=500", "resume=must"]), {})


def test_a_folder_whose_run_was_killed_at_its_last_step_may_still_finish(tmp_path: Path) -> None:
    with_run(step=20)(tmp_path)
    validate(load([f"run.dir={tmp_path}/run", "train.steps=20"]), {})


def test_a_longer_sequence_needs_to_be_allowed_in_a_folder_of_another_length(tmp_path: Path) -> None:
    run = f"run.dir={tmp_path}/run"
    with_run(config=run)(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.seq_len 256 -> 512.*resume\.allow"):
        validate(load([run, "data.seq_len=512"]), {})
    validate(load([run, "data.seq_len=512", "resume.allow=[seq_len]"]), {})


def test_a_stale_lock_of_another_machine_does_not_hold_the_folder(tmp_path: Path) -> None:
    with_run(lock__json=json.dumps({"host": "elsewhere", "pid": 1}))(tmp_path)
    os.utime(tmp_path / "run" / "lock.json", (1, 1))
    validate(load([f"run.dir={tmp_path}/run"]), {})


def test_all_problems_are_told_at_once_and_at_most_twenty_lines() -> None:
    with pytest.raises(ConfigError) as error:
        load(["optim.lr=0", "seed=-1", "model.tied=yes", "lr=3"])
    assert [problem.key for problem in error.value.problems] == ["lr", "seed", "model.tied", "optim.lr"]
    with pytest.raises(ConfigError) as error:
        load([f"x{i}=1" for i in range(50)])
    assert len(error.value.problems) == 50
    assert len(error.value.lines()) == 20
