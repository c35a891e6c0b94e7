"""The learning rate is a function of the step; weight decay spares what it would only wear away."""

import math

import pytest

from transmamba.config import Config
from transmamba.optimizer import decayed_names, learning_rate
from transmamba.run import build_model

LR, LOW = 1e-2, 1e-3


def config_of(**optim: object) -> Config:
    return Config.model_validate(
        {
            "optim": {"lr": LR, "min_lr": LOW, "warmup": 10, **optim},
            "train": {"steps": 110, "global_batch": 2, "micro_batch": 2},
            "data": {"seq_len": 50},
        }
    )


def test_cosine_warms_up_and_ends_at_its_minimum() -> None:
    config = config_of(schedule="cosine")
    rates = [learning_rate(config, step) for step in range(1, 111)]
    assert rates[0] == pytest.approx(LR / 10) and rates[9] == pytest.approx(LR)
    assert rates[59] == pytest.approx((LR + LOW) / 2)  # half way through the decay
    assert rates[-1] == pytest.approx(LOW)
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_wsd_is_flat_and_then_falls_in_a_line() -> None:
    config = config_of(schedule="wsd", decay=20)
    assert {learning_rate(config, step) for step in range(10, 91)} == {LR}
    assert learning_rate(config, 100) == pytest.approx((LR + LOW) / 2)
    assert learning_rate(config, 110) == pytest.approx(LOW)


def test_constant_stays() -> None:
    assert {learning_rate(config_of(schedule="constant"), step) for step in range(10, 111)} == {LR}


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_tokens_and_steps_say_the_same(schedule: str) -> None:
    steps = config_of(schedule=schedule, decay=20)
    tokens = config_of(schedule=schedule, unit="tokens", warmup=10 * 100, decay=20 * 100)
    for step in range(1, 111):
        assert math.isclose(learning_rate(steps, step), learning_rate(tokens, step))


def test_no_warmup_starts_at_the_peak() -> None:
    assert learning_rate(config_of(warmup=0, schedule="constant"), 1) == LR


def names_that_decay(points: list[object], **transpoint: object) -> set[str]:
    config = Config.model_validate(
        {
            "model": {"n_layers": 2, "d_model": 8, "n_heads": 2, "d_ff": 8, "tied": False},
            "transpoint": {"points": points, **transpoint},
            "data": {"seq_len": 50},
            "train": {"steps": 5},
        }
    )
    return decayed_names(dict(build_model(config, 100).named_parameters()), config)


def test_matrices_decay_and_nothing_else() -> None:
    matrices = {"mixer.qkv", "mixer.z", "mixer.dt", "mixer.out", "ffn.gate_up", "ffn.down"}
    expected = {f"layers.{layer}.{name}.weight" for layer in (0, 1) for name in matrices}
    assert names_that_decay([0, 49]) == expected | {"embedding.weight", "head.weight"}


@pytest.mark.parametrize("point", [50, "inf"])
def test_scan_weights_of_a_layer_that_never_scans_do_not_decay(point: object) -> None:
    idle = {"layers.1.mixer.z.weight", "layers.1.mixer.dt.weight"}
    assert names_that_decay([0, 49]) - names_that_decay([0, point]) == idle


def test_a_layer_that_scans_later_in_training_keeps_its_decay() -> None:
    later = {"changes": [{"step": 3, "points": [0, 10]}]}
    assert names_that_decay([0, "inf"], **later) == names_that_decay([0, 10])
