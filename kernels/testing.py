"""Comparison of kernels with their references: one measure, one table of tolerances."""

import pytest
import torch
from torch import Tensor

# Relative RMS error allowed for a result of this dtype against float64. bfloat16 keeps 8 bits: half a unit in
# the last place is 2e-3, and a few roundings in a row stay below three of them.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 6e-3}


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of `expected` (over 1 where that is 0); inf for non-finite values."""
    if not actual.numel():
        return 0.0
    difference, reference = actual.double() - expected.double(), expected.double()
    if not (difference.isfinite().all() and reference.isfinite().all()):
        return float("inf")
    size = reference.square().mean().sqrt().item()
    return difference.square().mean().sqrt().item() / (size or 1.0)


def assert_close(actual: Tensor, expected: Tensor, tol: float | None = None, name: str = "result") -> None:
    """Fail unless shapes agree and the relative RMS error is at most `tol` (default: by dtype)."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    limit = TOLERANCE[actual.dtype] if tol is None else tol
    error = relative_rms(actual, expected)
    assert error <= limit, f"{name}: relative RMS error {error:.3e} above {limit:.1e}"


def assert_planted_error_is_caught(actual: Tensor, expected: Tensor, tol: float | None = None) -> None:
    """Fail unless `actual` with an error of 1 % is rejected: proof that the tolerance can fail."""
    assert actual.numel(), "no values to plant an error in"
    with pytest.raises(AssertionError, match="relative RMS"):
        assert_close(
            actual.double() * 1.01, expected, TOLERANCE[actual.dtype] if tol is None else tol, "planted"
        )
