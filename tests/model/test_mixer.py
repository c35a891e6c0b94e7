"""The mixer is `where(pos < P, attention, full scan)`, values and every gradient, for every P and every packing."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.model.oracle import oracle_rows
from transmamba.config import ModelConfig
from transmamba.kernels.documents import Documents
from transmamba.kernels.rope import rope
from transmamba.model import mixing
from transmamba.model.init import initialise
from transmamba.model.mixer import TransMambaMixer

CHUNK = 64
ATOL = 1e-10


def build(n_heads: int, width: int, **options: object) -> TransMambaMixer:
    config = ModelConfig.model_validate(
        {"d_model": 12, "n_heads": n_heads, "head_dim": width, "d_ff": 0, "dt_max": 1.0, **options}
    )
    mixer = TransMambaMixer(config)
    initialise(mixer, config, seed=3, prefix="layers.0.mixer.")
    mixer = mixer.double()
    with torch.no_grad():
        draw = torch.Generator().manual_seed(5)
        for parameter in mixer.parameters():  # offsets and norms too: nothing may hide behind a 0 or a 1
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    return mixer


def values_and_gradients(mixer: TransMambaMixer, output: Tensor, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    leaves = {"input": x, **dict(mixer.named_parameters())}
    gradients = torch.autograd.grad((output * cotangent).sum(), list(leaves.values()), allow_unused=True)
    zeros = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    found = {name: zeros[name] if g is None else g for name, g in zip(leaves, gradients, strict=True)}
    return {"output": output.detach(), **found}


def compare(mixer: TransMambaMixer, n_tokens: int, starts: list[list[int]], transpoint: float) -> float:
    """Largest error of values and gradients, each relative to the size of what it is compared with."""
    draw = torch.Generator().manual_seed(7)
    shape = (n_tokens, len(starts), 12)
    x = torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_()
    cotangent = torch.randn(shape, generator=draw, dtype=torch.float64)
    documents = Documents.from_starts(starts, n_tokens)
    ours = values_and_gradients(mixer, mixer(x, transpoint, documents), x, cotangent)
    theirs = values_and_gradients(mixer, oracle_rows(mixer, x, transpoint, starts), x, cotangent)
    errors = {name: (ours[name] - theirs[name]).abs().max() / theirs[name].abs().max().clamp(min=1) for name in ours}
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] < ATOL, f"{worst}: {errors[worst]:.2e} at P={transpoint}"
    return float(errors[worst])


POINTS = [0, 1, 3, 4, CHUNK - 1, CHUNK, CHUNK + 1, "T-1", "T", "T+7", math.inf]


@pytest.mark.parametrize("point", POINTS)
def test_mixer_equals_the_oracle_at_every_transpoint(point: float | str) -> None:
    n_tokens = 149  # two chunks and a ragged tail
    transpoint = {"T-1": n_tokens - 1, "T": n_tokens, "T+7": n_tokens + 7}.get(str(point), point)
    compare(build(2, 4), n_tokens, [[0], [0]], float(transpoint))


@pytest.mark.parametrize("point", [0, 1, 4, 17, CHUNK, math.inf])
def test_packed_rows_with_cut_documents_equal_the_oracle(point: float) -> None:
    compare(build(3, 4), 131, [[0, 1, 40, 41, 66, 130], [0, 64, 128], [0]], point)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_mixer_equals_the_oracle_on_random_sizes(data: st.DataObject) -> None:
    n_tokens = data.draw(st.integers(1, 100))
    n_rows = data.draw(st.integers(1, 3))
    inner = st.sets(st.integers(1, n_tokens - 1), max_size=5) if n_tokens > 1 else st.just(set())
    starts = [[0, *sorted(data.draw(inner))] for _ in range(n_rows)]
    mixer = build(
        data.draw(st.integers(1, 4)),
        2 * data.draw(st.integers(1, 4)),
        rope=data.draw(st.sampled_from(["attention", "both", "none"])),
        d_skip=data.draw(st.booleans()),
        mixer_norm=data.draw(st.sampled_from(["head", "none"])),
        conv_width=data.draw(st.integers(1, 5)),
    )
    compare(mixer, n_tokens, starts, data.draw(st.one_of(st.integers(0, n_tokens + 3), st.just(math.inf))))


def test_a_layer_past_every_token_gives_its_scan_weights_zero_gradient() -> None:
    mixer, documents = build(2, 4), Documents.whole(1, 20)
    x = torch.randn(20, 1, 12, dtype=torch.float64)
    mixer(x, 20, documents).sum().backward()
    for name in ("z.weight", "dt.weight", "A_log.offset", "D.offset", "dt_bias.offset"):
        gradient = mixer.get_parameter(name).grad
        assert gradient is not None and not gradient.any(), name


def test_packed_equals_unpacked() -> None:
    mixer = build(2, 4)
    x = torch.randn(90, 1, 12, dtype=torch.float64)
    packed = mixer(x, 9, Documents.from_starts([[0, 33, 40]], 90))
    parts = [mixer(x[a:b], 9, Documents.whole(1, b - a)) for a, b in ((0, 33), (33, 40), (40, 90))]
    torch.testing.assert_close(packed, torch.cat(parts), atol=ATOL, rtol=0)


def _without_dt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter of equation 9 as printed: what is written forgets its time step."""
    scan = mixing.ssd_scan

    def forgetful(**streams: Any) -> tuple[Tensor, Tensor]:
        first = math.ceil(streams["transpoint"])
        x = streams["x_BTHV"] / torch.nn.functional.softplus(streams["dt_BTH"] + streams["dt_bias_H"])[..., None]
        x = torch.cat([x[:, :first], streams["x_BTHV"][:, first:]], dim=1)
        return scan(**{**streams, "x_BTHV": x})

    monkeypatch.setattr(mixing, "ssd_scan", forgetful)


def _with_zero_state(monkeypatch: pytest.MonkeyPatch) -> None:
    scan = mixing.ssd_scan

    def amnesic(**streams: Any) -> tuple[Tensor, Tensor]:
        first = math.ceil(streams["transpoint"])
        kept = torch.cat([torch.zeros_like(streams["x_BTHV"][:, :first]), streams["x_BTHV"][:, first:]], dim=1)
        return scan(**{**streams, "x_BTHV": kept})

    monkeypatch.setattr(mixing, "ssd_scan", amnesic)


def _with_conv_per_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = mixing.causal_conv

    def split_conv(x_BTC: Tensor, weight: Tensor, bias: Tensor, **options: object) -> Tensor:
        halves = [x_BTC[:, :9], x_BTC[:, 9:]]
        plain = {**options, "documents": None}
        return torch.cat([conv(half, weight, bias, **plain) for half in halves], dim=1)

    monkeypatch.setattr(mixing, "causal_conv", split_conv)


def _with_rotated_converter(monkeypatch: pytest.MonkeyPatch) -> None:
    scan = mixing.ssd_scan

    def rotated(**streams: Any) -> tuple[Tensor, Tensor]:
        first, keys = math.ceil(streams["transpoint"]), streams["b_BTGN"]
        pos_BT = torch.arange(keys.shape[1])[None]
        keys = torch.cat([rope(keys, pos_BT, 10000.0)[:, :first], keys[:, first:]], dim=1)
        return scan(**{**streams, "b_BTGN": keys})

    monkeypatch.setattr(mixing, "ssd_scan", rotated)


@pytest.mark.parametrize("fault", [_without_dt, _with_zero_state, _with_conv_per_segment, _with_rotated_converter])
def test_the_oracle_catches_a_wrong_converter(fault: object, monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = build(2, 4)
    compare(mixer, 20, [[0]], 9.0)
    fault(monkeypatch)  # pyright: ignore[reportCallIssue]
    with pytest.raises(AssertionError):
        compare(mixer, 20, [[0]], 9.0)
