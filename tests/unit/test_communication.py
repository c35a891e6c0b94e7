"""Collectives of a step against arithmetic by hand, and laws that hold for every layout."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

from transmamba.communication import Traffic, memory, traffic, weights_on_rank
from transmamba.config import Config
from transmamba.costs import embedding_parameters, layer_parameters
from transmamba.transpoint import layer_kinds

# b windows of T tokens in a micro-batch, m of these in a step of one replica; rows of the embedding; D model width.
T, b, m, ROWS, D = 64, 2, 3, 256, 32


def parameters_on_rank(config: Config, **where: Any) -> tuple[int, int]:
    """(tensors, numbers in them) of a rank."""
    weights = weights_on_rank(config, **where)
    return len(weights), sum(weight.size for weight in weights)


def config_of(
    *,
    model: dict | None = None,
    parallel: dict | None = None,
    precision: str | None = "fp32",
    stage: int = 0,
    recompute: str = "none",
    dp: int = 1,
    n: int = m,
) -> Config:
    """Two transmamba layers with 8 heads of width 4, a feed-forward network and tied embeddings."""
    sizes = {"n_layers": 2, "d_model": D, "n_heads": 8, "d_ff": 48} | (model or {})
    train = {"steps": 1, "global_batch": b * n * dp, "micro_batch": b, "recompute": recompute}
    sections = {"model": sizes, "data": {"seq_len": T}, "train": train, "parallel": parallel or {}}
    return Config.model_validate(sections | {"precision": precision, "zero": {"stage": stage}})


def entries(config: Config, pipeline_rank: int = 0, layers: Sequence[int] = (0, 1), dp: int = 1) -> dict[str, Traffic]:
    found = traffic(config, n_vocab_rows=ROWS, pipeline_rank=pipeline_rank, layers=layers, dp=dp)
    named = {entry.name: entry for entry in found}
    assert len(named) == len(found), "names are unique"
    return named


# Of every job of several ranks, and of every one with several data-parallel ranks.
STOP = {"request to stop": ("world", "all_reduce", 1, 8)}
ROWS_COUNTED = {
    "weight of the step": ("dp", "all_reduce", 1, 8),
    "tokens past the TransPoints": ("dp", "all_reduce", 1, 3 * 8),
}
NORM = {"gradient norm, tp_pp": ("tp_pp", "all_reduce", 1, 8)}


def brief(named: dict[str, Traffic]) -> dict[str, tuple[str, str, int, int]]:
    return {name: (entry.group, entry.op, entry.calls, entry.bytes) for name, entry in named.items()}


def test_one_process_sends_nothing() -> None:
    for stage in range(4):
        assert entries(config_of(stage=stage)) == {}


def test_tensor_parallelism_by_hand() -> None:
    X = T * b * D * 4
    loss = ("tp", "all_reduce", m, m * T * b * 4)
    assert brief(entries(config_of(parallel={"tp": 2}))) == {
        "mixer entry, backward": ("tp", "all_reduce", 2 * m, 2 * m * X),
        "mixer exit, forward": ("tp", "all_reduce", 2 * m, 2 * m * X),
        "ffn entry, backward": ("tp", "all_reduce", 2 * m, 2 * m * X),
        "ffn exit, forward": ("tp", "all_reduce", 2 * m, 2 * m * X),
        "embedding exit, forward": ("tp", "all_reduce", m, m * X),
        "head entry, backward": ("tp", "all_reduce", m, m * X),
        "loss, maximum": loss,
        "loss, target logit": loss,
        "loss, sum of exponentials": loss,
        **NORM,
        **STOP,
    }


def test_sequence_parallelism_in_bf16_by_hand() -> None:
    X = T * b * D * 2
    loss = ("tp", "all_reduce", m, m * T * b * 4)
    pairs = {}
    for name, calls in (("mixer", 2 * m), ("ffn", 2 * m)):
        pairs |= {
            f"{name} entry, forward": ("tp", "all_gather", calls, calls * X),
            f"{name} entry, backward": ("tp", "reduce_scatter", calls, calls * X),
            f"{name} exit, forward": ("tp", "reduce_scatter", calls, calls * X),
            f"{name} exit, backward": ("tp", "all_gather", calls, calls * X),
        }
    assert brief(entries(config_of(parallel={"tp": 4, "sp": True}, precision="bf16", stage=1))) == pairs | {
        "embedding exit, forward": ("tp", "reduce_scatter", m, m * X),
        "embedding exit, backward": ("tp", "all_gather", m, m * X),
        "head entry, forward": ("tp", "all_gather", m, m * X),
        "head entry, backward": ("tp", "reduce_scatter", m, m * X),
        "loss, maximum": ("tp", "all_reduce", m, m * T * b * 2),
        "loss, target logit": loss,
        "loss, sum of exponentials": loss,
        "mixer norm gradients": ("tp", "all_reduce", 2 * m, 2 * m * D * 2),
        "ffn norm gradients": ("tp", "all_reduce", 2 * m, 2 * m * D * 2),
        "final norm gradients": ("tp", "all_reduce", m, m * D * 2),
        "gradient norm, tp_pp": ("tp_pp", "all_reduce", 1, 4),
        **STOP,
    }


def test_layers_without_a_feed_forward_network_send_its_share_less() -> None:
    names = set(entries(config_of(model={"d_ff": 0}, parallel={"tp": 2, "sp": True})))
    assert names == {name for name in entries(config_of(parallel={"tp": 2, "sp": True})) if not name.startswith("ffn")}


MAMBA2 = {"kind": "mamba2", "ssm_expand": 2, "ssm_head_dim": 8, "ssm_state": 16, "ssm_groups": 4}


@pytest.mark.parametrize(
    ("model", "parallel", "c_in", "c_out"),
    [
        ({}, {"cp": 2}, 8 * (3 * 4 + 1), 8 * 4),
        ({}, {"cp": 2, "tp": 2}, 4 * (3 * 4 + 1), 4 * 4),
        ({"head_dim": 6}, {"cp": 4}, 8 * (3 * 6 + 1), 8 * 6),
        ({"kind": "transformer"}, {"cp": 2, "tp": 2}, 4 * 3 * 4, 4 * 4),
        # I = 64 of 8 heads; four groups divide over two ranks, two have to be copied twice for four.
        (MAMBA2, {"cp": 2}, 64 + 2 * 4 * 16 + 8, 64),
        (MAMBA2, {"cp": 4, "tp": 2}, (64 + 2 * 4 * 2 * 16 + 8) // 2, 32),
        (MAMBA2 | {"ssm_groups": 1}, {"cp": 4}, 64 + 2 * 4 * 16 + 8, 64),
        # gcd(6, 4) = 2 shared ways, so two copies.
        (MAMBA2 | {"ssm_groups": 6}, {"cp": 4}, 64 + 2 * 6 * 2 * 16 + 8, 64),
    ],
)
def test_context_parallelism_by_hand(model: dict, parallel: dict, c_in: int, c_out: int) -> None:
    config = config_of(model=model, parallel=parallel, precision="bf16", stage=1)
    found = {name: value for name, value in brief(entries(config)).items() if value[0] == "cp"}
    size, kind = T // parallel["cp"] * b * 2, config.model.kind
    assert found == {
        f"{kind} tokens to heads, forward": ("cp", "all_to_all", 2 * m, 2 * m * size * c_in),
        f"{kind} tokens to heads, backward": ("cp", "all_to_all", 2 * m, 2 * m * size * c_in),
        f"{kind} heads to tokens, forward": ("cp", "all_to_all", 2 * m, 2 * m * size * c_out),
        f"{kind} heads to tokens, backward": ("cp", "all_to_all", 2 * m, 2 * m * size * c_out),
    }


def test_hybrid_layers_are_counted_by_their_kind() -> None:
    config = config_of(model=MAMBA2 | {"kind": "hybrid", "pattern": "MMA", "n_layers": 6}, parallel={"cp": 2})
    found = entries(config, layers=(1, 2, 3, 4))
    assert found["mamba2 tokens to heads, forward"].calls == 3 * m
    assert found["transformer tokens to heads, forward"].calls == 1 * m


@pytest.mark.parametrize("sp", [False, True])
@pytest.mark.parametrize(("pp", "vpp"), [(2, 1), (2, 2), (4, 1), (4, 3)])
def test_pipeline_sends_cross_every_chunk_boundary_once_each_way(pp: int, vpp: int, sp: bool) -> None:
    parallel = {"pp": pp, "vpp": vpp, "tp": 2, "sp": sp}
    config = config_of(model={"n_layers": pp * vpp}, parallel=parallel)
    size = T * b * D * 4 // (2 if sp else 1)
    total = 0
    for rank in range(pp):
        found = entries(config, rank, range(rank, pp * vpp, pp))
        forward, backward = found.get("activations to the next chunk"), found.get("gradients to the previous chunk")
        expected = (vpp - (rank == pp - 1)) * m, (vpp - (rank == 0)) * m
        assert (forward.calls if forward else 0, backward.calls if backward else 0) == expected
        total += sum(entry.bytes for entry in (forward, backward) if entry)
        assert ("embedding exit, forward" in found) == (rank == 0)
        assert ("head entry, backward" in found) == ("loss, maximum" in found) == (rank == pp - 1)
        assert ("tied embedding gradients" in found) == (rank in (0, pp - 1))
    assert total == 2 * (pp * vpp - 1) * m * size


def test_tied_embeddings_are_summed_in_float32_whatever_the_precision() -> None:
    tied = config_of(parallel={"pp": 2, "tp": 4}, precision="bf16", stage=1)
    found = brief(entries(tied, 1, (1,)))["tied embedding gradients"]
    assert found == ("embedding", "all_reduce", 1, ROWS // 4 * D * 4)
    untied = config_of(model={"tied": False}, parallel={"pp": 2})
    assert "tied embedding gradients" not in entries(untied, 0, (0,))


def test_gradients_of_stage_0_and_the_scalars_by_hand() -> None:
    N, H = 4, 8
    layer = D + 3 * H * N * D + H * N * D + H * D + 3 * H * N * 5 + 3 * H + H * N + D * H * N + D + 3 * D * 48
    tensors = ("norm", "qkv", "z", "dt", "conv.weight", "conv.bias", "A_log", "dt_bias", "D", "mixer_norm", "out",
               "ffn_norm", "gate_up", "down")  # fmt: skip
    numbers = 2 * layer + ROWS * D + D
    assert brief(entries(config_of(dp=2), dp=2)) == {
        "gradients": ("dp_cp", "all_reduce", 2 * len(tensors) + 2, 4 * numbers),
        "loss over the batch": ("dp_cp", "all_reduce", 1, 8),
        **ROWS_COUNTED,
        **STOP,
    }
    # Ranks of one context see the same rows, so they need not agree on the weight of the step.
    scalars = [name for name in entries(config_of(parallel={"cp": 2, "pp": 2})) if "loss" in name or "weight" in name]
    assert scalars == ["loss over the batch", "loss over the stages"]


def zero_terms(config: Config) -> dict[str, tuple[str, str, int, int]]:
    """What four data-parallel ranks send on account of ZeRO."""
    named = brief(entries(config, dp=4))
    return {name: named[name] for name in named if name.startswith(("ZeRO", "gradient norm", "overflow"))}


@pytest.mark.parametrize(("precision", "e"), [("fp32", 4), ("bf16", 2)])
def test_zero_by_hand(precision: str, e: int) -> None:
    _, p = parameters_on_rank(config_of(), n_vocab_rows=ROWS, pipeline_rank=0, layers=(0, 1))
    vectors = D + 2 * (2 * D + 3 * 32 * 5 + 3 * 8 + 32)
    # Decayed and other weights are gathered as two tensors of multiples of 2 x 4 numbers: both are here.
    assert (p - vectors) % 8 == vectors % 8 == 0
    gathered = ("dp_cp", "all_gather", 2, e * p)
    norms = {"gradient norm, dp_cp": ("dp_cp", "all_reduce", 2, 8)}
    overflow = {} if e == 4 else {"overflow, dp_cp": ("dp_cp", "all_reduce", 1, 1)}
    first, second, third = (zero_terms(config_of(precision=precision, stage=stage, dp=4)) for stage in (1, 2, 3))
    assert first == {"ZeRO-1 gradients": ("dp_cp", "all_reduce", 1, e * p), "ZeRO-1 weights": gathered} | (
        norms if e == 4 else {}
    )
    assert second == {"ZeRO-2 gradients": ("dp_cp", "all_reduce", m, m * e * p), "ZeRO-2 weights": gathered} | (
        norms | overflow
    )
    # All tensors are small, and four ranks divide their sizes.
    assert third == {
        "ZeRO-3 gradients": ("dp_cp", "reduce_scatter", m, m * e * p),
        "ZeRO-3 small weights": ("dp_cp", "all_gather", 2 * 14 + 2, e * p),
        "gradient norm, dp_cp": ("dp_cp", "all_reduce", 2, 16),
    }


def test_pieces_and_groups_are_padded() -> None:
    # Three ranks: vectors of 32 numbers become 33, those of 8 become 9; groups become multiples of 6.
    config = config_of(stage=3, dp=3, model={"kind": "transformer", "d_ff": 0, "n_layers": 1})
    sizes = [ROWS * D, D, 3 * D * D, D * D, D]
    padded = sum(-(-size // 3) * 3 for size in sizes)
    assert entries(config, layers=(0,), dp=3)["ZeRO-3 small weights"].bytes == 4 * padded > 4 * sum(sizes)
    config = config_of(stage=1, dp=3, model={"kind": "transformer", "d_ff": 0, "n_layers": 1})
    groups = (ROWS * D + 4 * D * D, 2 * D)
    assert entries(config, layers=(0,), dp=3)["ZeRO-1 weights"].bytes == 4 * sum(-(-n // 6) * 6 for n in groups)


def test_reductions_go_by_buckets_of_half_a_billion_numbers() -> None:
    # Tables of 256 x 1e6 and layers of 4 x 1e12 numbers: each of the large tensors fills a bucket of its own.
    model = {"kind": "transformer", "d_model": 1_000_000, "n_heads": 8, "d_ff": 0, "n_layers": 1}
    named = {stage: entries(config_of(stage=stage, dp=2, model=model), layers=(0,), dp=2) for stage in (1, 2, 3)}
    # 256e6 and 1e6 fit together; then 3e12; then 1e12; then 1e6.
    assert named[1]["ZeRO-1 gradients"].calls == 4
    # Backwards: 1e6, 1e12, 3e12, 1e6 + 256e6.
    assert named[2]["ZeRO-2 gradients"].calls == m * 4
    assert named[3]["ZeRO-3 gradients"].calls == m * 4
    # The embedding; the norm with qkv; the way out; the last norm.
    assert named[3]["ZeRO-3 large weights, forward"].calls == m * 4


@pytest.mark.parametrize(("points", "n_decayed"), [([0], 6), ([64], 4)])
def test_projections_that_only_the_scan_uses_decay_where_tokens_are_scanned(points: list, n_decayed: int) -> None:
    config = config_of().model_copy(deep=True)
    config.transpoint.points = points
    held = weights_on_rank(config, n_vocab_rows=ROWS, pipeline_rank=0, layers=(0,))
    # Embedding aside: qkv, z, dt, out, gate_up, down.
    assert sum(weight.decays for weight in held) == 1 + n_decayed


LAYOUTS = [
    {"tp": tp, "cp": cp, "pp": pp, "sp": sp}
    for tp, cp, pp, sp in itertools.product((1, 2), (1, 2), (1, 2), (False, True))
    if tp > 1 or not sp
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dp", [1, 3])
def test_groups_of_one_rank_are_silent_and_larger_ones_are_not(layout: dict, dp: int) -> None:
    found = entries(config_of(parallel=layout, dp=dp), dp=dp, layers=(0,))
    members = {"dp": dp, "dp_cp": dp * layout["cp"], "embedding": layout["pp"]}
    members |= {group: layout[group] for group in ("tp", "cp", "pp")}
    members |= {"tp_pp": layout["tp"] * layout["pp"], "world": layout["tp"] * layout["pp"] * layout["cp"] * dp}
    assert {entry.group for entry in found.values()} == {group for group, size in members.items() if size > 1}


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_what_micro_batches_send_is_proportional_to_their_number(layout: dict) -> None:
    once, twice = (entries(config_of(parallel=layout, dp=2, n=n), dp=2, layers=(0,)) for n in (m, 2 * m))
    per_step = {"gradients", "tied embedding gradients", "weight of the step"}
    per_step |= {"loss over the batch", "loss over the stages", "tokens past the TransPoints"}
    per_step |= {"request to stop", "gradient norm, tp_pp"}
    for name, entry in once.items():
        factor = 1 if name in per_step else 2
        assert (twice[name].calls, twice[name].bytes) == (factor * entry.calls, factor * entry.bytes)
    assert once.keys() == twice.keys()


def test_sequence_parallelism_trades_every_all_reduce_for_a_scatter_and_a_gather() -> None:
    plain, sharded = (entries(config_of(parallel={"tp": 2, "sp": sp})) for sp in (False, True))
    for name, entry in plain.items():
        if entry.group == "tp" and not name.startswith("loss"):
            scattered = sharded[name]
            other = "backward" if name.endswith("forward") else "forward"
            gathered = sharded[f"{name.split(',')[0]}, {other}"]
            assert (scattered.op, gathered.op) == ("reduce_scatter", "all_gather")
            assert scattered.bytes == gathered.bytes == entry.bytes
    streams = [name for name, entry in sharded.items() if entry.group == "tp" and "norm" not in name]
    assert sum(sharded[name].bytes for name in streams if not name.startswith("loss")) == 2 * sum(
        entry.bytes for name, entry in plain.items() if entry.group == "tp" and not name.startswith("loss")
    )


@pytest.mark.parametrize("sp", [False, True])
def test_full_recomputation_repeats_the_forward_terms_of_the_layers_alone(sp: bool) -> None:
    parallel = {"tp": 2, "cp": 2, "sp": sp}
    kept, again = (entries(config_of(parallel=parallel, recompute=r)) for r in ("none", "full"))
    assert kept.keys() == again.keys()
    for name, entry in kept.items():
        in_layer = name.split()[0] in ("mixer", "ffn", "transmamba")
        # Nothing behind the way out of the feed-forward network is kept, so it is not repeated.
        factor = 2 if in_layer and name.endswith("forward") and name != "ffn exit, forward" else 1
        assert (again[name].calls, again[name].bytes) == (factor * entry.calls, factor * entry.bytes)


@pytest.mark.parametrize("kind", ["transmamba", "transformer", "mamba2", "hybrid"])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_of_one_rank_are_those_of_the_model(kind: str, tied: bool) -> None:
    config = config_of(model=MAMBA2 | {"kind": kind, "tied": tied})
    _, numbers = parameters_on_rank(config, n_vocab_rows=ROWS, pipeline_rank=0, layers=(0, 1))
    layers = sum(layer_parameters(config.model, kind) for kind in layer_kinds(config.model))
    assert numbers == layers + embedding_parameters(config.model, ROWS) + D


@pytest.mark.parametrize("tied", [True, False])
def test_ranks_hold_the_model_once_but_for_norms_and_the_tied_copy(tied: bool) -> None:
    whole, split = (config_of(model={"tied": tied}, parallel=parallel) for parallel in ({}, {"tp": 2, "pp": 2}))
    tensors, numbers = parameters_on_rank(whole, n_vocab_rows=ROWS, pipeline_rank=0, layers=(0, 1))
    ranks = [parameters_on_rank(split, n_vocab_rows=ROWS, pipeline_rank=r, layers=(r,)) for r in (0, 1)]
    assert sum(n for n, _ in ranks) == tensors + tied
    norms = (2 * 2 + 1) * D
    assert 2 * sum(n for _, n in ranks) == numbers + norms + tied * ROWS * D


@pytest.mark.parametrize(
    ("precision", "stage", "n_shards", "weights", "gradients", "masters", "moments"),
    [
        ("fp32", 0, 4, 4000, 4000, 0, 8000),
        ("fp32", 1, 1, 4000, 4000, 4000, 8000),
        ("fp32", 1, 4, 4000, 4000, 1000, 2000),
        ("fp32", 2, 4, 4000, 1000, 1000, 2000),
        ("fp32", 3, 4, 1000, 1000, 1000, 2000),
        ("bf16", 1, 4, 2000, 4000, 1000, 2000),
        ("bf16", 2, 4, 2000, 1000, 1000, 2000),
        ("bf16", 3, 4, 500, 1000, 1000, 2000),
    ],
)
def test_state_of_a_million_parameters(
    precision: str, stage: int, n_shards: int, weights: int, gradients: int, masters: int, moments: int
) -> None:
    # Tensors that ZeRO-3 does not keep whole; a thousand times as many numbers.
    sizes = [200_000, 300_000, 500_000]
    found = memory(config_of(precision=precision, stage=stage), sizes=sizes, n_shards=n_shards)
    weights, gradients, masters, moments = (1000 * size for size in (weights, gradients, masters, moments))
    assert (found.weights, found.gradients, found.masters, found.moments) == (weights, gradients, masters, moments)


def test_small_tensors_stay_whole_in_stage_3() -> None:
    # 1001 does not divide by 3: a shard of 334 beside the whole.
    found = memory(config_of(precision="bf16", stage=3), sizes=[1000, 1], n_shards=3)
    assert (found.weights, found.masters) == (2 * (1001 + 334), 4 * 334)


def test_questions_without_an_answer_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pipeline rank 2 is not one of 0 to 1"):
        entries(config_of(parallel={"pp": 2}), 2, (0,))
    with pytest.raises(ValueError, match=r"dp=4 x train.micro_batch=2 does not divide train.global_batch=6"):
        entries(config_of(), dp=4)
    with pytest.raises(ValueError, match="precision is null"):
        entries(config_of(precision=None, parallel={"tp": 2}))
    with pytest.raises(ValueError, match=r"zero.stage=0 is fp32 only"):
        memory(config_of(precision="bf16"), sizes=[1], n_shards=1)
