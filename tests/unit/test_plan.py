"""Parameters, FLOPs and token shares of a plan against brute force and against numbers worked out by hand."""

import io
import json
import random

import pytest
from rich.console import Console

from transmamba.compose import load
from transmamba.config import Config, padded_vocab
from transmamba.costs import PositionShares, layer_flops, packed_documents, whole_windows
from transmamba.errors import EXIT_CONFIG, EXIT_DONE
from transmamba.plan import make_plan, print_plan
from transmamba.planning.answer import run_plan


def simulated(lengths: list[int], seq_len: int) -> list[float]:
    """Share of tokens at offset p or later: documents end to end, at every phase of the windows in turn."""
    counts = [0] * (seq_len + 1)
    for phase in range(seq_len):
        offset, position = 0, phase
        for length in lengths:
            offset = 0
            for _ in range(length):
                offset = 0 if position % seq_len == 0 else offset
                counts[offset] += 1
                offset, position = offset + 1, position + 1
    total = sum(counts)
    return [sum(counts[p:]) / total for p in range(seq_len + 1)]


@pytest.mark.parametrize("seq_len", [1, 7, 32])
def test_the_histogram_formula_equals_counting_over_packed_documents(seq_len: int) -> None:
    draw = random.Random(seq_len)
    lengths = [draw.choice([1, 2, 5, 17, 32, 33, 100]) for _ in range(30)]
    formula = packed_documents([(length, 1) for length in lengths], seq_len)
    assert list(formula.survival) == pytest.approx(simulated(lengths, seq_len), abs=1e-12)
    offsets = [formula.survival[p] - formula.survival[p + 1] for p in range(seq_len)]
    for point in (0, 1, seq_len // 2, seq_len, seq_len + 5, float("inf")):
        assert formula.past(point) == (pytest.approx(sum(offsets[int(point) :])) if point < seq_len else 0)
        attended = sum((p + 1) * share for p, share in enumerate(offsets) if p < point)
        assert formula.attended(point) == pytest.approx(attended)


def test_a_window_that_is_one_document_is_the_limit_of_long_documents() -> None:
    long = packed_documents([(10**12, 3)], 64)
    assert list(long.survival) == pytest.approx(list(whole_windows(64).survival), abs=1e-9)
    assert whole_windows(64).attended(float("inf")) == pytest.approx(65 / 2)


def test_flops_are_those_worked_out_in_the_paper_note() -> None:
    config = load(["model=400m", "data.seq_len=8192"])
    shares, model = whole_windows(8192), config.model
    width, heads, head, ffn = 1536, 16, 96, 6 * 1536 * 4096
    assert ffn == pytest.approx(37.7e6, rel=0.01)
    attention = 2 * heads * 2 * head * 8193 / 2
    assert attention == pytest.approx(25.2e6, rel=0.01)
    projections = 10 * width**2 + 2 * width * heads + 2 * 4 * 3 * width
    never = layer_flops(model, "transmamba", float("inf"), shares)
    assert never == pytest.approx(ffn + projections + attention)
    scan = 2 * heads * 64 * 2 * head + 4 * heads * head**2
    assert layer_flops(model, "transmamba", 0, shares) == pytest.approx(ffn + projections + scan)
    assert layer_flops(model, "transformer", 0, shares) == ffn + 8 * width**2
    half = layer_flops(model, "transmamba", 4096, shares)
    converter = 2 * heads * head**2 / 2
    assert half == pytest.approx(
        ffn + projections + 2 * heads * 2 * head * 4097 / 2 / 2 + converter + scan / 2, rel=1e-9
    )


def test_parameters_of_the_tiny_model_by_hand() -> None:
    plan = make_plan(load(["model.vocab_size=1000"]))
    layer = 128 + 5 * 128 * 128 + 8 * 128 + 3 * 128 * 5 + 3 * 8 + 128 + 128 + 3 * 352 * 128
    assert [entry.parameters for entry in plan.layers] == [layer] * 8
    assert plan.vocab_rows == 1024
    assert plan.parameters == 8 * layer + 1024 * 128 + 128
    untied = make_plan(load(["model.vocab_size=1000", "model.tied=false"]))
    assert untied.parameters - plan.parameters == 1024 * 128


def test_training_counts_three_times_the_forward_pass_and_the_logits() -> None:
    plan = make_plan(load([]))
    layers = sum(layer.forward_flops_per_token for layer in plan.layers)
    assert plan.forward_flops_per_token == pytest.approx(layers + 2 * 128 * plan.vocab_rows)
    assert plan.training_flops_per_token == 3 * plan.forward_flops_per_token
    assert (plan.steps, plan.tokens) == (90, 90 * 8 * 256)


class FakeCorpus:
    vocab_size = 500

    def lengths(self, config: Config) -> list[tuple[float, float]]:
        return [(10.0, 100.0)]


def test_document_lengths_count_only_when_documents_are_masked() -> None:
    corpus = FakeCorpus()
    masked = make_plan(load([]), corpus)  # pyright: ignore[reportArgumentType]
    unmasked = make_plan(load(["data.document_mask=false"]), corpus)  # pyright: ignore[reportArgumentType]
    assert masked.vocab_rows == 512
    assert [round(layer.share_past, 3) for layer in masked.layers][:3] == [
        1.0,
        round(0.6 * (1 - 4 / 256), 3),
        0.194,
    ]
    assert unmasked.layers == make_plan(load([])).layers
    assert masked.layers[7].forward_flops_per_token < unmasked.layers[7].forward_flops_per_token
    assert len(masked.warnings) == 4
    assert "layer 3 scans from token 16" in masked.warnings[0]
    assert unmasked.warnings == ()


@pytest.mark.parametrize("model", ["tiny", "tiny_hybrid", "tiny_transformer", "tiny_mamba2_stock"])
def test_a_plan_is_json(model: str) -> None:
    plan = make_plan(load([f"model={model}"]))
    record = json.loads(json.dumps(plan.as_dict()))
    assert len(record["layers"]) == len(plan.layers)
    assert record["training_flops_per_token"] == plan.training_flops_per_token
    assert [layer["point"] for layer in record["layers"]] == [layer.point for layer in plan.layers]


@pytest.mark.parametrize("width", [60, 80, 160])
def test_the_diagram_has_a_readable_row_per_layer_without_colour(width: int) -> None:
    text = io.StringIO()
    print_plan(make_plan(load([])), Console(file=text, width=width, color_system=None))
    lines = text.getvalue().splitlines()
    rows = [line for line in lines if " transmamba " in line]
    assert len(rows) == 8
    assert all("…" not in row for row in rows) or width < 80
    n_attention = [row.count("█") for row in rows]
    assert n_attention == sorted(n_attention)
    assert n_attention[0] == 0
    assert n_attention[1] >= 1
    assert rows[7].count("·") == 0
    assert all(len(line) <= width for line in lines)


def test_the_command_prints_a_plan_or_the_problems(
    capsys: pytest.CaptureFixture[str], tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_plan(["model=small"], as_json=True) == EXIT_DONE
    assert json.loads(capsys.readouterr().out)["seq_len"] == 256
    assert run_plan(["model=small"], as_json=False) == EXIT_DONE
    assert "attention" in capsys.readouterr().out
    assert run_plan(["model=smal"], as_json=False) == EXIT_CONFIG
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("transmamba: error: model: no such choice (got smal). Fix: choose small")
    assert not list(tmp_path.iterdir())


def test_shares_start_at_one_and_end_at_zero() -> None:
    shares: PositionShares = packed_documents([(5, 2), (300, 1)], 256)
    assert (shares.past(0), shares.past(256)) == (1.0, 0.0)


@pytest.mark.parametrize(("n", "padded"), [(1, 128), (128, 128), (129, 256), (4096, 4096), (50257, 50304)])
def test_the_vocabulary_is_padded_to_128(n: int, padded: int) -> None:
    assert padded_vocab(n) == padded


def test_a_plan_of_several_ranks_says_what_they_hold_and_send(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = ["model=tiny", "parallel.tp=2", "parallel.pp=2", "train.micro_batch=1", "precision=fp32"]
    assert run_plan(layout, as_json=True) == EXIT_DONE
    plan = json.loads(capsys.readouterr().out)
    parallel = plan["parallel"]
    assert (parallel["world_size"], parallel["dp"]) == (4, 1)
    assert parallel["bubble"] == 1 / 8
    assert [layer for stage in parallel["stages"] for layer in stage["layers"]] == list(range(8))
    assert sum(stage["cost_share"] for stage in parallel["stages"]) == pytest.approx(1)
    first, last = parallel["stages"]
    # Eight micro-batches of 256 tokens of 128 float32 numbers, once each way.
    assert {"tp", "pp", "embedding"} <= first["sent"].keys()
    assert first["sent"]["pp"] == last["sent"]["pp"] == 8 * 256 * 128 * 4 + 8
    assert first["memory"]["moments"] == 2 * first["memory"]["weights"] == 2 * first["memory"]["gradients"]
    assert run_plan(layout, as_json=False) == EXIT_DONE
    text = capsys.readouterr().out
    assert "4 ranks, 1 data parallel, fp32, bubble 12.5%" in text
    for name, value in {"WORLD_SIZE": "8", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert run_plan([*layout, "zero.stage=1"], as_json=True) == EXIT_DONE
    replicated = json.loads(capsys.readouterr().out)["parallel"]
    assert (replicated["world_size"], replicated["dp"], replicated["bubble"]) == (8, 2, 1 / 4)
    assert replicated["stages"][0]["memory"]["moments"] == first["memory"]["moments"] // 2


def test_a_single_rank_has_no_parallel_plan() -> None:
    assert make_plan(load([])).parallel is None
