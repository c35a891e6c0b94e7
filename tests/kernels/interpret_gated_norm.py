"""Run by the tests in its own process: errors of the Triton norm in the interpreter, a JSON line a case."""

# B batch, T tokens, H heads, V value width.

import json
from itertools import product

import torch

from transmamba.kernels.gated_norm.reference import gated_rms_norm_reference
from transmamba.kernels.gated_norm.triton_norm import norm_bwd, norm_fwd
from transmamba.kernels.testing import relative_rms


def main() -> None:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    cases = product((torch.float32, torch.bfloat16), ((3, 25, 3, 20), (1, 1, 1, 64)), (True, False))
    for dtype, shape, has_gate in cases:
        y, z, dout = (torch.randn(shape).to(dtype) for _ in range(3))
        weight = torch.randn(shape[2:])
        gate = torch.rand(shape[:2]) > 0.4 if has_gate else None
        out, scale = norm_fwd(y, weight, z if has_gate else None, gate, 1e-5)
        found = [out, *norm_bwd(y, weight, z if has_gate else None, gate, scale, dout)]
        exact = [value.double().requires_grad_() for value in ((y, weight, z) if has_gate else (y, weight))]
        expected = gated_rms_norm_reference(*exact, gate_BT=gate)
        gradients = torch.autograd.grad(expected, exact, dout.double())
        names = ("out", "y", "weight", "z")
        errors = {
            name: relative_rms(actual, wanted.detach())
            for name, actual, wanted in zip(names, found, (expected, *gradients), strict=False)
            if actual is not None
        }
        planted = relative_rms(found[1] * 1.02, gradients[0])
        print(json.dumps({"dtype": str(dtype), "shape": shape, "errors": errors, "planted": planted}))


if __name__ == "__main__":
    main()
