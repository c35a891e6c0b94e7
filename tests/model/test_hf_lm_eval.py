"""The evaluation harness on an exported folder, offline, against the training model's own numbers."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.hf_runs import SEQ_LEN, make_run, topics
from tests.unit.data.corpora import write_corpus
from transmamba.checkpoints_tools.hf_export import export
from transmamba.compose import load
from transmamba.data_pipeline.tokenizer import encode_documents, load_tokenizer
from transmamba.kernels.documents import Documents
from transmamba.model.model import Model
from transmamba.scoring import evaluate
from transmamba.transpoint import effective_points

TASKS = {
    "bits": """task: bits
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder}/pages.jsonl}}}}
output_type: loglikelihood_rolling
validation_split: validation
doc_to_text: ""
doc_to_target: "{{{{page}}}}"
metric_list: [{{metric: bits_per_byte}}, {{metric: word_perplexity}}]
""",
    "choice": """task: choice
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder}/choices.jsonl}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: query
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc}}]
""",
    "complete": """task: complete
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder}/choices.jsonl}}}}
output_type: generate_until
validation_split: validation
doc_to_text: query
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["zzz"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
""",
}


@pytest.mark.long
@pytest.mark.parametrize("kind", ["transmamba", "mamba2_stock"])
def test_lm_eval_runs_offline_and_agrees_with_the_training_model(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    run, folder, tasks = tmp_path / "run", tmp_path / "hf", tmp_path / "tasks"
    model = make_run(run, kind)
    export(run, folder, check_tokens=0)
    tasks.mkdir()
    pages = [text[:110] for text in topics(4)]  # shorter than a window
    rows = [{"query": page[:60], "choices": [page[60:80], page[100:110]], "gold": 0} for page in pages]
    (tasks / "pages.jsonl").write_text("".join(json.dumps({"page": page}) + "\n" for page in pages))
    (tasks / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (tasks / f"{name}.yaml").write_text(text.format(folder=tasks))
    results = []
    for batch in ("1", "4"):
        results.append(run_harness(tmp_path / f"out{batch}", folder, tasks, ",".join(TASKS), batch))
    assert results[0]["choice"]["acc,none"] == results[1]["choice"]["acc,none"]
    for result in results:
        assert result["bits"]["bits_per_byte,none"] == pytest.approx(bits_per_byte(model, run, pages), rel=1e-5)


def bits_per_byte(model: Model, run: Path, pages: list[str]) -> float:
    """Of the training model, every page being read after the end of another document."""
    tokenizer, total = load_tokenizer(run / "tokenizer.json"), 0.0
    points = effective_points(load(["--config", str(run / "config.yaml")]), 3)
    for page in pages:
        ids = torch.tensor([[0, *tokenizer.encode(page).ids]])
        with torch.no_grad():
            logits = model.predict(ids[:, :-1], points, Documents.whole(1, ids.shape[1] - 1))[:, 0]
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    return total / math.log(2) / sum(len(page.encode()) for page in pages)


@pytest.mark.long
def test_the_harness_finds_the_bits_of_evaluate_in_the_same_windows(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval is not installed")
    run, folder, tasks, n_tokens = tmp_path / "run", tmp_path / "hf", tmp_path / "tasks", 5 * SEQ_LEN
    make_run(run, "transmamba", 3, f"data.path={tmp_path / 'data'}")
    export(run, folder, check_tokens=0)
    tokenizer = load_tokenizer(run / "tokenizer.json")
    (document,) = encode_documents(tokenizer, [topics(1)[0]], eod_id=0)
    sizes = {"shard_tokens": 6000, "block_tokens": 200}
    write_corpus(tmp_path / "data", [document], dtype="<u2", tokenizer=tokenizer, held_out=[document], **sizes)
    # The harness predicts every token of a text after a prefix token, `evaluate` all but the first of the document.
    first, ids = int(document[0]), document[1 : n_tokens + 1].tolist()
    page = tokenizer.decode(ids)
    assert tokenizer.encode(page).ids == ids
    tasks.mkdir()
    (tasks / "pages.jsonl").write_text(json.dumps({"page": page}) + "\n")
    (tasks / "bits.yaml").write_text(TASKS["bits"].format(folder=tasks))
    found = run_harness(tmp_path / "out", folder, tasks, "bits", "4", f",prefix_token_id={first}")["bits"]
    (score,) = evaluate(run, out=tmp_path / "scored", max_tokens=n_tokens, seq_len=None, progress=False)
    assert score.n_tokens == n_tokens
    assert found["bits_per_byte,none"] == pytest.approx(score.bits_per_byte, rel=1e-5)
    n_words = len(re.split(r"\s+", page))
    assert math.log(found["word_perplexity,none"]) == pytest.approx(score.loss * n_tokens / n_words, rel=1e-5)


def run_harness(out: Path, model: Path, tasks: Path, names: str, batch: str, more: str = "") -> dict[str, Any]:
    """Results by task, without a network."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tasks / "home")}
    # A harness that lies beside the environment is found again.
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", batch]
    command += ["--model_args", f"pretrained={model},trust_remote_code=True,dtype=float32{more}"]
    command += ["--tasks", names, "--include_path", str(tasks), "--output_path", str(out)]
    done = subprocess.run(command, cwd=tasks, env=environment | offline, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = out.rglob("results_*.json")
    return json.loads(file.read_text())["results"]
