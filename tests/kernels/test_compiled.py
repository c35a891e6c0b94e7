"""Planted kernels for the judge of compiled kernels; run as a script, it compiles them and prints JSON lines."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from transmamba.kernels.cases import Limits
from transmamba.kernels.compiled import Compiled, compile_launch, main
from transmamba.kernels.launches import recorded
from transmamba.kernels.offsets import dots_of_transposed_sums, narrow_offsets

pytestmark = pytest.mark.xdist_group("compiled")
ROW = Compiled("case", "kernel", 90, (), seconds=0.1, registers=40, wgmma=8, tma=2)


@triton.jit
def wide(x_pointer, y_pointer, n, stride, SIZE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, n, SIZE):
        token = start + tl.arange(0, SIZE)
        value = tl.load(x_pointer + row * stride + token, mask=token < n, other=0.0)
        tl.store(y_pointer + row * stride + token.to(tl.int64) * 3, value, mask=token < n)


@triton.jit
def program_times_size(x_pointer, y_pointer, n, stride, SIZE: tl.constexpr):
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(y_pointer + place.to(tl.int64), tl.load(x_pointer + place, mask=place < n, other=0.0), mask=place < n)


@triton.jit
def loop_times_stride(x_pointer, y_pointer, n, stride, SIZE: tl.constexpr):
    total = tl.zeros((SIZE,), tl.float32)
    for row in range(n):
        total += tl.load(x_pointer + row * stride + tl.arange(0, SIZE))
    tl.store(y_pointer + tl.arange(0, SIZE), total)


@triton.jit
def carried_sum(x_pointer, y_pointer, n, stride, SIZE: tl.constexpr):
    total = tl.zeros((SIZE,), tl.float32)
    place = 0
    for _ in range(n):
        total += tl.load(x_pointer + place + tl.arange(0, SIZE))
        place += 4096
    tl.store(y_pointer + tl.arange(0, SIZE), total)


@triton.jit
def one_branch(x_pointer, y_pointer, n, stride, SIZE: tl.constexpr):
    row = tl.program_id(0)
    place = row
    if n > 3:
        place = row * stride
    tl.store(y_pointer + place + tl.arange(0, SIZE), tl.load(x_pointer + tl.arange(0, SIZE)))


@triton.jit
def refused(x_pointer, y_pointer, n, stride, SIZE: tl.constexpr):
    tl.store(y_pointer + tl.arange(0, SIZE), tl.load(x_pointer + tl.arange(0, 2 * SIZE)))


@triton.jit
def products(x_descriptor, y_pointer, maybe_pointer, one, WIDTH: tl.constexpr, TURN: tl.constexpr):
    row = tl.program_id(0)
    tile = x_descriptor.load([row, 0, 0, 0]).reshape(64, WIDTH)
    total = tl.dot(tl.trans(tile), tile)
    if TURN:
        total = tl.dot(tl.trans(total.to(tl.bfloat16)), total.to(tl.bfloat16))
    if maybe_pointer is not None:
        total += tl.load(maybe_pointer)
    place = tl.arange(0, WIDTH)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(y_pointer + row.to(tl.int64) * one + place, total)


BAD = (program_times_size, loop_times_stride, carried_sum, one_branch)


def compile_planted() -> None:
    x, y = (torch.empty(1 << 20, device="meta") for _ in range(2))
    for kernel in (wide, refused, *BAD):
        planted: Any = kernel
        show(kernel.__name__, partial(planted[(4,)], x, y, 1000, 17, SIZE=128))
    launch: Any = products
    for name, turn, options in (
        ("dot", False, {}),
        ("turned dot", True, {}),
        ("spilling dot", False, {"maxnreg": 64}),
        ("no room", False, {"maxnreg": 32}),
    ):
        view = torch.empty(2, 4, 256, 64, device="meta", dtype=torch.bfloat16).transpose(1, 2)
        descriptor = TensorDescriptor.from_tensor(view, [1, 64, 1, 64])
        call = partial(launch[(2,)], descriptor, y, None, 1, WIDTH=64, TURN=turn, num_warps=4, **options)
        show(name, call)


def show(name: str, call: Any) -> None:
    with recorded() as found:
        call()
    print(json.dumps(asdict(compile_launch(found[0], name, 90))))


def run(arguments: list[str], cache: Path, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | more
    environment["TRITON_CACHE_DIR"] = str(cache)
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    done = run([__file__], tmp_path_factory.mktemp("cache"))
    assert done.returncode == 0, done.stderr
    return {row["case"]: row for row in map(json.loads, done.stdout.splitlines())}


def test_a_kernel_with_wide_offsets_passes(planted: dict[str, dict[str, Any]]) -> None:
    row = planted["wide"]
    assert row["faults"] == []
    assert row["spills"] == 0 and 0 < row["registers"] < 64 and row["seconds"] > 0


@pytest.mark.parametrize("kernel", BAD, ids=lambda kernel: kernel.__name__)
def test_narrow_offsets_are_found_with_their_line(planted: dict[str, dict[str, Any]], kernel: Any) -> None:
    faults = planted[kernel.__name__]["faults"]
    assert faults, "the planted fault was not found"
    lines = Path(__file__).read_text().splitlines()
    for fault in faults:
        file, number, _ = fault.split(":")
        assert file == Path(__file__).name
        assert any(sign in lines[int(number) - 1] for sign in ("*", "+=")), fault


def test_a_product_of_tiles_loaded_by_descriptor_uses_wgmma_and_tma(planted: dict[str, dict[str, Any]]) -> None:
    row = planted["dot"]
    assert row["wgmma"] > 0 and row["mma"] == 0 and row["tma"] > 0
    assert row["shared_bytes"] > 0 and row["spills"] == 0 and row["faults"] == []


def test_spills_and_transposed_accumulators_are_found(planted: dict[str, dict[str, Any]]) -> None:
    assert planted["spilling dot"]["spills"] > 0
    assert planted["spilling dot"]["stack_bytes"] > 0
    (fault,) = planted["turned dot"]["faults"]
    assert "transposed accumulator" in fault


def test_a_kernel_that_does_not_compile_is_a_fault(planted: dict[str, dict[str, Any]]) -> None:
    for name, reason in (("refused", "Cannot make_shape_compatible"), ("no room", "ptxas fatal")):
        (fault,) = planted[name]["faults"]
        assert fault.startswith(f"does not compile: {reason}")
        assert planted[name]["registers"] == 0


@pytest.mark.parametrize(
    ("only", "n_kernels"),
    [
        ("ssd given=streams", 3),
        ("documents=True tail", 2),
        ("rope time_first=False", 1),
        pytest.param("", 11, marks=pytest.mark.long),
    ],
    ids=lambda value: str(value).replace(" ", "-") or "all",
)
def test_every_kernel_keeps_its_limits_on_hopper(only: str, n_kernels: int, tmp_path: Path) -> None:
    written = tmp_path / "rows.json"
    arguments = ["-m", "transmamba.kernels.compiled", "--only", only, "--json", str(written)]
    done = run(arguments, tmp_path, TRITON_INTERPRET="1")  # it starts itself again without
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(written.read_text())
    assert len({row["kernel"] for row in report["rows"]}) == n_kernels
    assert report["broken"] == {}


@pytest.mark.long
def test_wide_scans_spill_little_and_two_programs_share_a_processor(tmp_path: Path) -> None:
    written = tmp_path / "rows.json"
    done = run(["-m", "transmamba.kernels.compiled", "--only", "ssd wide", "--json", str(written)], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(written.read_text())["rows"]
    widest = [row for row in rows if row["case"].endswith("128x128") and row["kernel"] == "chunk_bwd_kernel"]
    assert len(widest) == 2 and all(row["spills"] <= 16 for row in widest)
    assert not any(row["spills"] for row in rows if row not in widest)
    for row in rows:
        assert 2 * (row["shared_bytes"] + 1024) <= 228 * 1024, "a program costs a KiB more than it asks for"


def test_a_case_that_does_not_exist_is_not_a_success(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "nothing"]) == 1
    assert capsys.readouterr().err == "--only nothing: no case of this name launches a kernel\n"


@pytest.mark.parametrize(
    ("change", "limits", "complaint"),
    [
        ({"spills": 3}, Limits(), "kernel, sm_90: 3 spill stores, 0 allowed"),
        ({"spills": 3}, Limits(spills={"kernel": 3}), None),
        ({"mma": 8}, Limits(), None),
        ({"mma": 8}, Limits(wgmma=("kernel",)), "kernel, sm_90: 8 mma.sync beside 8 wgmma"),
        ({"wgmma": 0}, Limits(wgmma=("kernel",)), "0 mma.sync beside 0 wgmma"),
        ({"wgmma": 0, "mma": 8, "arch": 80, "spills": 3}, Limits(wgmma=("kernel",)), None),
        ({"shared_bytes": 1 << 18}, Limits(), "kernel, sm_90: 262144 bytes of shared memory, 232448 there are"),
        ({"faults": ("file.py:3: wrong",)}, Limits(), "kernel, sm_90: file.py:3: wrong"),
    ],
)
def test_a_broken_limit_is_one_line(change: dict[str, Any], limits: Limits, complaint: str | None) -> None:
    lines = list(Compiled(**{**asdict(ROW), **change}).broken(limits))
    assert len(lines) == (complaint is not None)
    assert complaint is None or complaint in lines[0]


FUNCTION = "module {{\n tt.func public @f(%p: !tt.ptr<f32>, %n: i32) {{\n{}\n tt.return\n }}\n}}"


@pytest.mark.parametrize(
    ("body", "is_fault"),
    [
        ("%a = arith.muli %n, %n : i32\n %b = tt.addptr %p, %a : !tt.ptr<f32>, i32", True),
        ("%w = arith.extsi %n : i32 to i64\n %a = arith.muli %w, %w : i64\n %b = tt.addptr %p, %a : x, i64", False),
        ("%a = arith.muli %n, %n : i32\n %w = arith.extsi %a : i32 to i64\n %b = tt.addptr %p, %w : x, i64", True),
        ("%a = arith.muli %n, %n : i32\n %b = arith.cmpi slt, %a, %n : i32", False),
        ("%r = tt.make_range {end = 8 : i32} : tensor<8xi32>\n %s = tt.splat %n : i32 -> tensor<8xi32>\n"
         " %a = arith.addi %s, %r : tensor<8xi32>\n %b = tt.addptr %p, %a : x, tensor<8xi32>", False),
        ("%s = tt.splat %n : i32 -> tensor<8xi32>\n %a = arith.addi %s, %s : tensor<8xi32>\n"
         " %b = tt.addptr %p, %a : x, tensor<8xi32>", True),
        ("%c = arith.constant 2 : i32\n %a = arith.muli %c, %c : i32\n %b = tt.addptr %p, %a : x, i32", False),
        ("%z = arith.constant 0 : i32\n scf.for %i = %z to %n step %z : i32 {\n %d = arith.subi %n, %i : i32\n"
         " %c = arith.muli %d, %z : i32\n %b = tt.addptr %p, %c : x, i32\n }", False),
        ("%z = arith.constant 0 : i32\n scf.for %i = %z to %n step %z : i32 {\n %c = arith.muli %i, %n : i32\n"
         " %b = tt.addptr %p, %c : x, i32\n }", True),
        ("%q = arith.divsi %n, %n : i32\n %b = tt.addptr %p, %q : x, i32", False),
    ],
)  # fmt: skip
def test_what_counts_as_a_narrow_offset(body: str, is_fault: bool) -> None:
    assert bool(narrow_offsets(FUNCTION.format(body))) == is_fault
    assert dots_of_transposed_sums(FUNCTION.format(body)) == ()


if __name__ == "__main__":
    compile_planted()
