"""The lm-evaluation-harness on a run: exported, then given tasks made of its own validation text, or any other task."""

import importlib.util
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transmamba.checkpoints_tools.hf_export import export, harmless_copy
from transmamba.compose import load
from transmamba.corpus import open_corpus
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
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
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

    Raises:
        ConfigError: the harness is not installed, or there is no folder `include`.
    """
    if importlib.util.find_spec("lm_eval") is None:
        fix = "install it with `pip install -e '.[eval]'`"
        raise ConfigError([Problem("--tasks", "the harness lm_eval is not installed", ",".join(tasks), fix)])
    if include is not None and not include.is_dir():
        raise ConfigError([Problem("--include", "no such folder", include, "give the folder with the task files")])


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
    validation text; other names are the harness's, or those of task files in `include`.

    Args:
        run_dir: a run folder, or a model folder of transformers.
        limit: documents per task.
        overrides: as for `scoring.evaluate`.

    Raises:
        ConfigError: as `check_tasks`, or there is no run.
        RunError: it failed (exit 1); its last line is told.
    """
    check_tasks(tasks, include)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = folder / "model"
        if (run_dir / "config.json").is_file():
            trusted = harmless_copy(run_dir, model)
        else:
            export(run_dir, model, check_tokens=0)
            trusted = True
        local = folder / "tasks"
        local.mkdir()
        write_local_tasks(run_dir, local, limit, overrides)
        if include is not None:
            for path in include.iterdir():
                (local / path.name).symlink_to(path.resolve())
        results = _harness(folder, trusted, local, tasks, limit)
    (out / "tasks.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def result_lines(results: dict[str, Any]) -> list[str]:
    """One line per task and metric."""
    return [
        f"{task:<20} {metric.split(',')[0]:<20} {value:.4f}"
        for task, found in sorted(results.items())
        for metric, value in found.items()
        if isinstance(value, float) and "stderr" not in metric
    ]


def _harness(folder: Path, trusted: bool, local: Path, tasks: Sequence[str], limit: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--batch_size", "8", "--limit", str(limit)]
    command += ["--model_args", f"pretrained={folder / 'model'},trust_remote_code={trusted},dtype=float32"]
    command += ["--tasks", ",".join(tasks), "--include_path", str(local), "--output_path", str(folder / "out")]
    environment = dict(os.environ)
    if set(tasks) <= LOCAL_TASKS.keys():
        environment |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RunError(EXIT_INTERNAL, f"--tasks: lm_eval ended with {done.returncode}. Fix: see its message above")
    (file,) = (folder / "out").rglob("results_*.json")
    return json.loads(file.read_text(encoding="utf-8"))["results"]


def write_local_tasks(run_dir: Path, folder: Path, limit: int, overrides: Sequence[str] = ()) -> None:
    """Write the local tasks and their documents, the same for the same run.

    Raises:
        ConfigError: the validation text is too short for a question.
    """
    texts = []
    for text in _held_out_texts(run_dir, overrides):
        texts.append(text)
        if len(texts) == 4 * limit:
            break
    long = [text for text in texts if len(text) >= _QUERY + _ANSWER]
    if len(long) < 4:
        problem = Problem("--tasks", "the validation text has too few long documents", len(long), "name other tasks")
        raise ConfigError([problem])
    draw = random.Random(_SEED)
    rows = {
        "heldout_bits": [{"text": text} for text in texts[:limit]],
        "heldout_choice": [_question(i, long, draw) for i in range(min(limit, len(long)))],
    }
    for name, documents in rows.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in documents), encoding="utf-8")
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": str(data)}}}
        # JSON is YAML.
        record = task | {"validation_split": "validation"} | LOCAL_TASKS[name]
        (folder / f"{name}.yaml").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


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
