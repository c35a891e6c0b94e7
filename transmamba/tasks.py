"""The lm-evaluation-harness on a run: exported, then given tasks made of its own validation text, or any other task."""

import difflib
import functools
import importlib
import importlib.util
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from transmamba.checkpoints_tools.hf_export import export, harmless_copy
from transmamba.compose import load
from transmamba.corpus import open_corpus
from transmamba.data_pipeline.progress import show_step
from transmamba.data_pipeline.tokenizer import load_tokenizer
from transmamba.errors import EXIT_INTERNAL, ConfigError, Problem, RunError
from transmamba.generate import load_run
from transmamba.scoring import with_overrides

# Tasks that need no download, by name: what the harness is told.
LOCAL_TASKS = {
    "heldout_bits": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        # No word perplexity: it overflows where a line is one word, as in languages without spaces.
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
    },
    "heldout_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    },
}
# Characters of a question's text and of each answer.
_QUERY, _ANSWER = 200, 60
_SEED = 17


def check_tasks(tasks: Sequence[str], include: Path | None) -> None:
    """Say what is missing before anything is computed.

    Args:
        tasks: names of local tasks, of the harness's tasks, groups and tags (`*` stands for anything), of tasks in
            `include`, or paths of task files.
        include: folder with task files, of any depth.

    Raises:
        ConfigError: the harness is not installed, there is no folder `include`, or it knows no such task.
    """
    for package in ("lm_eval", "accelerate"):
        if importlib.util.find_spec(package) is None:
            fix = "install it with `pip install -e '.[eval]'`"
            what = f"the harness lm_eval is not installed ({package} is missing)"
            raise ConfigError([Problem("--tasks", what, ",".join(tasks), fix)])
    if include is not None and not include.is_dir():
        raise ConfigError([Problem("--include", "no such folder", include, "give the folder with the task files")])
    problems = []
    for name in tasks:
        is_file = name.endswith(".yaml") and Path(name).is_file()
        if name in LOCAL_TASKS or is_file or _known_tasks(include).match_tasks([name]):
            continue
        known = [*LOCAL_TASKS, *_known_tasks(include).all_tasks]
        near = ", ".join(difflib.get_close_matches(name, known, n=3))
        fix = f"name what it knows, such as {near}" if near else "see `python -m lm_eval ls tasks`, or give --include"
        problems.append(Problem("--tasks", "no such task", name, fix))
    if problems:
        raise ConfigError(problems)


@functools.cache
def _known_tasks(include: Path | None) -> Any:
    """The harness's index of tasks. It reads ten thousand files, which takes seconds."""
    manager = importlib.import_module("lm_eval.tasks").TaskManager
    return manager(include_path=None if include is None else str(include))


def run_tasks(
    run_dir: Path,
    *,
    tasks: Sequence[str],
    include: Path | None,
    out: Path,
    limit: int,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Results of the harness by task; they are also written to `out`/tasks.json.

    `heldout_bits` and `heldout_choice` (which of four continuations is the text's own) are made of the run's
    validation text; other names are as in `check_tasks`. What the harness says goes to `out`/tasks.log.

    Args:
        run_dir: a run folder, or a model folder of transformers.
        limit: documents per task.
        overrides: as for `scoring.evaluate`.

    Raises:
        ConfigError: as `check_tasks`, there is no run, or its validation text is too short for a local task.
        RunError: it failed (exit 1); its last line is told.
    """
    check_tasks(tasks, include)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        local, model = folder / "tasks", folder / "model"
        local.mkdir()
        files = write_local_tasks(run_dir, local, limit, overrides, [name for name in LOCAL_TASKS if name in tasks])
        if (run_dir / "config.json").is_file():
            trusted = harmless_copy(run_dir, model)
        else:
            export(run_dir, model, check_tokens=0)
            trusted = True
        given = [str(files.get(name, name)) for name in tasks]
        results = _harness(
            folder, trusted, given, include, limit, out / "tasks.log", is_local=set(tasks) <= files.keys()
        )
    (out / "tasks.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def result_lines(results: dict[str, Any]) -> list[str]:
    """One line per task and metric; a filter of the answers is named if there is one."""
    return [
        f"{task:<20} {metric.removesuffix(',none'):<20} {value:.4f}"
        for task, found in sorted(results.items())
        for metric, value in found.items()
        if isinstance(value, float) and "stderr" not in metric
    ]


def _harness(
    folder: Path, trusted: bool, tasks: Sequence[str], include: Path | None, limit: int, log: Path, *, is_local: bool
) -> dict[str, Any]:
    # -P: nothing in the folder that the user happens to be in is taken for a module.
    command = [sys.executable, "-P", "-m", "lm_eval", "--model", "hf", "--batch_size", "8", "--limit", str(limit)]
    command += ["--model_args", f"pretrained={folder / 'model'},trust_remote_code={trusted},dtype=float32"]
    command += ["--tasks", ",".join(tasks), "--output_path", str(folder / "out")]
    command += [] if include is None else ["--include_path", str(include)]
    environment = os.environ | {"HF_MODULES_CACHE": str(folder / "modules")}
    if is_local:
        # Texts of these tasks lie elsewhere each time: the user's cache would fill with copies.
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
        environment |= offline
    with log.open("wb") as file, show_step("running lm_eval", None, visible=True) as advance:
        nothing = subprocess.DEVNULL
        child = subprocess.Popen(command, env=environment, stdin=nothing, stdout=nothing, stderr=file)
        try:
            while _is_running(child):
                advance(0, escape(_last_line(log)[:40]))
        finally:
            child.kill()
            child.wait()
    if child.returncode:
        what = f"lm_eval ended with {child.returncode} ({_last_line(log)[:200]})"
        raise RunError(EXIT_INTERNAL, f"--tasks: {what}. Fix: see {log}")
    (found,) = (folder / "out").rglob("results_*.json")
    return json.loads(found.read_text(encoding="utf-8"))["results"]


def _is_running(child: subprocess.Popen[bytes]) -> bool:
    """Wait a second at most."""
    try:
        child.wait(1)
    except subprocess.TimeoutExpired:
        return True
    return False


def _last_line(log: Path) -> str:
    """The last thing that was said; bars return to the start of their line."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4000))
        said = re.split(r"[\r\n]+", file.read().decode(errors="replace").strip())
    return said[-1].strip()


def write_local_tasks(
    run_dir: Path, folder: Path, limit: int, overrides: Sequence[str], names: Sequence[str]
) -> dict[str, Path]:
    """Write the named local tasks and their documents, the same for the same run; returns the task files by name.

    Raises:
        ConfigError: the validation text is too short for a question.
    """
    if not names:
        return {}
    texts = list(itertools.islice(_held_out_texts(run_dir, overrides), 4 * limit))
    rows, files = {}, {}
    if "heldout_bits" in names:
        rows["heldout_bits"] = [{"text": text} for text in texts[:limit]]
    if "heldout_choice" in names:
        long = [text for text in texts if len(text) >= _QUERY + _ANSWER]
        if len(long) < 4:
            what = f"heldout_choice needs 4 held-out documents of {_QUERY + _ANSWER} characters"
            fix = "hold out more text (`transmamba data prepare --validation-share`), or name other tasks"
            raise ConfigError([Problem("--tasks", what, len(long), fix)])
        draw = random.Random(_SEED)
        rows["heldout_choice"] = [_question(i, long, draw) for i in range(min(limit, len(long)))]
    for name, documents in rows.items():
        data, files[name] = folder / f"{name}.jsonl", folder / f"{name}.yaml"
        data.write_text("".join(json.dumps(row) + "\n" for row in documents), encoding="utf-8")
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": str(data)}}}
        # JSON is YAML.
        record = task | {"validation_split": "validation"} | LOCAL_TASKS[name]
        files[name].write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return files


def _question(number: int, texts: list[str], draw: random.Random) -> dict[str, Any]:
    others = draw.sample([i for i in range(len(texts)) if i != number], 3)
    gold = draw.randrange(4)
    choices = [texts[i][_QUERY : _QUERY + _ANSWER] for i in others]
    choices.insert(gold, texts[number][_QUERY : _QUERY + _ANSWER])
    return {"query": texts[number][:_QUERY], "choices": choices, "gold": gold}


def _held_out_texts(run_dir: Path, overrides: Sequence[str]) -> Iterator[str]:
    """Documents of the first validation set, decoded, in order."""
    file = run_dir / "config.yaml"
    config = load(["--config", str(file)]) if file.is_file() else load_run(run_dir)[2]
    corpus = open_corpus(with_overrides(config, overrides))
    store = next(iter(corpus.held.values())).store("validation")
    tokenizer = load_tokenizer(corpus.first.tokenizer_path)
    firsts = [*store.starts(0, store.n_tokens).tolist(), store.n_tokens]
    for first, end in itertools.pairwise(firsts):
        text = tokenizer.decode(store.read(first, end - 1).tolist())
        if text.strip():
            yield text
