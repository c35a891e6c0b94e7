"""Comparison of kernels with their references: one measure, one table of tolerances."""

from collections.abc import Callable

import torch
from torch import Tensor

Op = Callable[..., Tensor | tuple[Tensor, ...]]

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
    limit = TOLERANCE[actual.dtype] if tol is None else tol
    assert relative_rms(actual.double() * 1.01, expected) > limit, f"an error of 1 % passes the tolerance {limit:.1e}"


def values_and_gradients(op: Op, inputs: dict[str, Tensor], *, seed: int = 0) -> dict[str, Tensor]:
    """Outputs of `op(**inputs)` and the gradients of all floating-point inputs, for random cotangents.

    The cotangents depend on the seed and the output shapes only and are exact in every dtype, so two
    implementations get the same ones. An input that the outputs do not depend on has gradient 0.
    """
    leaves = {
        name: value.detach().clone().requires_grad_() if value.is_floating_point() else value
        for name, value in inputs.items()
    }
    result = op(**leaves)
    outputs = result if isinstance(result, tuple) else (result,)
    generator = torch.Generator().manual_seed(seed)
    cotangents = [torch.randn(output.shape, generator=generator).bfloat16() for output in outputs]
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    reached = [
        (output, cotangent.to(output.dtype))
        for output, cotangent in zip(outputs, cotangents, strict=True)
        if output.requires_grad
    ]
    gradients = torch.autograd.grad(
        [output for output, _ in reached],
        list(wanted.values()),
        [cotangent for _, cotangent in reached],
        allow_unused=True,
        materialize_grads=True,
    )
    found = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    return found | {f"gradient of {name}": grad for name, grad in zip(wanted, gradients, strict=True)}


def assert_matches_reference(
    op: Op, reference: Op, inputs: dict[str, Tensor], tol: float | None = None
) -> dict[str, Tensor]:
    """Fail unless values and gradients of `op` equal those of `reference` in float64; returns the former."""
    exact = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    actual, expected = values_and_gradients(op, inputs), values_and_gradients(reference, exact)
    for name, value in actual.items():
        assert_close(value, expected[name], tol, name)
        if expected[name].abs().sum() > 0:
            assert_planted_error_is_caught(value, expected[name], tol)
    return actual
