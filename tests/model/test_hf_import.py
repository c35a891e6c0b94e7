"""Model folders of transformers become runs that compute the same, bit for bit where they came from here."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Ernie4_5Config,
    LlamaConfig,
    Mamba2Config,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from typer.testing import CliRunner

from tests.model.hf_runs import KINDS, N_TOKENS, SEQ_LEN, make_run, topics
from transmamba import train as entry
from transmamba.checkpoint import StorageError, newest_valid
from transmamba.checkpoints_tools.hf_export import export
from transmamba.checkpoints_tools.hf_import import import_folder, load_folder
from transmamba.commands.convert import add_conversions
from transmamba.compose import load
from transmamba.data_pipeline.prepare import prepare
from transmamba.generate import complete
from transmamba.metrics import read_metrics
from transmamba.transpoint import effective_points
from transmamba.validate import validate

SIZES: dict[str, Any] = {
    "vocab_size": N_TOKENS,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.15,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "bos_token_id": None,
    "eos_token_id": 0,
}
MAMBA2: dict[str, Any] = {
    "vocab_size": N_TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 8,
    "head_dim": 8,
    "state_size": 8,
    "expand": 2,
    "chunk_size": 32,
    "initializer_range": 0.15,
    "eos_token_id": 0,
}


def changed(sizes: dict[str, Any], **values: Any) -> dict[str, Any]:
    return sizes | values


SOURCES: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES),
    "llama, wide heads and tied": LlamaConfig(**changed(SIZES, head_dim=20, tie_word_embeddings=True)),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2, biases": Qwen2Config(**SIZES),
    "ernie4_5, neighbouring pairs": Ernie4_5Config(**SIZES, head_dim=12),
    "mamba2": Mamba2Config(**changed(MAMBA2, state_size=6, n_groups=2)),
    "mamba2, a group per head": Mamba2Config(**MAMBA2, n_groups=8),
}
RUN = [f"data.seq_len={SEQ_LEN}", "train.steps=2", "train.global_batch=4", "train.threads=1", "wandb.mode=disabled"]
app = typer.Typer()
add_conversions(app)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python's own help texts with the tokenizer of `make_run`."""
    root = tmp_path_factory.mktemp("corpus")
    make_run(root / "run", "transmamba")
    (root / "text").mkdir()
    for number, text in enumerate(topics(30)):
        (root / "text" / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    tokenizer = root / "run" / "tokenizer.json"
    prepare([str(root / "text")], root / "tokens", tokenizer=tokenizer, validation_share=0.1, progress=False)
    return root / "tokens"


def save_source(folder: Path, name: str, corpus: Path) -> Path:
    """A model of transformers with random weights, as `save_pretrained` and a tokenizer leave it."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(SOURCES[name])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    shutil.copyfile(corpus / "tokenizer.json", folder / "tokenizer.json")
    return folder


def bring(source: Path, out: Path, corpus: Path, *overrides: str, check_tokens: int = 1000) -> Any:
    return import_folder(source, out, [*RUN, f"data.path={corpus}", *overrides], check_tokens=check_tokens)


@pytest.mark.parametrize(
    ("name", "kind", "point"),
    [
        ("llama", "transmamba", math.inf),
        ("llama", "transformer", math.inf),
        ("llama, wide heads and tied", "transmamba", math.inf),
        ("mistral", "transmamba", math.inf),
        ("qwen2, biases", "transmamba", math.inf),
        ("ernie4_5, neighbouring pairs", "transmamba", math.inf),
        ("mamba2", "mamba2", 0),
        ("mamba2, a group per head", "mamba2", 0),
        ("mamba2, a group per head", "transmamba", 0),
    ],
)
def test_at_its_transpoint_the_import_computes_what_the_source_does(
    name: str, kind: str, point: float, tmp_path: Path, corpus: Path
) -> None:
    source = save_source(tmp_path / "source", name, corpus)
    done = bring(source, tmp_path / "run", corpus, f"model.kind={kind}")
    assert done.is_exact and len(done.comparisons) == (2 if "mamba2" in name else 3)
    for found in done.comparisons:
        assert found.difference <= 2e-5 and found.n_other == 0, found.line()
    config = load(["--config", str(tmp_path / "run" / "config.yaml")])
    assert effective_points(config) == [point, point] and config.model.kind == kind


def test_an_import_that_cannot_be_equal_says_so(tmp_path: Path, corpus: Path) -> None:
    source = save_source(tmp_path / "source", "llama", corpus)
    done = bring(source, tmp_path / "a", corpus, "model.conv_activation=silu", "model.mixer_norm=head")
    assert not done.is_exact and all(found.difference > 0.01 for found in done.comparisons)
    make_run(tmp_path / "origin", "transmamba")
    export(tmp_path / "origin", tmp_path / "own", check_tokens=0)
    done = bring(tmp_path / "own", tmp_path / "c", corpus, "model.rope=none")
    assert not done.is_exact and all(found.difference > 0.01 for found in done.comparisons)
    source = save_source(tmp_path / "groups", "mamba2", corpus)
    with pytest.raises(Exception, match="states as wide as its heads"):
        bring(source, tmp_path / "b", corpus, "model.kind=transmamba")


@pytest.mark.parametrize("kind", list(KINDS))
def test_what_was_exported_comes_back_bit_for_bit(kind: str, tmp_path: Path, corpus: Path) -> None:
    make_run(tmp_path / "run", kind)
    export(tmp_path / "run", tmp_path / "hf", check_tokens=0)
    as_it_was = [text for text in KINDS[kind] if text.startswith("model.kind=") and "hybrid" not in text]
    done = bring(tmp_path / "hf", tmp_path / "again", corpus, *as_it_was, check_tokens=300)
    assert done.is_exact and all(found.difference <= 2e-5 for found in done.comparisons)
    before, _ = newest_valid(tmp_path / "run" / "checkpoints")
    after, _ = newest_valid(tmp_path / "again" / "checkpoints")
    assert before is not None and after is not None and after.step == 0
    names = {key for key in before.tensors if key[1] in ("master", "weight") and not key[0].endswith(".offset")}
    assert names == {key for key in after.tensors if key[1] in ("master", "weight") and not key[0].endswith(".offset")}
    for name, weights in sorted(names):
        old, new = before.shaped(name, weights), after.shaped(name, weights)
        n_rows = N_TOKENS if name in ("embedding.weight", "head.weight") else len(old)  # no token has the other rows
        assert torch.equal(old[:n_rows], new[:n_rows]), name
    old, new = (load(["--config", str(tmp_path / folder / "config.yaml")]) for folder in ("run", "again"))
    assert effective_points(old) == effective_points(new)


def test_training_goes_on_from_an_import(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, losses = save_source(tmp_path / "source", "llama", corpus), {}
    for kind in ("transmamba", "transformer"):
        run = tmp_path / kind
        bring(source, run, corpus, f"model.kind={kind}", "sample.prompt=''", check_tokens=0)
        assert entry.main(["--config", str(run / "config.yaml")]) == 0
        assert "continues step-00000000" in capsys.readouterr().out
        losses[kind] = [record["loss"] for record in read_metrics(run)]
    # Both readings of the same weights start at the source's loss, far above that of new weights.
    assert abs(losses["transmamba"][0] - losses["transformer"][0]) < 1e-5
    assert losses["transmamba"][0] > math.log(N_TOKENS) + 0.3
    assert losses["transmamba"][1] < losses["transmamba"][0]


def test_an_imported_folder_generates_without_a_run(tmp_path: Path, corpus: Path) -> None:
    make_run(tmp_path / "run", "transmamba")
    export(tmp_path / "run", tmp_path / "hf", check_tokens=0)
    model, tokenizer, config, eod_id = load_folder(tmp_path / "hf")
    points = effective_points(config)
    text = "".join(complete(model, tokenizer, "The yield", points, n_tokens=80, eod_id=eod_id))
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    ids = torch.tensor([tokenizer.encode("The yield").ids])
    done = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=80, do_sample=False)
    assert tokenizer.decode(done[0].tolist()).startswith("The yield" + text)


def edit_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def edit_weights(folder: Path, **change: Any) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, value in change.items():
        tensors[f"model.layers.0.{name.replace('__', '.')}"] = value
    save_file(tensors, file, metadata={"format": "pt"})


def to_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def outside(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


FAULTS: dict[str, tuple[Any, list[str], str]] = {
    "type": (lambda f: edit_config(f, model_type="gpt2"), [], "model type"),
    "rope": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
        [],
        "rope_type",
    ),
    "activation": (lambda f: edit_config(f, hidden_act="gelu"), [], "hidden_act"),
    "no config": (lambda f: (f / "config.json").unlink(), [], "config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), [], "config.json"),
    "wrong sizes": (lambda f: edit_config(f, intermediate_size=96), [], "shape"),
    "missing weight": (lambda f: edit_config(f, num_hidden_layers=3), [], "missing"),
    "pickle only": (to_pickle, [], "safetensors"),
    "index leads outside": (outside, [], "outside"),
    "cut file": (cut, [], "safetensors"),
    "norm of queries": (lambda f: edit_weights(f, self_attn__q_norm__weight=torch.ones(12)), [], "no place"),
    "override of a size": (lambda f: None, ["model.d_model=64"], "model.d_model"),
    "override of the kind": (lambda f: None, ["model.kind=mamba2"], "model.kind"),
    "unknown override": (lambda f: None, ["model.width=64"], "model.width"),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_bad_input_is_one_line_and_creates_nothing(fault: str, tmp_path: Path, corpus: Path) -> None:
    source = save_source(tmp_path / "source", "llama", corpus)
    spoil, overrides, says = FAULTS[fault]
    spoil(source)
    before = sorted(tmp_path.rglob("*"))
    arguments = [str(source), "--out", str(tmp_path / "run"), *RUN, f"data.path={corpus}", *overrides]
    done = CliRunner().invoke(app, ["from-hf", *arguments])
    assert done.exit_code == 2 and says in done.output, done.output
    lines = [line for line in done.output.splitlines() if line.strip()]
    assert len(lines) == 1 and "Fix: " in lines[0], done.output
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_that_has_not_begun_takes_another_length(tmp_path: Path, corpus: Path) -> None:
    bring(save_source(tmp_path / "source", "llama", corpus), tmp_path / "run", corpus, check_tokens=0)
    stored, found = ["--config", str(tmp_path / "run" / "config.yaml")], {}
    for steps in (1, 2, 90):
        config = load([*stored, f"train.steps={steps}"])
        validate(config, {})
        found[steps] = config.optim.warmup, config.checkpoint.every
    assert found == {1: (0, 1), 2: (0, 2), 90: (9, 90)}


def test_data_of_another_tokenizer_is_refused(tmp_path: Path, corpus: Path) -> None:
    source = save_source(tmp_path / "source", "llama", corpus)
    text = (source / "tokenizer.json").read_text()
    (source / "tokenizer.json").write_text(text.replace('"the":', '"eht":').replace('"he":', '"hx":'))
    done = CliRunner().invoke(
        app, ["from-hf", str(source), "--out", str(tmp_path / "run"), *RUN, f"data.path={corpus}"]
    )
    assert done.exit_code == 2 and "tokenizer" in done.output, done.output


def test_a_qwen3_has_norms_that_no_layer_of_ours_has(tmp_path: Path, corpus: Path) -> None:
    model = AutoModelForCausalLM.from_config(Qwen3Config(**SIZES, head_dim=12))
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(Exception, match="model type"):
        bring(tmp_path / "source", tmp_path / "run", corpus)


def test_no_code_of_a_folder_runs(tmp_path: Path, corpus: Path) -> None:
    make_run(tmp_path / "run", "transmamba")
    export(tmp_path / "run", tmp_path / "hf", check_tokens=0)
    mark = tmp_path / "ran"
    for file in (tmp_path / "hf").glob("*.py"):
        file.write_text(f"open({str(mark)!r}, 'w')\n" + file.read_text())
    bring(tmp_path / "hf", tmp_path / "again", corpus, check_tokens=300)
    assert not mark.exists()


def test_a_full_disk_leaves_nothing(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_source(tmp_path / "source", "llama", corpus)

    def full(*rest: Any) -> None:
        raise StorageError("checkpoints: No space left on device")

    monkeypatch.setattr("transmamba.checkpoint.save", full)
    arguments = [str(source), "--out", str(tmp_path / "run"), "--check-tokens", "0", *RUN, f"data.path={corpus}"]
    done = CliRunner().invoke(app, ["from-hf", *arguments])
    assert done.exit_code == 40 and "No space left" in done.output, done.output
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
