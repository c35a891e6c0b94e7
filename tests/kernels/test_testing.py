import pytest
import torch

from transmamba.kernels.testing import (
    TOLERANCE,
    assert_close,
    assert_planted_error_is_caught,
    relative_rms,
    values_and_gradients,
)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_tolerances_can_fail(dtype: torch.dtype) -> None:
    exact = torch.randn(1000, dtype=torch.float64)
    assert_close(exact.to(dtype), exact)
    assert_planted_error_is_caught(exact.to(dtype), exact)


def test_a_tolerance_too_wide_to_catch_one_percent_is_reported() -> None:
    exact = torch.randn(1000, dtype=torch.float64)
    with pytest.raises(AssertionError, match="an error of 1 % passes"):
        assert_planted_error_is_caught(exact, exact, tol=0.02)


def test_nan_is_never_close() -> None:
    value = torch.tensor([1.0, torch.nan])
    assert relative_rms(value, value) == float("inf")


def test_other_shapes_are_never_close() -> None:
    with pytest.raises(AssertionError, match="shape"):
        assert_close(torch.ones(3), torch.ones(1))


def test_uninitialised_memory_is_poisoned() -> None:
    assert torch.empty(3).isnan().all()
    assert torch.ones(3).new_empty(2, 2).isnan().all()


def test_gradients_of_a_known_function_are_right() -> None:
    x = torch.tensor([1.0, 2.0], dtype=torch.float64)
    unused = torch.ones(1, dtype=torch.float64)
    found = values_and_gradients(lambda x, unused: x.square(), {"x": x, "unused": unused})
    cotangent = torch.randn(2, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(found["output 0"], x.square())
    assert torch.equal(found["gradient of x"], 2 * x * cotangent)
    assert torch.equal(found["gradient of unused"], torch.zeros(1, dtype=torch.float64))
