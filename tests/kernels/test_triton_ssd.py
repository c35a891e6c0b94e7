"""The Triton scan against the token loop in float64: in the interpreter, or on the GPU if there is one."""
# B batch, T tokens, H heads, G groups of B and C, N key/state width, V value width.

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from transmamba.kernels import backend
from transmamba.kernels.documents import Documents
from transmamba.kernels.ssd import final_state, ssd_scan, ssd_step, triton_scan
from transmamba.kernels.ssd.reference import scan_loop
from transmamba.kernels.testing import (
    assert_close,
    assert_matches_reference,
    assert_planted_error_is_caught,
    relative_rms,
    values_and_gradients,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 1e-6
# Sums over all tokens of parts that cancel; the torch path in float32 is as far from float64.
SUMS, SUMS_TOLERANCE = ("gradient of A_H", "gradient of dt_bias_H"), 1e-5
BFLOAT16_TOLERANCE = 1.2e-2  # tiles are rounded before products, and the interpreter truncates


@pytest.fixture(autouse=True)
def triton_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(backend, "runs_triton", lambda stream: stream.dtype != torch.float64)
        yield


def streams(
    dtype: torch.dtype = torch.float32,
    n_rows: int = 2,
    n_tokens: int = 75,
    n_heads: int = 2,
    n_groups: int = 1,
    n_state: int = 5,
    n_values: int = 6,
    n_before: int = 0,
    without: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Random inputs with every option; `without` takes some away."""
    torch.manual_seed(0)
    inputs = {
        "c_BTGN": torch.randn(n_rows, n_tokens, n_groups, n_state).to(dtype),
        "b_BTGN": torch.randn(n_rows, n_tokens, n_groups, n_state).to(dtype),
        "x_BTHV": torch.randn(n_rows, n_tokens, n_heads, n_values).to(dtype),
        "dt_BTH": torch.rand(n_rows, n_tokens, n_heads) * 2 - 3,
        "A_H": -torch.rand(n_heads) * 2 - 0.05,
        "D_H": torch.randn(n_heads),
        "dt_bias_H": torch.randn(n_heads) * 0.3,
        "initial_state_BHNV": torch.randn(n_rows, n_heads, n_state, n_values),
        "before_BPHV": torch.randn(n_rows, n_before, n_heads, n_values).to(dtype),
    }
    if not n_before:
        del inputs["before_BPHV"]
    if "dt_bias_H" in without:
        inputs["dt_BTH"] = torch.rand(n_rows, n_tokens, n_heads) * 0.2
    return {name: value.to(DEVICE) for name, value in inputs.items() if name not in without}


def check(inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    exact = {name: value.double() for name, value in inputs.items()}
    found = values_and_gradients(partial(ssd_scan, **options), inputs)
    expected = values_and_gradients(partial(scan_loop, **options), exact)
    compare(found, expected)
    return found


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Everything within the tolerance, and a hundredth more outside it."""
    for name, value in found.items():
        limit = SUMS_TOLERANCE if name in SUMS else TOLERANCE
        assert_close(value, expected[name], limit, name)
        if expected[name].abs().sum() > 0 and name != "gradient of before_BPHV":
            assert_planted_error_is_caught(value, expected[name], limit)


def documents_of(starts: list[list[int]], n_tokens: int) -> Documents:
    return Documents.from_starts(starts, n_tokens, DEVICE)


@pytest.mark.parametrize(
    ("n_tokens", "transpoint", "starts"),
    [
        (75, 0, None),
        (64, 0, None),
        (1, 0, None),
        (1, 1, None),
        (65, 63, None),
        (130, 64, None),
        (130, 129, None),
        (129, math.inf, None),
        (200, 150, None),
        (130, 0, [[0, 64, 128], [0]]),
        (130, 7, [[0, 3, 64, 100], [0, 129]]),
        (130, 65, [[0, 1, 2, 63, 65, 66], [0, 40]]),
        (70, 20, [list(range(70)), [0, 63, 64]]),
        (90, 10, [[0], [0]]),
    ],
)
def test_scan_matches_the_token_loop(n_tokens: int, transpoint: float, starts: list[list[int]] | None) -> None:
    documents = None if starts is None else documents_of(starts, n_tokens)
    check(streams(n_tokens=n_tokens), documents=documents, transpoint=transpoint)


@pytest.mark.parametrize("starts", [None, [[0, 30, 70], [0]]], ids=["whole", "packed"])
@pytest.mark.parametrize(
    "without",
    [(), ("D_H",), ("dt_bias_H",), ("initial_state_BHNV",), ("D_H", "dt_bias_H", "initial_state_BHNV")],
    ids=lambda names: "-".join(("without", *names)),
)
def test_every_option_may_be_left_out(without: tuple[str, ...], starts: list[list[int]] | None) -> None:
    documents = None if starts is None else documents_of(starts, 100)
    check(streams(n_tokens=100, n_rows=2 if starts else 1, without=without), documents=documents, transpoint=11)


@pytest.mark.parametrize(("n_groups", "n_state", "n_values"), [(4, 20, 33), (1, 8, 8), (2, 64, 64), (4, 130, 72)])
def test_widths_and_groups(n_groups: int, n_state: int, n_values: int) -> None:
    check(
        streams(n_rows=1, n_tokens=70, n_heads=4, n_groups=n_groups, n_state=n_state, n_values=n_values), transpoint=3
    )


@pytest.mark.parametrize(("n_state", "n_values"), [(65, 20), (20, 65), (65, 65)])
def test_wide_tiles_are_loaded_again_where_registers_end(n_state: int, n_values: int) -> None:
    documents = documents_of([[0, 30], [0]], 130)
    check(streams(n_tokens=130, n_state=n_state, n_values=n_values), documents=documents, transpoint=66)


def test_what_is_loaded_again_is_the_same_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = streams(n_tokens=100, n_state=16, n_values=16)
    once = values_and_gradients(ssd_scan, inputs)
    monkeypatch.setattr(triton_scan, "NARROW", 8)
    again = values_and_gradients(ssd_scan, inputs)
    assert all(torch.equal(value, once[name]) for name, value in again.items())


@pytest.mark.parametrize("starts", [None, [[0, 25, 70], [0]]], ids=["whole", "packed"])
def test_tokens_before_the_transpoint_keep_what_they_had(starts: list[list[int]] | None) -> None:
    documents = None if starts is None else documents_of(starts, 100)
    inputs = streams(n_tokens=100, n_before=21 if starts is None else 100)
    found = check(inputs, documents=documents, transpoint=21)
    pos_BT = (Documents.whole(2, 100, DEVICE) if documents is None else documents).pos_BT
    before = torch.zeros_like(found["output 0"])
    before[:, : inputs["before_BPHV"].shape[1]] = inputs["before_BPHV"]
    assert torch.equal(found["output 0"][pos_BT < 21], before[pos_BT < 21])


@settings(
    derandomize=True,
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.generate],  # to shrink a failure would take minutes in the interpreter
)
@given(st.data())
def test_scan_matches_the_token_loop_at_any_size(data: st.DataObject) -> None:
    n_tokens = data.draw(st.integers(1, 140))
    n_groups = data.draw(st.integers(1, 3))
    starts = data.draw(st.none() | st.sets(st.integers(1, 139), max_size=6))
    documents = None
    if starts is not None:
        row = sorted({0} | {start for start in starts if start < n_tokens})
        documents = documents_of([row, [0]], n_tokens)
    inputs = streams(
        n_tokens=n_tokens,
        n_heads=n_groups * data.draw(st.integers(1, 2)),
        n_groups=n_groups,
        n_state=data.draw(st.integers(1, 20)),
        n_values=data.draw(st.integers(1, 20)),
        without=tuple(data.draw(st.sets(st.sampled_from(["D_H", "dt_bias_H", "initial_state_BHNV"])))),
    )
    check(inputs, documents=documents, transpoint=data.draw(st.integers(0, n_tokens + 1)))


@pytest.mark.parametrize("starts", [None, [[0, 200, 301], [0]]], ids=["whole", "packed"])
def test_segments_scan_like_one(monkeypatch: pytest.MonkeyPatch, starts: list[list[int]] | None) -> None:
    documents = None if starts is None else documents_of(starts, 330)
    inputs = streams(n_rows=len(starts or [[]]), n_tokens=330)
    monkeypatch.setattr(triton_scan, "count_segments", lambda *_: 3)
    check(inputs, documents=documents, transpoint=70)


def test_segments_fill_the_device_and_none_is_empty() -> None:
    assert triton_scan.count_segments(n_programs=300, n_chunks=1024, n_processors=132) == 1
    assert triton_scan.count_segments(n_programs=32, n_chunks=1024, n_processors=132) == 8
    assert triton_scan.count_segments(n_programs=32, n_chunks=10, n_processors=132) == 1
    for n_chunks in range(1, 100):
        for n_programs in (1, 7, 64):
            n_segments = triton_scan.count_segments(n_programs, n_chunks, 132)
            assert (n_segments - 1) * -(-n_chunks // n_segments) < n_chunks


def test_bfloat16_streams_stay_in_their_band() -> None:
    inputs = streams(torch.bfloat16, n_tokens=130, n_state=16, n_values=16, n_before=9)
    exact = {name: value.double() for name, value in inputs.items()}
    documents = documents_of([[0, 50], [0]], 130)
    found = values_and_gradients(partial(ssd_scan, documents=documents, transpoint=9), {**inputs, **_rest(inputs)})
    expected = values_and_gradients(partial(scan_loop, documents=documents, transpoint=9), {**exact, **_rest(exact)})
    for name, value in found.items():
        assert_close(value, expected[name], BFLOAT16_TOLERANCE * (4 if name in SUMS else 1), name)
    assert found["output 0"].dtype == found["gradient of c_BTGN"].dtype == torch.bfloat16
    assert found["output 1"].dtype == torch.float32


def _rest(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Columns of `before_BPHV` up to the row's end, which packed rows need."""
    return {"before_BPHV": inputs["x_BTHV"].clone()}


def test_memory_of_either_order_and_views_give_the_same() -> None:
    inputs = streams(n_state=8, n_values=8)
    expected = values_and_gradients(ssd_scan, inputs)

    def turned(**inputs: Any) -> tuple[Tensor, Tensor]:
        views = {
            name: stream.transpose(0, 1).contiguous().transpose(0, 1) if "BT" in name else stream
            for name, stream in inputs.items()
        }
        joined = torch.cat([views.pop("c_BTGN"), views.pop("b_BTGN")], dim=-1)
        c_BTGN, b_BTGN = joined.split(8, dim=-1)
        return ssd_scan(c_BTGN, b_BTGN, **views)

    for name, value in values_and_gradients(turned, inputs).items():
        assert torch.equal(value, expected[name]), name


def test_packed_documents_do_not_touch_each_other_bit_by_bit() -> None:
    inputs = streams(n_rows=1, n_tokens=150, without=("initial_state_BHNV",))
    documents = documents_of([[0, 40, 100]], 150)

    def gradients(inputs: dict[str, Any]) -> dict[str, Tensor]:
        op = partial(ssd_scan, documents=documents, transpoint=3)
        return {name: value for name, value in values_and_gradients(op, inputs).items() if name != "output 1"}

    before = gradients(inputs)
    for name in ("c_BTGN", "b_BTGN", "x_BTHV", "dt_BTH"):
        changed = inputs[name].clone()
        changed[:, 70:90] += 1.0
        after = gradients({**inputs, name: changed})
        for found, value in after.items():
            if found.endswith(("BTGN", "BTHV", "BTH", "0")):
                assert torch.equal(value[:, :40], before[found][:, :40]), (name, found)
                assert torch.equal(value[:, 100:], before[found][:, 100:]), (name, found)


def test_strong_and_weak_decay_stay_exact_and_finite() -> None:
    for rate in (1e-6, 1e-2, 30.0, 1e4):
        inputs = streams(n_rows=1, n_tokens=130, without=("dt_bias_H",))
        inputs["A_H"] = torch.full((2,), -rate, device=DEVICE)
        exact = {name: value.double() for name, value in inputs.items()}
        found, expected = values_and_gradients(ssd_scan, inputs), values_and_gradients(scan_loop, exact)
        for name, value in found.items():
            assert value.isfinite().all(), (rate, name)
            if name not in (*SUMS, "gradient of dt_BTH", "gradient of initial_state_BHNV") or rate < 1:
                assert_close(value, expected[name], 2e-5 if rate > 1 else 4e-6, f"{name} at {rate}")


def test_small_steps_keep_their_digits() -> None:
    """softplus of -15 is 3e-7: a logarithm of 1 + exp would have lost most of it."""
    inputs = streams(n_rows=1, n_tokens=70)
    inputs["dt_BTH"] -= 12
    check(inputs)


def test_two_runs_are_bitwise_equal() -> None:
    inputs = streams(n_tokens=150)
    first, second = (values_and_gradients(partial(ssd_scan, transpoint=9), inputs) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_row_alone_equals_row_in_a_batch_bit_by_bit() -> None:
    inputs = streams(n_rows=3, n_tokens=100)
    together = ssd_scan(**inputs)[0]
    alone = {name: value[1:2] if "_B" in name else value for name, value in inputs.items()}
    assert torch.equal(ssd_scan(**alone)[0], together[1:2])


def test_final_state_is_the_memory_converter() -> None:
    inputs = streams(n_tokens=100, without=("D_H",))
    c_BTGN = inputs.pop("c_BTGN")
    found = values_and_gradients(final_state, inputs)
    exact = {name: value.double() for name, value in inputs.items()}
    expected = values_and_gradients(lambda **values: scan_loop(c_BTGN.double(), **values)[1], exact)
    compare(found, expected)


def test_steps_equal_the_whole_row() -> None:
    inputs = streams(n_tokens=70, n_state=20, n_values=24)
    y_BTHV, last_BHNV = ssd_scan(**inputs)
    state = inputs["initial_state_BHNV"]
    c, b, x, dt = (inputs[name] for name in ("c_BTGN", "b_BTGN", "x_BTHV", "dt_BTH"))
    per_head = {name: inputs[name] for name in ("D_H", "dt_bias_H")}
    for t in range(70):
        y_BHV, state = ssd_step(state, c[:, t], b[:, t], x[:, t], dt[:, t], inputs["A_H"], **per_head)
        assert_close(y_BHV, y_BTHV[:, t], 4e-6, f"token {t}")
    assert_close(state, last_BHNV, 2e-6)


def test_planted_faults_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundredth more decay, or a state that a segment forgets, is far outside the tolerance."""
    inputs = streams(n_rows=1, n_tokens=300)
    wanted = ssd_scan(**inputs)[0]
    assert relative_rms(ssd_scan(**{**inputs, "A_H": inputs["A_H"] * 1.01})[0], wanted) > 100 * TOLERANCE
    monkeypatch.setattr(triton_scan, "count_segments", lambda *_: 2)
    monkeypatch.setattr(triton_scan, "_pass_states", lambda local, *_, **__: local.zero_())
    assert relative_rms(ssd_scan(**inputs)[0], wanted) > 100 * TOLERANCE


def test_no_tokens_give_no_outputs_and_the_initial_state() -> None:
    inputs = streams(n_tokens=0)
    y_BTHV, last_BHNV = ssd_scan(**inputs)
    assert y_BTHV.shape[1] == 0 and torch.equal(last_BHNV, inputs["initial_state_BHNV"])


def test_reference_agrees_with_itself_across_the_paths() -> None:
    """The same call in float64 takes the torch path, whichever device: the two share nothing but the definition."""
    inputs = {name: value.double() for name, value in streams(n_tokens=100).items()}
    assert_matches_reference(partial(ssd_scan, transpoint=9), partial(scan_loop, transpoint=9), inputs)
