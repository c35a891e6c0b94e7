"""The model: its parameters are the plan's, its start is its seed's, its loss is what the words say."""

import math
from pathlib import Path

import pytest
import torch

from transmamba.compose import load
from transmamba.config import ModelConfig
from transmamba.kernels.documents import Documents
from transmamba.model.init import initial
from transmamba.model.model import Model
from transmamba.plan import make_plan
from transmamba.run import build_model
from transmamba.transpoint import layer_kinds

PRESETS = sorted(path.stem for path in Path("configs/model").glob("*.yaml"))
CPU_SIZED = [name for name in PRESETS if name.startswith(("tiny", "small"))]


@pytest.mark.parametrize("preset", CPU_SIZED)
def test_plan_counts_the_parameters_of_the_built_model(preset: str) -> None:
    config = load([f"model={preset}"])
    plan = make_plan(config)
    model = build_model(config, plan.vocab_rows)
    assert sum(parameter.numel() for parameter in model.parameters()) == plan.parameters
    for layer, planned in zip(model.layers.values(), plan.layers, strict=True):
        assert sum(parameter.numel() for parameter in layer.parameters()) == planned.parameters


@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in CPU_SIZED])
def test_plan_counts_the_parameters_of_the_papers_sizes(preset: str) -> None:
    config = load([f"model={preset}"])
    plan = make_plan(config)
    with torch.device("meta"):
        kinds = layer_kinds(config.model)
        model = Model(config.model, kinds, n_tokens_known=plan.vocab_rows, n_rows=plan.vocab_rows, seed=None)
    assert sum(parameter.numel() for parameter in model.parameters()) == plan.parameters


@pytest.mark.parametrize("size", ["tiny", "small", "400m", "1_5b"])
@pytest.mark.parametrize("kind", ["transformer", "mamba2", "hybrid"])
def test_baselines_have_the_parameters_of_transmamba(size: str, kind: str) -> None:
    ours, theirs = (make_plan(load([f"model={name}"])).parameters for name in (size, f"{size}_{kind}"))
    assert abs(theirs - ours) / ours < 0.01


def small(**options: object) -> Model:
    config = ModelConfig.model_validate({"n_layers": 2, "d_model": 16, "n_heads": 2, "d_ff": 16, **options})
    return Model(config, layer_kinds(config), n_tokens_known=100, n_rows=128, seed=1)


def test_weights_are_functions_of_name_shape_and_seed() -> None:
    first, again = small(), small()
    config = ModelConfig(n_layers=2, d_model=16, n_heads=2, d_ff=16)
    for (name, ours), theirs in zip(first.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
        if name != "head.weight":
            assert torch.equal(ours, initial(name, ours.shape, config, 1)), name
    weights = [first.get_parameter(f"layers.{layer}.mixer.qkv.weight") for layer in (0, 1)]
    assert not torch.equal(*weights)


def test_initial_decays_and_time_steps_are_mamba2s() -> None:
    config = ModelConfig(d_model=512, n_heads=256, head_dim=2)
    rates = initial("layers.0.mixer.A_log.start", torch.Size([256]), config, 1).exp()
    steps = torch.nn.functional.softplus(initial("layers.0.mixer.dt_bias.start", torch.Size([256]), config, 1))
    assert 1 <= rates.min() < 2 and 15 < rates.max() <= 16
    assert 1e-3 * 0.999 <= steps.min() < 2e-3 and 5e-2 < steps.max() <= 1e-1 * 1.001


def loss_of(model: Model, weight: torch.Tensor, z_loss: float = 0.0) -> tuple[float, float]:
    ids = torch.randint(0, 100, (2, 21), generator=torch.Generator().manual_seed(4))
    sums = model(ids[:, :-1], ids[:, 1:], weight, [3, math.inf], Documents.whole(2, 20), z_loss=z_loss)
    return sums.loss.item(), sums.nll.item()


def test_loss_is_the_weighted_sum_over_known_tokens() -> None:
    model = small().double()
    ids = torch.randint(0, 100, (2, 21), generator=torch.Generator().manual_seed(4))
    weight = torch.rand(2, 20, dtype=torch.float64)
    with torch.no_grad():
        logits_TBE = model.predict(ids[:, :-1], [3, math.inf], Documents.whole(2, 20))
    assert logits_TBE[..., 100:].eq(-math.inf).all()
    known = logits_TBE[..., :100]
    nll_TB = known.logsumexp(-1) - known.gather(-1, ids[:, 1:].T[..., None])[..., 0]
    expected = (nll_TB * weight.T).sum().item()
    loss, nll = loss_of(model, weight)
    assert loss == pytest.approx(expected, abs=1e-10) and nll == pytest.approx(expected, abs=1e-10)
    penalised, nll = loss_of(model, weight, z_loss=0.1)
    penalty = 0.1 * (known.logsumexp(-1).square() * weight.T).sum().item()
    assert penalised == pytest.approx(expected + penalty, abs=1e-10) and nll == pytest.approx(expected, abs=1e-10)


def test_a_batch_without_weight_has_no_loss_and_no_gradient() -> None:
    model = small()
    ids = torch.randint(0, 100, (2, 21))
    model(ids[:, :-1], ids[:, 1:], torch.zeros(2, 20), [3, 9], Documents.whole(2, 20)).loss.backward()
    assert all(p.grad is not None and p.grad.eq(0).all() for p in model.parameters())


def test_tied_embeddings_are_one_tensor() -> None:
    tied, untied = small(tied=True), small(tied=False)
    assert tied.head.weight is tied.embedding.weight
    assert len(list(untied.parameters())) == len(list(tied.parameters())) + 1


@pytest.mark.parametrize("kind", ["transmamba", "transformer", "mamba2", "hybrid"])
def test_a_token_changes_nothing_before_it_nor_in_other_documents(kind: str) -> None:
    model = small(kind=kind, pattern="MA", ssm_head_dim=8, ssm_state=8)
    documents = Documents.from_starts([[0, 12, 25]], 40)
    ids = torch.randint(0, 100, (1, 40), generator=torch.Generator().manual_seed(4))
    changed = ids.clone()
    changed[0, 15] = (changed[0, 15] + 1) % 100
    points = {"transmamba": [4, math.inf], "hybrid": [0, math.inf]}.get(kind, [0 if kind == "mamba2" else math.inf] * 2)
    with torch.no_grad():
        before, after = (model.predict(x, points, documents)[:, 0, :100] for x in (ids, changed))
    same = (before == after).all(-1)
    assert same[:15].all() and same[25:].all() and not same[15:25].any()
