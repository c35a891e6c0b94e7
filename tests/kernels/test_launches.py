# B batch, T tokens, H heads, V value width.

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from transmamba.kernels import backend, launches
from transmamba.kernels.gated_norm import gated_rms_norm
from transmamba.kernels.launches import forward_backward, n_bytes, recorded

PEER = """
import torch
def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D, dt_bias, dt_softplus):
    assert chunk_size == 256 and dt_softplus
    return x * 2
"""


@triton.autotune(configs=[triton.Config({"SIZE": size}, num_warps=2) for size in (16, 32)], key=["n"])
@triton.heuristics({"IS_LONG": lambda arguments: arguments["n"] > 100})
@triton.jit
def fill_kernel(out_pointer, maybe_pointer, n, SIZE: tl.constexpr, IS_LONG: tl.constexpr):
    tl.store(out_pointer + tl.arange(0, SIZE), 1.0)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_a_launch_is_written_down_and_not_run() -> None:
    out = torch.zeros(64)
    kernel: Any = fill_kernel
    with recorded() as found:
        kernel[lambda given: (triton.cdiv(given["n"], given["SIZE"]), 2)](out, None, n=128)
    (launch,) = found
    assert (launch.name, launch.grid, launch.n_bytes) == ("fill_kernel", (8, 2), 256)
    assert launch.arguments.keys() == {"out_pointer", "maybe_pointer", "n"}
    assert launch.arguments["maybe_pointer"] is None
    assert launch.constants == {"SIZE": 16, "IS_LONG": True}
    assert launch.options["num_warps"] == 2
    assert not out.any()


def test_the_triton_path_is_taken_only_meanwhile() -> None:
    before, run = backend.runs_triton, fill_kernel.run
    with pytest.raises(RuntimeError, match="planted"), recorded():
        assert backend.runs_triton(torch.zeros(1))
        raise RuntimeError("planted")
    assert backend.runs_triton is before
    assert fill_kernel.run == run


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([meta(2, 3), None, 7, 0.5], 24),
        ([meta(2, 3, dtype=torch.bfloat16), meta(0)], 12),
        ([meta(8, 64)[:, :16]], 8 * 16 * 4),
        ([meta(8, 1).expand(8, 64)], 8 * 4),
        ([(meta(4), [meta(4)])], 32),
        ([TensorDescriptor.from_tensor(meta(8, 64)[:, :16], [1, 16])], 8 * 16 * 4),
    ],
    ids=["not tensors", "empty", "strided view", "repeated", "nested", "descriptor"],
)
def test_bytes_are_those_of_the_elements_shown(values: list[Any], expected: int) -> None:
    assert n_bytes(values) == expected


def test_a_tensor_given_twice_counts_once_and_two_views_count_both() -> None:
    tensor = meta(4, 8)
    assert n_bytes([tensor, tensor, tensor.detach()]) == 128
    assert n_bytes([tensor[:2], tensor[2:]]) == 128
    assert n_bytes([tensor, meta(4, 8)]) == 256


def test_torch_calls_count_where_a_gpu_would_run_something() -> None:
    x = meta(4, 8)
    with recorded() as found:
        _ = x.T.reshape(2, 16)[:, None].unbind(0), x.detach()
        _ = torch.empty_like(x), x.new_empty(3), torch.ones(3) + 1
        assert [launch.name for launch in found] == ["clone"], "a reshape of a turned tensor copies it"
        found.clear()
        _ = torch.zeros(4, device="meta"), x.add_(x), x + x[:1], x.bfloat16()
    assert [launch.name for launch in found] == ["zeros", "add_", "add", "_to_copy"]
    assert [launch.n_bytes for launch in found] == [16, 128, 128 + 32 + 128, 128 + 64]


def test_the_norm_reads_and_writes_each_of_its_streams_once_at_the_size_of_training() -> None:
    n_tokens, n_heads, width = 65_536, 32, 64
    stream = meta(1, n_tokens, n_heads, width, dtype=torch.bfloat16)
    tensors = {"y_BTHV": stream, "weight_HV": meta(n_heads, width), "z_BTHV": torch.empty_like(stream)}
    forward, backward = forward_backward(gated_rms_norm, tensors)
    assert [launch.name for launch in forward] == ["norm_fwd_kernel"]
    assert [launch.name for launch in backward] == ["norm_bwd_kernel", "sum"]
    per_token_head = [sum(launch.n_bytes for launch in part) / (n_tokens * n_heads) for part in (forward, backward)]
    # three bf16 streams and a float32 scale; five and the scale, besides the partial sums of the weight's gradient
    assert per_token_head == [pytest.approx(3 * 2 * width + 4, abs=1), pytest.approx(5 * 2 * width + 4, abs=1)]
    assert math.prod(forward[0].grid) * forward[0].constants["ROWS"] == n_tokens * n_heads


@pytest.mark.parametrize(
    ("sizes", "most_bytes"), [((32, 32, 64, 64), 2400), ((16, 16, 128, 128), 5600), ((32, 1, 128, 64), 3000)], ids=str
)
def test_the_scan_takes_few_launches_and_bytes(sizes: tuple[int, int, int, int], most_bytes: int) -> None:
    op, tensors = launches.ours(*sizes)
    forward, backward = forward_backward(op, tensors)
    assert len(forward) == 1 and len(forward) + len(backward) <= 6
    n_token_heads = math.prod(tensors["dt_BTH"].shape)
    assert sum(launch.n_bytes for launch in (*forward, *backward)) / n_token_heads <= most_bytes


def test_peers_are_counted_without_their_init_and_named_when_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "source" / "mamba_ssm" / "ops" / "triton"
    folder.mkdir(parents=True)
    (folder.parents[1] / "__init__.py").write_text("raise ImportError('needs a GPU')")
    (folder / "ssd_combined.py").write_text(PEER)
    monkeypatch.setattr(sys, "modules", sys.modules.copy())
    written = tmp_path / "rows.json"
    arguments = ["--mamba-ssm", str(tmp_path / "source"), "--fla", str(tmp_path), "--json", str(written)]
    assert launches.main(arguments) == 0
    assert "fla is missing" in capsys.readouterr().err
    rows = json.loads(written.read_text())
    peers = [row for row in rows if row["contestant"] == "mamba-ssm"]
    assert [row["shape"]["N"] for row in peers] == [64, 128, 128]
    assert peers[0]["forward"] == {"launches": 1, "bytes_per_token_head": 256, "names": ["mul (torch)"]}
    assert len([row for row in rows if "V" in row["shape"]]) == 6
