"""The evaluation harness on an exported folder, offline, against the training model's own numbers."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.model.hf_runs import make_run, topics
from transmamba.checkpoints_tools.hf_export import export
from transmamba.compose import load
from transmamba.data_pipeline.tokenizer import load_tokenizer
from transmamba.kernels.documents import Documents
from transmamba.model.model import Model
from transmamba.transpoint import effective_points

TASKS = {
    "bits": """task: bits
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder}/pages.jsonl}}}}
output_type: loglikelihood_rolling
validation_split: validation
doc_to_text: ""
doc_to_target: "{{{{page}}}}"
metric_list: [{{metric: bits_per_byte}}]
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
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    environment = {**offline, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    results = []
    for batch in ("1", "4"):
        out = tmp_path / f"out{batch}"
        command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", batch]
        command += ["--model_args", f"pretrained={folder},trust_remote_code=True,dtype=float32"]
        command += ["--tasks", ",".join(TASKS), "--include_path", str(tasks), "--output_path", str(out)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (file,) = out.rglob("results_*.json")
        results.append(json.loads(file.read_text())["results"])
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
