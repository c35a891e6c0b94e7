"""`transmamba evaluate --tasks`: tasks made of the held-out text, and what the harness is told and says."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.model.hf_runs import make_run, topics
from tests.unit.data.corpora import write_corpus
from transmamba import tasks as ours
from transmamba.checkpoints_tools.hf_export import export, harmless_copy
from transmamba.checkpoints_tools.hf_format import AUTO_MAP, CODE
from transmamba.cli import app
from transmamba.data_pipeline.tokenizer import encode_documents, load_tokenizer
from transmamba.errors import ConfigError, RunError
from transmamba.tasks import LOCAL_TASKS, check_tasks, result_lines, run_tasks, write_local_tasks

# What stands for the harness where it is not installed: it tells what it was told.
HARNESS = """import json, os, pathlib, sys, time
told = dict(zip(sys.argv[1::2], sys.argv[2::2]))
model = told["--model_args"].split(",")[0].removeprefix("pretrained=")
print("one line", "half a bar", sep="\\r", file=sys.stderr)
if told["--tasks"] == "broken":
    raise ValueError("no such data set")
if told["--tasks"] == "endless":
    time.sleep(100)
out = pathlib.Path(told["--output_path"], "model")
out.mkdir(parents=True)
files = sorted(os.listdir(model))
local = [path for path in told["--tasks"].split(",") if os.path.exists(path)]
found = {"told": told, "files": files, "local": local, "offline": os.environ.get("HF_HUB_OFFLINE")}
(out / "results_now.json").write_text(json.dumps({"results": found}))
"""
# A task of a user: below the folder that is given, with code and a base of its own.
OWN = {
    "deep/base_yaml": """dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder}/pages.jsonl}}}}
validation_split: validation
output_type: loglikelihood_rolling
doc_to_text: ""
""",
    "deep/own.yaml": """include: base_yaml
task: own
doc_to_target: !function texts.page
metric_list: [{{metric: bits_per_byte}}, {{metric: word_perplexity}}]
""",
    "deep/texts.py": "def page(doc):\n    return doc['page']\n",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose validation text has many documents that are long enough."""
    root = tmp_path_factory.mktemp("tasks")
    run = root / "run"
    make_run(run, "transmamba", 3, f"data.path={root / 'data'}")
    tokenizer = load_tokenizer(run / "tokenizer.json")
    documents = encode_documents(tokenizer, [text for text in topics(40) if len(text) >= 260], eod_id=0)
    sizes = {"shard_tokens": 6000, "block_tokens": 200}
    write_corpus(root / "data", documents, dtype="<u2", tokenizer=tokenizer, held_out=documents, **sizes)
    return run


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A harness that knows the tasks given, given_two, broken and endless."""
    (tmp_path / "site" / "lm_eval").mkdir(parents=True)
    (tmp_path / "site" / "lm_eval" / "__main__.py").write_text(HARNESS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)
    names = ["given", "given_two", "broken", "endless"]

    def manager(include_path: str | None) -> Any:
        known = [*names, *(["own"] if include_path else [])]
        return SimpleNamespace(all_tasks=known, match_tasks=lambda asked: [name for name in asked if name in known])

    monkeypatch.setitem(sys.modules, "lm_eval.tasks", SimpleNamespace(TaskManager=manager))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    ours._known_tasks.cache_clear()


@pytest.mark.parametrize("absent", ["lm_eval", "accelerate"])
def test_a_missing_harness_is_said_before_anything_is_scored(
    absent: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec

    def look(name: str, *rest: str | None) -> Any:
        return {"lm_eval": "there", absent: None}[name] if name in (absent, "lm_eval") else found(name, *rest)

    monkeypatch.setattr("importlib.util.find_spec", look)
    result = CliRunner().invoke(app, ["evaluate", str(run), "--tasks", "heldout_bits", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert f"the harness lm_eval is not installed ({absent} is missing)" in result.output
    assert "pip install -e '.[eval]'" in result.output
    assert result.output.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["--tasks", "givn"], r"no such task \(got givn\)\. Fix: name what it knows, such as given, given_two\."),
        (["--tasks", "heldout_bit"], "such as heldout_bits"),
        (["--tasks", "zzz"], r"no such task \(got zzz\)\. Fix: see `python -m lm_eval ls tasks`"),
        (["--tasks", "own"], "no such task"),
        (["--tasks", "own.yaml"], "no such task"),
        (["--tasks", "given,"], r"no such task \(got nothing\)"),
        (["--tasks", "given", "--include", "nowhere"], "--include: no such folder"),
    ],
)
def test_a_wrong_task_is_said_before_anything_is_scored(
    asked: list[str], words: str, run: Path, tmp_path: Path
) -> None:
    result = CliRunner().invoke(app, ["evaluate", str(run), "--out", str(tmp_path / "out"), *asked])
    assert result.exit_code == 2, result.output
    assert re.search(words, result.output), result.output
    assert result.output.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("harness")
def test_the_harness_is_told_names_files_and_the_users_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "lm_eval.py").write_text("raise SystemExit('no module of the working folder is run')")
    monkeypatch.chdir(tmp_path / "mine")
    check_tasks(["own"], tmp_path / "mine")
    found = run_tasks(run, tasks=["own", "heldout_bits"], include=tmp_path / "mine", out=tmp_path / "out", limit=9)
    (local,) = found["local"]
    assert local.endswith("/heldout_bits.yaml")
    assert found["told"]["--tasks"] == f"own,{local}"
    assert found["told"]["--include_path"] == str(tmp_path / "mine")
    assert found["told"]["--limit"] == "9"
    assert found["offline"] is None
    assert {"model.safetensors", *CODE} < set(found["files"])
    assert (tmp_path / "out" / "tasks.log").read_bytes() == b"one line\rhalf a bar\n"
    assert run_tasks(run, tasks=["heldout_bits"], include=None, out=tmp_path / "out", limit=9)["offline"] == "1"


@pytest.mark.usefixtures("harness")
def test_tasks_of_others_need_no_text_of_the_run(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "transformer", 3, f"data.path={tmp_path / 'gone'}")
    found = run_tasks(tmp_path / "run", tasks=["given"], include=None, out=tmp_path / "out", limit=4)
    assert found["local"] == []


@pytest.mark.usefixtures("harness")
def test_a_harness_that_fails_is_one_line_and_its_log(run: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"ended with 1 \(ValueError: no such data set\)\. Fix: see .*tasks\.log"
    ) as error:
        run_tasks(run, tasks=["broken"], include=None, out=tmp_path, limit=4)
    assert error.value.code == 1
    assert "Traceback" in (tmp_path / "tasks.log").read_text()


@pytest.mark.usefixtures("harness")
def test_an_interrupted_evaluation_leaves_no_harness_behind(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[subprocess.Popen[bytes]] = []

    def interrupted(child: subprocess.Popen[bytes]) -> bool:
        assert child.poll() is None
        seen.append(child)
        raise KeyboardInterrupt

    monkeypatch.setattr(ours, "_is_running", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_tasks(run, tasks=["endless"], include=None, out=tmp_path, limit=4)
    assert seen[0].returncode == -9


def test_filters_of_answers_are_named() -> None:
    found = {"t": {"alias": "t", "em,strict": 0.25, "em,none": 1.0, "em_stderr,none": 0.5, "sample_len": 4}}
    assert [line.split() for line in result_lines(found)] == [["t", "em,strict", "0.2500"], ["t", "em", "1.0000"]]


def test_tasks_are_the_same_each_time_and_hide_the_answer(run: Path, tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        files = write_local_tasks(run, folder, 4, [], list(LOCAL_TASKS))
        assert files.keys() == LOCAL_TASKS.keys()
        found.append({path.name: path.read_text().replace(str(folder), "") for path in folder.iterdir()})
    assert found[0] == found[1]
    rows = [json.loads(line) for line in (tmp_path / "one" / "heldout_choice.jsonl").read_text().splitlines()]
    texts = [text for text in topics(40) if len(text) >= 260]
    assert len(rows) == 4
    assert len({row["gold"] for row in rows}) > 1
    for row in rows:
        (whole,) = [text for text in texts if text.startswith(row["query"])]
        assert [whole[200:260] == choice for choice in row["choices"]] == [i == row["gold"] for i in range(4)]


def test_questions_need_long_documents_and_bits_do_not(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ours, "_held_out_texts", lambda *given: iter(["short", "x" * 260]))
    assert list(write_local_tasks(run, tmp_path, 4, [], ["heldout_bits"])) == ["heldout_bits"]
    with pytest.raises(ConfigError, match=r"needs 4 held-out documents of 260 characters \(got 1\)"):
        write_local_tasks(run, tmp_path, 4, [], list(LOCAL_TASKS))


@pytest.mark.parametrize("map_of", ["config.json", "tokenizer_config.json"])
def test_a_model_folder_brings_no_code_of_its_own(map_of: str, tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    for name in ("modeling_transmamba.py", "evil.py"):
        (given / name).write_text("raise SystemExit")
    for name in ("pytorch_model.bin", "adapter_config.json", "adapter_model.safetensors"):
        (given / name).write_bytes(b"pickle, or weights of an adapter")
    (given / "config.json").write_text(json.dumps({"auto_map": AUTO_MAP}))
    (given / "tokenizer_config.json").write_text("{}")
    assert harmless_copy(given, tmp_path / "ours")
    held = {path.name for path in (tmp_path / "ours").iterdir()}
    assert held == {"config.json", "tokenizer_config.json", *CODE}
    assert "SystemExit" not in (tmp_path / "ours" / "modeling_transmamba.py").read_text()
    # A map that leads elsewhere, to another repository for instance, is not trusted.
    (given / map_of).write_text(json.dumps({"auto_map": {"AutoConfig": "someone/else--evil.Config"}}))
    assert not harmless_copy(given, tmp_path / "foreign")
    assert not list((tmp_path / "foreign").glob("*.py"))


@pytest.mark.long
def test_the_harness_runs_local_tasks_and_a_users_own_without_code_of_the_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    folder, mine, ran = tmp_path / "hf", tmp_path / "mine", tmp_path / "ran"
    export(run, folder, check_tokens=0)
    (mine / "deep").mkdir(parents=True)
    pages = [{"page": text[:150]} for text in topics(4)]
    (mine / "pages.jsonl").write_text("".join(json.dumps(page) + "\n" for page in pages))
    for name, text in OWN.items():
        (mine / name).write_text(text.format(folder=mine))
    for name in ("modeling_transmamba.py", "modeling_evil.py", "lm_eval.py", "datasets.py"):
        (folder / name).write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(folder)
    check_tasks([*LOCAL_TASKS, "own", "arc_easy"], mine)
    with pytest.raises(ConfigError, match=r"no such task .*such as hellaswag"):
        check_tasks(["hellaswagg"], None)
    found = run_tasks(run, tasks=[*LOCAL_TASKS, "own"], include=mine, out=tmp_path / "of_run", limit=4)
    data = [f"data.path={run.parent / 'data'}"]
    of_folder = run_tasks(
        folder, tasks=[*LOCAL_TASKS, "own"], include=mine, out=tmp_path / "of_hf", limit=4, overrides=data
    )
    assert found == of_folder
    assert not ran.exists()
    assert 0 <= found["heldout_choice"]["acc,none"] <= 1
    for name in ("heldout_bits", "own"):
        assert 1 < found[name]["bits_per_byte,none"] < 20
    assert json.loads((tmp_path / "of_run" / "tasks.json").read_text()) == found
