# B batch, T tokens, H heads, G groups of B and C, N key/state width, V value width.

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

from transmamba.kernels.documents import Documents
from transmamba.kernels.ssd import final_state, slabs, ssd_scan, ssd_step
from transmamba.kernels.ssd.reference import scan_loop
from transmamba.kernels.testing import (
    TOLERANCE,
    assert_close,
    assert_matches_reference,
    values_and_gradients,
)


def streams(
    dtype: torch.dtype = torch.float64,
    n_rows: int = 2,
    n_tokens: int = 150,
    n_heads: int = 4,
    n_groups: int = 2,
    n_state: int = 5,
    n_values: int = 6,
) -> dict[str, Any]:
    """Random inputs; dt, A, D and the state in float32 where the streams are bfloat16, as in training."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "c_BTGN": torch.randn(n_rows, n_tokens, n_groups, n_state).to(dtype),
        "b_BTGN": torch.randn(n_rows, n_tokens, n_groups, n_state).to(dtype),
        "x_BTHV": torch.randn(n_rows, n_tokens, n_heads, n_values).to(dtype),
        "dt_BTH": torch.rand(n_rows, n_tokens, n_heads, dtype=wide),
        "A_H": -torch.rand(n_heads, dtype=wide) - 0.05,
        "D_H": torch.randn(n_heads, dtype=wide),
        "initial_state_BHNV": torch.randn(n_rows, n_heads, n_state, n_values, dtype=wide),
    }


def check(inputs: dict[str, Tensor], tol: float | None = None, **options: object) -> dict[str, Tensor]:
    return assert_matches_reference(partial(ssd_scan, **options), partial(scan_loop, **options), inputs, tol)


@pytest.mark.parametrize(
    ("n_tokens", "transpoint", "starts"),
    [
        (150, 0, None),
        (64, 0, None),
        (1, 0, None),
        (1, 1, None),
        (65, 63, None),
        (300, 77, [[0, 3, 64, 100], [0, 299]]),
        (600, 520, None),
        (600, 600, [[0, 256], [0, 1, 2, 300]]),
        (130, 0, [[0, 64, 128], [0]]),
        (130, 65, [list(range(130)), [0, 63, 66]]),
        (90, 10, [[0], [0]]),
    ],
)
def test_scan_matches_the_token_loop(n_tokens: int, transpoint: int, starts: list[list[int]] | None) -> None:
    documents = None if starts is None else Documents.from_starts(starts, n_tokens)
    check(streams(n_tokens=n_tokens), documents=documents, transpoint=transpoint)


@settings(derandomize=True, max_examples=12, deadline=None)
@given(st.data())
def test_scan_matches_the_token_loop_at_any_size(data: st.DataObject) -> None:
    n_tokens = data.draw(st.integers(0, 90))
    n_groups = data.draw(st.integers(1, 3))
    starts = data.draw(st.none() | st.sets(st.integers(1, 89), max_size=6))
    documents = None
    if starts is not None and n_tokens:
        row = sorted({0} | {start for start in starts if start < n_tokens})
        documents = Documents.from_starts([row, [0]], n_tokens)
    inputs = streams(
        n_tokens=n_tokens,
        n_heads=n_groups * data.draw(st.integers(1, 2)),
        n_groups=n_groups,
        n_state=data.draw(st.integers(1, 5)),
        n_values=data.draw(st.integers(1, 5)),
    )
    check(inputs, documents=documents, transpoint=data.draw(st.integers(0, n_tokens)))


@pytest.mark.parametrize("slab_elements", [1, 1 << 14])
def test_slab_size_does_not_change_the_result(monkeypatch: pytest.MonkeyPatch, slab_elements: int) -> None:
    monkeypatch.setattr(slabs, "SLAB_ELEMENTS", slab_elements)
    check(streams(n_tokens=700), documents=Documents.from_starts([[0, 300], [0, 64, 500]], 700), transpoint=90)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scan_keeps_precision_and_dtypes(dtype: torch.dtype) -> None:
    inputs = streams(dtype, n_tokens=300)
    found = check(inputs, documents=Documents.from_starts([[0, 70], [0]], 300), transpoint=20)
    assert found["output 0"].dtype == dtype and found["output 1"].dtype == torch.float32
    for name, value in inputs.items():
        assert found[f"gradient of {name}"].dtype == value.dtype


@pytest.mark.parametrize("rate", [1e-4, 30.0])
def test_scan_is_exact_for_slow_and_fast_decay(rate: float) -> None:
    inputs = streams(torch.float32, n_tokens=200)
    inputs["A_H"] = torch.full((4,), -rate)
    check(inputs, tol=1e-4 if rate > 1 else None)


def test_decay_that_underflows_leaves_finite_gradients() -> None:
    inputs = streams(torch.float32, n_tokens=200)
    inputs["A_H"] = torch.full((4,), -1e5)
    found = values_and_gradients(ssd_scan, inputs)
    expected = values_and_gradients(scan_loop, {name: value.double() for name, value in inputs.items()})
    assert all(value.isfinite().all() for value in found.values())
    for name in ("output 0", "gradient of c_BTGN", "gradient of b_BTGN", "gradient of x_BTHV"):
        assert_close(found[name], expected[name], name=name)


def test_long_rows_keep_float32_precision() -> None:
    inputs = streams(torch.float32, n_rows=1, n_tokens=5000, n_heads=1, n_groups=1, n_state=4, n_values=4)
    inputs = {name: value.double() for name, value in inputs.items()}
    exact = ssd_scan(**inputs)
    for first, second in zip(ssd_scan(**{k: v.float() for k, v in inputs.items()}), exact, strict=True):
        assert_close(first, second)


def test_gradcheck_passes() -> None:
    inputs = {
        name: value.requires_grad_()
        for name, value in streams(n_rows=1, n_tokens=9, n_heads=2, n_groups=1, n_state=2, n_values=3).items()
    }
    documents = Documents.from_starts([[0, 4]], 9)
    for options in ({}, {"documents": documents}, {"transpoint": 5}):

        def scan(*values: Tensor, options: dict[str, Any] = options) -> tuple[Tensor, Tensor]:
            return ssd_scan(**dict(zip(inputs, values, strict=True)), **options)  # pyright: ignore[reportArgumentType]

        assert gradcheck(scan, tuple(inputs.values()))


@pytest.mark.parametrize("prefix", [0, 1, 63, 64, 65, 149, 150])
def test_memory_converter_is_lossless_at_every_transpoint(prefix: int) -> None:
    inputs = streams()
    y_BTHV, last_BHNV = ssd_scan(**inputs)
    before = {name: stream[:, :prefix] for name, stream in inputs.items() if "BT" in name and name != "c_BTGN"}
    state = final_state(**before, A_H=inputs["A_H"], initial_state_BHNV=inputs["initial_state_BHNV"])
    after = {name: stream[:, prefix:] if "BT" in name else stream for name, stream in inputs.items()}
    y_after, last_after = ssd_scan(**{**after, "initial_state_BHNV": state})
    assert_close(y_after, y_BTHV[:, prefix:])
    assert_close(last_after, last_BHNV)
    y_masked, last_masked = ssd_scan(**inputs, transpoint=prefix)
    assert_close(y_masked[:, prefix:], y_BTHV[:, prefix:])
    assert_close(last_masked, last_BHNV)
    assert not y_masked[:, :prefix].any()


def test_final_state_matches_the_token_loop() -> None:
    inputs = streams(n_tokens=300)
    documents = Documents.from_starts([[0, 70], [0]], 300)
    c_BTGN = inputs.pop("c_BTGN")
    del inputs["D_H"]
    assert_matches_reference(
        partial(final_state, documents=documents),
        lambda **values: scan_loop(c_BTGN, **values, documents=documents)[1],
        inputs,
    )


def test_packed_documents_scan_as_if_alone() -> None:
    inputs = streams()
    del inputs["initial_state_BHNV"]
    packed, _ = ssd_scan(**inputs, documents=Documents.from_starts([[0, 40, 100]] * 2, 150))
    for part in (slice(0, 40), slice(40, 100), slice(100, 150)):
        alone = {name: stream[:, part] if "BT" in name else stream for name, stream in inputs.items()}
        assert_close(packed[:, part], ssd_scan(**alone)[0])


def test_no_value_leaks_forward_in_time_or_across_documents() -> None:
    inputs = streams(torch.float32)
    documents = Documents.from_starts([[0, 100]] * 2, 150)
    y_BTHV, _ = ssd_scan(**inputs, documents=documents)
    for name in ("c_BTGN", "b_BTGN", "x_BTHV", "dt_BTH"):
        changed = inputs[name].clone()
        changed[:, 70:100] += 1.0
        y_changed, _ = ssd_scan(**{**inputs, name: changed}, documents=documents)
        assert torch.equal(y_changed[:, :70], y_BTHV[:, :70]), name
        assert torch.equal(y_changed[:, 100:], y_BTHV[:, 100:]), name
        assert not torch.equal(y_changed[:, 70:100], y_BTHV[:, 70:100]), name


def test_outputs_that_are_not_wanted_send_no_gradient() -> None:
    inputs = {name: value.requires_grad_() for name, value in streams().items()}
    y_BTHV, _ = ssd_scan(**inputs, transpoint=80)
    y_BTHV[:, :80].sum().backward()
    for name, value in inputs.items():
        assert value.grad is not None and not value.grad.any(), name


def test_a_document_at_column_zero_drops_the_initial_state() -> None:
    inputs = streams()
    initial = inputs.pop("initial_state_BHNV").requires_grad_()
    documents = Documents.whole(2, 150)
    y_BTHV, last_BHNV = ssd_scan(**inputs, initial_state_BHNV=initial, documents=documents)
    assert torch.equal(y_BTHV, ssd_scan(**inputs)[0])
    last_BHNV.sum().backward()
    assert initial.grad is not None and not initial.grad.any()


def test_steps_equal_the_whole_row() -> None:
    inputs = streams(n_tokens=70)
    y_BTHV, last_BHNV = ssd_scan(**inputs)
    state = inputs["initial_state_BHNV"]
    c, b, x, dt = (inputs[name] for name in ("c_BTGN", "b_BTGN", "x_BTHV", "dt_BTH"))
    for t in range(70):
        y_BHV, state = ssd_step(state, c[:, t], b[:, t], x[:, t], dt[:, t], inputs["A_H"], D_H=inputs["D_H"])
        assert_close(y_BHV, y_BTHV[:, t], name=f"token {t}")
    assert_close(state, last_BHNV)


def test_sequence_first_memory_gives_the_same() -> None:
    def turned(**inputs: Any) -> tuple[Tensor, Tensor]:
        views = {
            name: stream.transpose(0, 1).contiguous().transpose(0, 1) if "BT" in name else stream
            for name, stream in inputs.items()
        }
        return ssd_scan(**views)

    assert_matches_reference(turned, scan_loop, streams())


def test_two_runs_are_bitwise_equal() -> None:
    inputs = {name: value.requires_grad_() for name, value in streams(torch.float32, n_tokens=500).items()}
    runs = []
    for _ in range(2):
        y_BTHV, last_BHNV = ssd_scan(**inputs)
        runs.append([y_BTHV, last_BHNV, *torch.autograd.grad((y_BTHV.sum() + last_BHNV.sum()), [*inputs.values()])])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_tolerance_for_float32_is_far_below_a_percent() -> None:
    assert TOLERANCE[torch.float32] < 1e-4


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"b_BTGN": torch.ones(2, 8, 1, 5)}, "do not match"),
        ({"dt_BTH": torch.ones(2, 8, 3)}, "do not match"),
        ({"x_BTHV": torch.ones(2, 8, 3, 6), "dt_BTH": torch.ones(2, 8, 3)}, "2 groups do not divide 3 heads"),
        ({"A_H": torch.ones(3)}, "one entry for each of 4 heads"),
        ({"D_H": torch.ones(3)}, "one entry for each of 4 heads"),
        ({"initial_state_BHNV": torch.ones(2, 4, 6, 5)}, "initial state"),
        ({"documents": Documents.whole(2, 9)}, "documents of 2 rows of 9"),
        ({"transpoint": -1}, "transpoint -1 is negative"),
        ({"dt_bias_H": torch.ones(3)}, "dt_bias"),
        ({"transpoint": 5, "before_BPHV": torch.ones(2, 4, 4, 6)}, "need 5 or more columns"),
        ({"x_BTHV": torch.ones(2, 8, 4)}, "4-dimensional"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ssd_scan(**{**streams(torch.float32, n_tokens=8), **changes})  # pyright: ignore[reportArgumentType]
