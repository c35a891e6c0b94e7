"""An exported folder computes what training does: logits of every form of input, losses, gradients; what is in it."""

import ast
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.model.hf_runs import KINDS, N_TOKENS, SEQ_LEN, STOCK, Exported, ids_of, make_run
from transmamba.checkpoints_tools import hf_export
from transmamba.checkpoints_tools.hf_compare import compare
from transmamba.checkpoints_tools.hf_export import export, load_exported
from transmamba.checkpoints_tools.hf_format import CODE, hf_name
from transmamba.checkpoints_tools.hf_model.configuration_transmamba import TransMambaConfig
from transmamba.compose import load
from transmamba.kernels.documents import Documents
from transmamba.transpoint import effective_points

OWN = [kind for kind in KINDS if kind not in STOCK]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """Made at first use, by kind."""
    return {}


@pytest.fixture(params=list(KINDS))
def exported(
    request: pytest.FixtureRequest, exports: dict[str, Exported], tmp_path_factory: pytest.TempPathFactory
) -> Exported:
    kind = request.param
    if kind not in exports:
        exports[kind] = Exported(tmp_path_factory.mktemp(kind), kind, check_tokens=10_000)
    return exports[kind]


def test_logits_equal_the_training_models_on_10k_tokens_of_every_form(exported: Exported) -> None:
    forms = {found.form: found for found in exported.done.comparisons}
    wanted = {"whole windows", "left padding"} | ({"packed documents"} if exported.kind != "mamba2_stock" else set())
    assert set(forms) == wanted
    for found in forms.values():
        assert found.n_tokens >= 10_000
        assert found.difference <= 2e-5, found.line()
        assert found.n_other == 0 and found.n_ties <= 2, found.line()


def test_the_folder_has_what_loaders_expect(exported: Exported) -> None:
    names = {path.name for path in exported.folder.iterdir()}
    stated = json.loads((exported.folder / "config.json").read_text())
    index = json.loads((exported.folder / "model.safetensors.index.json").read_text())
    shards = {name for name in names if name.endswith(".safetensors")}
    assert stated["architectures"] == [STOCK.get(exported.kind, "TransMambaForCausalLM")]
    assert stated["vocab_size"] == N_TOKENS
    assert len(shards) > 1 and set(index["weight_map"].values()) == shards
    assert all((exported.folder / name).stat().st_size <= 110_000 for name in shards)
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    code = {name for name in names if name.endswith(".py")}
    assert code == (set() if exported.kind in STOCK else set(CODE))
    assert ("auto_map" in stated) == bool(code)
    assert not list(exported.folder.parent.glob(".*"))


def test_the_code_needs_torch_and_transformers_only(exported: Exported) -> None:
    allowed = {*sys.stdlib_module_names, "torch", "transformers"}
    for file in exported.folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, file
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 or str(node.module).split(".")[0] in allowed, file


@pytest.mark.parametrize("exported", [*OWN, "transformer"], indirect=True)
def test_gradients_of_a_labelled_packed_batch_equal_training(exported: Exported) -> None:
    ours, theirs = make_run(exported.folder.parent / "again", exported.kind).double(), exported.theirs().double()
    ids = ids_of(2, SEQ_LEN + 1)
    documents = Documents.from_starts([[0, 11, 90], [0, 50]], SEQ_LEN)
    weight = torch.ones(2, SEQ_LEN, dtype=torch.float64) / (2 * SEQ_LEN)
    sums: Any = ours(ids[:, :-1], ids[:, 1:], weight, exported.points, documents)
    sums.loss.backward()
    done = theirs(ids[:, :-1], position_ids=documents.pos_BT, use_cache=False)
    loss = torch.nn.functional.cross_entropy(done.logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    assert abs((loss - sums.loss).item()) < 1e-6
    if exported.kind == "transformer":
        pairs = [("layers.1.mixer.out.weight", "model.layers.1.self_attn.o_proj.weight")]
    else:
        names = [name for name, _ in ours.named_parameters()]
        pairs = [(name, hf_name(name.removesuffix(".offset"))) for name in names]
    for mine, other in pairs:
        expected, found = ours.get_parameter(mine).grad, theirs.get_parameter(other).grad
        expected = torch.zeros_like(ours.get_parameter(mine)) if expected is None else expected
        found = torch.zeros_like(theirs.get_parameter(other)) if found is None else found
        assert (found - expected[: len(found)]).norm() <= 2e-5 * expected.norm() + 1e-9, mine


def test_labels_give_the_shifted_loss(exports: dict[str, Exported], tmp_path: Path) -> None:
    model, ids = (exports.get("transmamba") or Exported(tmp_path, "transmamba")).theirs(), ids_of(2, 20)
    labels = ids.clone()
    labels[0, :10] = -100
    done = model(ids, labels=labels)
    expected = torch.nn.functional.cross_entropy(done.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(done.loss, expected)


@pytest.mark.parametrize("kind", ["transmamba", "mamba2", "transformer"])
def test_the_comparison_notices_what_is_wrong(kind: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ours = make_run(run, kind)
    export(run, tmp_path / "hf", check_tokens=0)
    points = effective_points(load(["--config", str(run / "config.yaml")]), 3)
    for damage in ("weight", "transpoint", "padding"):
        theirs = load_exported(tmp_path / "hf", "llama" if kind == "transformer" else "transmamba")
        told = list(points)
        if damage == "weight":
            with torch.no_grad():
                name = "self_attn.v_proj.weight" if kind == "transformer" else "mixer.out.weight"
                theirs.get_parameter(f"model.layers.2.{name}").mul_(1.01)
        elif damage == "transpoint" and kind == "transmamba":
            told[1] = 10
        elif damage == "padding":
            whole = theirs.forward
            theirs.forward = lambda ids, attention_mask=None, whole=whole, **more: whole(ids, **more)
        else:
            continue
        found = {c.form: c.is_equal for c in compare(ours, told, theirs, n_tokens=400, seq_len=SEQ_LEN)}
        assert not found["left padding"], damage
        assert found["whole windows"] == (damage == "padding"), damage


def test_bf16_rounds_the_weights_and_nothing_else(exports: dict[str, Exported], tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run, "transmamba")
    done = export(run, tmp_path / "hf", dtype="bf16", check_tokens=1000)
    assert all(found.difference <= 2e-5 for found in done.comparisons)
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    full = {name for name, tensor in stored.items() if tensor.dtype == torch.float32}
    assert {name.rpartition(".")[2] for name in full} == {"A_log", "dt_bias", "D"}
    reader = hf_export.TransMambaForCausalLM.from_pretrained(tmp_path / "hf")
    assert reader.dtype == torch.bfloat16 and reader.get_parameter("model.layers.0.mixer.A_log").dtype == torch.float32
    with torch.no_grad():
        logits = reader(ids_of(1, 90)).logits
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()


def test_a_new_model_of_the_class_starts_as_training_does() -> None:
    config = TransMambaConfig(num_hidden_layers=2, layer_kinds=["transmamba", "mamba2"])
    model = hf_export.TransMambaForCausalLM(config)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all() and parameter.abs().max() < 20, name
        low, high = {"A_log": (0.0, math.log(16)), "dt_bias": (-9.3, -2.1), "D": (1.0, 1.0)}.get(
            name.rpartition(".")[2], (-20.0, 20.0)
        )
        assert low <= parameter.min() and parameter.max() <= high, name
