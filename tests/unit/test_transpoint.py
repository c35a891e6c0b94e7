"""TransPoint schedules against the paper's lists, their scaling, tiling and change during training."""

import math
import re

import pytest

from transmamba.compose import load
from transmamba.config import Config, ModelConfig, TranspointChange, TranspointConfig
from transmamba.plan import make_plan
from transmamba.transpoint import effective_points, layer_kinds, points

INF = math.inf
# Table 6 of the paper, at 8192 tokens.
PAPER = {
    "v1": [2048],
    "v2": [4096],
    "v3": [6144],
    "v4": [3072, 4096, 5120],
    "v5": [2048, 3072, 4096],
    "v6": [512, 1024, 2048],
    "v7": [2048, 4096, 6144],
    "v8": [0, 1024, 2048, 6144, 8192],
    "v9": [0, 128, 256, 512, 1024, 2048, 4096, 8192],
}


def scheduled(name: str, n_layers: int = 8, seq_len: int = 8192, **settings: int) -> list[int | float]:
    return points(TranspointConfig.model_validate({"schedule": name, **settings}), n_layers, seq_len)


@pytest.mark.parametrize("name", PAPER)
def test_paper_schedules_are_the_paper_s_lists_with_infinity_for_the_whole_sequence(name: str) -> None:
    paper = [INF if point == 8192 else point for point in PAPER[name]]
    assert scheduled(name, len(paper)) == paper
    halved = [INF if point == 8192 else point / 2 for point in PAPER[name]]
    assert scheduled(name, len(paper), 4096) == halved


@pytest.mark.parametrize(
    ("argv", "lost"),
    [
        ("model.n_layers=4", "cycle has 8 TransPoints, and 4 layers never get 32, 64, 128, inf; use model.n_layers=8"),
        ("model.n_layers=7 transpoint=layer_hybrid", "inf: they all scan from token 0, as in mamba_only; use"),
        ("model.n_layers=7 transpoint=layer_hybrid", "or transpoint.attention_every=7"),
        ("model.n_layers=2 transpoint=v6", "never get 64;"),
        ("model.n_layers=3 transpoint=uniform transpoint.period=4", "never get inf; use model.n_layers=4 or more, or "
         "transpoint.period=3"),
        ("model.n_layers=4 transpoint=v1 transpoint.changes=[{step:9,schedule:v9}]", "v9 has 8"),
    ],
)  # fmt: skip
def test_values_of_a_schedule_that_no_layer_gets_are_told(argv: str, lost: str) -> None:
    (warning,) = make_plan(load(argv.split())).warnings
    assert lost in warning


@pytest.mark.parametrize(
    "argv",
    [
        *("model.n_layers=8", "model.n_layers=9 transpoint=layer_hybrid", "model.n_layers=2 transpoint=mamba_only"),
        *(
            "model.n_layers=4 transpoint.points=[0,1]",
            "model.n_layers=3 transpoint=random",
            "model.n_layers=1 transpoint=v1",
        ),
        *("model=tiny_hybrid", "model=tiny_transformer model.n_layers=4"),
    ],
)
def test_schedules_that_layers_have_whole_need_no_warning(argv: str) -> None:
    assert make_plan(load(argv.split())).warnings == ()


def test_mean_transpoints_and_attended_pairs_are_those_of_the_paper() -> None:
    def mean(name: str, power: int) -> float:
        values = [min(point, 8192) / 8192 for point in scheduled(name, len(PAPER[name]))]
        return sum(value**power for value in values) / len(values)

    assert [round(100 * mean(name, 1), 1) for name in PAPER] == [25, 50, 75, 50, 37.5, 14.6, 50, 42.5, 24.8]
    pairs = [6.2, 25.0, 56.2, 26.0, 15.1, 2.7, 29.2, 32.8, 16.7]
    assert [100 * mean(name, 2) for name in PAPER] == pytest.approx(pairs, abs=0.06)


def test_the_paper_s_example_of_tiling() -> None:
    assert scheduled("v4", 6) == [3072, 4096, 5120, 3072, 4096, 5120]


def test_cycle_is_v9_scaled_to_the_sequence() -> None:
    assert scheduled("cycle", 8, 256) == [0, 4, 8, 16, 32, 64, 128, INF]
    assert scheduled("cycle", 10, 256) == [0, 4, 8, 16, 32, 64, 128, INF, 0, 4]
    assert scheduled("cycle") == scheduled("v9") == scheduled("log")


def test_uniform_and_log_repeat_after_their_period() -> None:
    assert scheduled("uniform", 6, 300, period=4) == [0, 100, 200, INF, 0, 100]
    assert scheduled("log", 6, 256, period=4) == [0, 64, 128, INF, 0, 64]
    assert scheduled("log", 3, 256, period=2) == scheduled("uniform", 3, 256, period=2) == [0, INF, 0]


def test_the_pure_schedules_and_the_layer_hybrid() -> None:
    assert scheduled("attention_only", 3) == [INF] * 3
    assert scheduled("mamba_only", 3) == [0] * 3
    assert scheduled("layer_hybrid", 9, attention_every=4) == [0, 0, 0, INF, 0, 0, 0, INF, 0]
    assert scheduled("layer_hybrid", 2, attention_every=1) == [INF, INF]


def test_random_is_log_uniform_and_depends_on_the_seed_alone() -> None:
    drawn = scheduled("random", 20_000, 1000, seed=3)
    assert drawn == scheduled("random", 20_000, 1000, seed=3)
    assert drawn != scheduled("random", 20_000, 1000, seed=4)
    assert min(drawn) == 0
    assert max(point for point in drawn if point < INF) < 1000
    # Equal shares per factor of ten: P(point < p) = log(p + 1) / log(seq_len + 2).
    for p in (1, 10, 100, 1000):
        share = sum(point < p for point in drawn) / len(drawn)
        assert share == pytest.approx(math.log(p + 1) / math.log(1002), abs=0.01)
    assert scheduled("random", 4, 1000, seed=3) == drawn[:4]


def test_explicit_points_are_tokens_fractions_or_infinity_and_overrule_the_schedule() -> None:
    config = TranspointConfig(schedule="v1", points=[0, 0.5, 1.0, INF, 300, 1])
    assert points(config, 7, 256) == [0, 128, 256, INF, 300, 1, 0]
    with pytest.raises(ValueError, match=r"needs transpoint\.points"):
        points(TranspointConfig(schedule="explicit"), 4, 256)


def test_a_schedule_changes_during_training() -> None:
    changes = [
        TranspointChange(step=20, schedule="mamba_only"),
        TranspointChange(step=10, points=[0.25, INF]),
    ]
    config = TranspointConfig(schedule="attention_only", changes=changes)
    at = {step: points(config, 3, 64, step) for step in (0, 9, 10, 19, 20, 10**9)}
    assert at[0] == at[9] == [INF] * 3
    assert at[10] == at[19] == [16, INF, 16]
    assert at[20] == at[10**9] == [0] * 3


def test_points_are_a_pure_function() -> None:
    config = load(["transpoint=random", "transpoint.changes=[{step:5,schedule:cycle}]"]).transpoint
    before = config.model_dump()
    first = [points(config, 12, 512, step) for step in range(8)]
    assert [points(config, 12, 512, step) for step in reversed(range(8))] == first[::-1]
    assert config.model_dump() == before


@pytest.mark.parametrize("n_layers", [1, 3, 8, 13])
@pytest.mark.parametrize("seq_len", [2, 63, 256, 8192])
@pytest.mark.parametrize("name", [*PAPER, "cycle", "uniform", "log", "attention_only", "mamba_only", "random"])
def test_every_schedule_gives_whole_tokens_or_infinity_for_every_layer(name: str, seq_len: int, n_layers: int) -> None:
    found = scheduled(name, n_layers, seq_len)
    assert len(found) == n_layers
    assert all(point == INF or (isinstance(point, int) and 0 <= point <= seq_len) for point in found)


def test_layer_kinds_follow_the_pattern() -> None:
    assert layer_kinds(ModelConfig(kind="hybrid", n_layers=5, pattern="MMA")) == [
        *("mamba2", "mamba2", "transformer", "mamba2", "mamba2")
    ]
    assert layer_kinds(ModelConfig(kind="transformer", n_layers=2)) == ["transformer"] * 2
    for pattern in ("", "MXA"):
        with pytest.raises(ValueError, match=re.escape(repr(pattern))):
            layer_kinds(ModelConfig.model_construct(kind="hybrid", n_layers=2, pattern=pattern))


def test_transformer_layers_never_scan_and_mamba2_layers_always_do() -> None:
    config = Config(model=ModelConfig(kind="hybrid", n_layers=3, pattern="AM"))
    assert effective_points(config) == [INF, 0, INF]
    config.model.kind = "transmamba"
    assert effective_points(config) == points(config.transpoint, 3, 256)
