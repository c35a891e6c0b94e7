# B batch, T tokens, H heads, V value width.

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from transmamba.kernels.gated_norm import gated_rms_norm, rms_norm
from transmamba.kernels.gated_norm.reference import gated_rms_norm_reference
from transmamba.kernels.testing import assert_close, assert_matches_reference

HERE = Path(__file__).parent


def streams(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    shapes = {"y_BTHV": (2, 7, 3, 4), "weight_HV": (3, 4), "z_BTHV": (2, 7, 3, 4)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gate", ["all", "some", "none"])
def test_gated_norm_matches_its_definition(dtype: torch.dtype, gate: str) -> None:
    gate_BT = torch.rand(2, 7) > 0.5 if gate == "some" else None
    op, reference = (partial(function, gate_BT=gate_BT) for function in (gated_rms_norm, gated_rms_norm_reference))
    inputs = streams(dtype)
    if gate == "none":
        del inputs["z_BTHV"]
    found = assert_matches_reference(op, reference, inputs)
    assert {value.dtype for value in found.values()} == {dtype}


def test_leading_dimensions_may_be_any() -> None:
    inputs = streams()
    expected = gated_rms_norm(**inputs)
    turned = {name: value.transpose(0, 1) if "BT" in name else value for name, value in inputs.items()}
    assert_close(gated_rms_norm(**turned).transpose(0, 1), expected)
    flat = {name: value.flatten(0, 1) if "BT" in name else value for name, value in inputs.items()}
    assert_close(gated_rms_norm(**flat), expected.flatten(0, 1))


def test_heads_do_not_share_statistics() -> None:
    inputs = streams()
    louder = inputs["y_BTHV"].clone()
    louder[:, :, 0] *= 100
    before, after = gated_rms_norm(**inputs), gated_rms_norm(**{**inputs, "y_BTHV": louder})
    assert torch.equal(before[:, :, 1:], after[:, :, 1:])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_plain_norm_matches_its_definition(dtype: torch.dtype) -> None:
    inputs = {"x": torch.randn(5, 7, 48).to(dtype), "weight": torch.randn(48).to(dtype)}

    def reference(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    found = assert_matches_reference(rms_norm, reference, inputs)
    assert found["output 0"].dtype == dtype


def test_bad_arguments_are_refused() -> None:
    y_BTHV, weight_HV = torch.ones(2, 7, 3, 4), torch.ones(3, 4)
    with pytest.raises(ValueError, match="do not match"):
        gated_rms_norm(y_BTHV, weight_HV[:2])
    with pytest.raises(ValueError, match="do not match"):
        gated_rms_norm(y_BTHV, weight_HV, y_BTHV[:1])
    with pytest.raises(ValueError, match="needs z"):
        gated_rms_norm(y_BTHV, weight_HV, gate_BT=torch.ones(2, 7, dtype=torch.bool))
    with pytest.raises(ValueError, match="one entry per token"):
        gated_rms_norm(y_BTHV, weight_HV, y_BTHV, gate_BT=torch.ones(7, 2, dtype=torch.bool))


def run_probe(name: str, cache: Path, interpret: bool) -> list[dict[str, Any]]:
    """Triton reads TRITON_INTERPRET when a kernel is defined: each way of running needs its own process."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache)} | ({"TRITON_INTERPRET": "1"} if interpret else {})
    done = subprocess.run(
        [sys.executable, str(HERE / name)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_triton_kernels_match_the_definition_in_the_interpreter(tmp_path: Path) -> None:
    rows = run_probe("interpret_gated_norm.py", tmp_path, interpret=True)
    assert len(rows) == 8
    for row in rows:
        # the interpreter truncates when it rounds to bfloat16: up to one unit in the last place
        limit = 1e-6 if row["dtype"] == "torch.float32" else 1e-2
        errors = row["errors"]
        assert set(errors) >= {"out", "y", "weight"}
        assert all(error <= limit for error in errors.values()), row
        assert row["planted"] > limit, row


def test_triton_kernels_compile_for_hopper_without_spills(tmp_path: Path) -> None:
    rows = run_probe("compile_gated_norm.py", tmp_path, interpret=False)
    assert [row["kernel"] for row in rows] == ["norm_fwd_kernel", "norm_bwd_kernel"]
    for row in rows:
        assert row["spill_bytes"] == 0 and 0 < row["registers"] <= 128, row
