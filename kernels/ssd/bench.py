"""Speed and memory of the scan against its definition and against mamba-ssm, on the CPU.

Every row is checked for right numbers before it is timed, and the contestants take turns in one process.
`python -m transmamba.kernels.ssd.bench N_THREADS CONTESTANT [PATH]` prints the bytes that one forward and
backward add to a fresh process; the memory row starts it for each side.
"""

# B batch, T tokens, H heads, N key/state width, V value width.

import importlib.util
import os
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from transmamba.kernels.ssd.reference import scan_loop
from transmamba.kernels.ssd.scan import ssd_scan
from transmamba.kernels.testing import assert_close, assert_matches_reference

Inputs = dict[str, Tensor]
Scan = Callable[[Inputs], Tensor]

N_TOKENS, N_TOKENS_LOOP, N_TOKENS_CHECK = 8192, 4096, 512
PEER_CHUNKS = (64, 128, 256)
MOST_ROUNDS = 15


def rows(budget_s: float, mamba_ssm: str | None = None) -> Iterator[dict[str, Any]]:
    """Measure, row by row.

    Args:
        budget_s: seconds to spend on timing, shared between the rows; each has at least three rounds.
        mamba_ssm: folder of an unpacked mamba-ssm; default the installed package, if there is one.

    Yields:
        One dict a row: `row` (its name), `ours` and `peers` (in `unit`), `best_peer`, `ratio` (best peer over
        ours; for times the median over rounds), `target`, `error` (relative RMS allowed), `rounds`.
        A peer that is missing is named in `missing` instead.

    Raises:
        AssertionError: a contestant computes something else.
        ValueError: `mamba_ssm` has no ssd_minimal.py.
    """
    torch.manual_seed(0)
    assert_matches_reference(ssd_scan, scan_loop, inputs_of(N_TOKENS_CHECK), 1e-4)
    peer = load_peer(mamba_ssm)
    if peer is None:
        yield {"row": "scan against mamba-ssm", "missing": "mamba-ssm (install it or pass --mamba-ssm PATH)"}
    else:
        contestants = {"ours": ours} | {f"mamba-ssm chunk {size}": peer_scan(peer, size) for size in PEER_CHUNKS}
        inputs = inputs_of(N_TOKENS)
        for name, target, step in (("forward", 1.8, forward), ("forward + backward", 2.0, forward_backward)):
            check(contestants, inputs, step)
            row = f"scan {name}, float32, B1 H8 N64 V64 T{N_TOKENS}"
            yield time_row(row, contestants, inputs, step, budget_s * 0.4) | {"target": target}
        yield memory_row(mamba_ssm)
    contestants = {"ours": ours, "token loop": token_loop}
    inputs = inputs_of(N_TOKENS_LOOP)
    for name, step in (("forward", forward), ("forward + backward", forward_backward)):
        check(contestants, inputs, step)
        row = f"scan {name}, float32, B1 H8 N64 V64 T{N_TOKENS_LOOP}"
        yield time_row(row, contestants, inputs, step, budget_s * 0.1) | {"target": 50.0}


def inputs_of(n_tokens: int) -> Inputs:
    """Random streams, in the order of the scan's arguments, with step sizes and decay rates as at initialisation."""
    streams = {name: torch.randn(1, n_tokens, 8, 64) for name in ("c_BTGN", "b_BTGN", "x_BTHV")}
    dt_BTH = softplus(torch.randn(1, n_tokens, 8) - 4)
    return {**streams, "dt_BTH": dt_BTH, "A_H": -torch.exp(torch.rand(8))}


def load_peer(path: str | None) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """mamba-ssm's `ssd_minimal_discrete`, from a folder or the installed package; None if there is none.

    Its module imports GPU code that the CPU does not need; an empty stand-in takes that place while it loads.
    """
    if path is None:
        spec = importlib.util.find_spec("mamba_ssm")
        if spec is None or not spec.submodule_search_locations:
            return None
        path = spec.submodule_search_locations[0]
    found = [file for file in Path(path).rglob("ssd_minimal.py") if file.parent.name == "modules"]
    if not found:
        raise ValueError(f"{path} has no modules/ssd_minimal.py of mamba-ssm")
    names = ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.ops.triton.ssd_combined")
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update({name: types.ModuleType(name) for name in names})
    sys.modules[names[-1]].__dict__["mamba_chunk_scan_combined"] = None
    try:
        spec = importlib.util.spec_from_file_location("ssd_minimal", found[0])
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        for name, value in before.items():
            if value is None:
                del sys.modules[name]
            else:
                sys.modules[name] = value
    return module.ssd_minimal_discrete


def ours(inputs: Inputs) -> Tensor:
    """The library's scan."""
    c_BTGN, b_BTGN, x_BTHV, dt_BTH, A_H = inputs.values()
    return ssd_scan(c_BTGN, b_BTGN, x_BTHV, dt_BTH, A_H)[0]


def token_loop(inputs: Inputs) -> Tensor:
    """The definition."""
    c_BTGN, b_BTGN, x_BTHV, dt_BTH, A_H = inputs.values()
    return scan_loop(c_BTGN, b_BTGN, x_BTHV, dt_BTH, A_H)[0]


def peer_scan(peer: Callable[..., tuple[Tensor, Tensor]], chunk: int) -> Scan:
    """The same numbers from mamba-ssm: it takes x * dt and A * dt."""

    def scan(inputs: Inputs) -> Tensor:
        dt_BTH = inputs["dt_BTH"]
        x_BTHV, decay_BTH = inputs["x_BTHV"] * dt_BTH[..., None], inputs["A_H"] * dt_BTH
        return peer(x_BTHV, decay_BTH, inputs["b_BTGN"], inputs["c_BTGN"], chunk)[0]

    return scan


def forward(scan: Scan, inputs: Inputs) -> list[Tensor]:
    """Outputs, without gradients."""
    with torch.no_grad():
        return [scan(inputs)]


def forward_backward(scan: Scan, inputs: Inputs) -> list[Tensor]:
    """Outputs and the gradients of all inputs."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    y_BTHV = scan(leaves)
    return [y_BTHV, *torch.autograd.grad(y_BTHV, [*leaves.values()], torch.ones_like(y_BTHV))]


def check(contestants: dict[str, Scan], inputs: Inputs, step: Callable[[Scan, Inputs], list[Tensor]]) -> None:
    """Fail unless all contestants compute the same; also their warm-up."""
    expected = step(contestants["ours"], inputs)
    for name, scan in contestants.items():
        for index, (actual, wanted) in enumerate(zip(step(scan, inputs), expected, strict=True)):
            assert_close(actual, wanted, 1e-4, f"{name}, result {index}")


def time_row(
    row: str,
    contestants: dict[str, Scan],
    inputs: Inputs,
    step: Callable[[Scan, Inputs], list[Tensor]],
    budget_s: float,
) -> dict[str, Any]:
    """Three rounds of everybody find the best peer; then ours and that one take turns until the budget is spent."""

    def seconds(name: str) -> float:
        before = time.perf_counter()
        step(contestants[name], inputs)
        return time.perf_counter() - before

    started_at = time.perf_counter()
    trials = [{name: seconds(name) for name in contestants} for _ in range(3)]
    medians = {name: statistics.median(trial[name] for trial in trials) for name in contestants if name != "ours"}
    best = min(medians, key=lambda name: medians[name])
    pairs: list[tuple[float, float]] = []
    while len(pairs) < 3 or (len(pairs) < MOST_ROUNDS and time.perf_counter() - started_at < budget_s):
        pairs.append((seconds("ours"), seconds(best)))
    return {
        "row": row,
        "unit": "s",
        "ours": statistics.median(mine for mine, _ in pairs),
        "peers": medians | {best: statistics.median(peer for _, peer in pairs)},
        "best_peer": best,
        "ratio": statistics.median(peer / mine for mine, peer in pairs),
        "rounds": len(pairs),
        "error": 1e-4,
    }


def memory_row(mamba_ssm: str | None) -> dict[str, Any]:
    """Peak memory that forward and backward add, each contestant in a process of its own."""
    command = [sys.executable, "-m", "transmamba.kernels.ssd.bench", str(torch.get_num_threads())]
    path = [] if mamba_ssm is None else [mamba_ssm]
    peaks: dict[str, int] = {}
    for chunk in (0, *PEER_CHUNKS):
        done = subprocess.run([*command, str(chunk), *path], check=True, capture_output=True, text=True)
        peaks[f"mamba-ssm chunk {chunk}" if chunk else "ours"] = int(done.stdout)
    own = peaks.pop("ours")
    best = min(peaks, key=lambda name: peaks[name])
    row = f"scan forward + backward, peak memory, float32, B1 H8 N64 V64 T{N_TOKENS}"
    result = {"row": row, "unit": "bytes", "ours": own, "peers": peaks, "best_peer": best}
    return result | {"ratio": peaks[best] / own, "target": 2.0, "rounds": 1, "error": 1e-4}


def added_bytes(chunk: int, mamba_ssm: str | None) -> int:
    """Peak resident memory of one forward and backward above what was there before; chunk 0 is ours."""
    peer = load_peer(mamba_ssm) if chunk else None
    scan = ours if peer is None else peer_scan(peer, chunk)
    forward_backward(scan, inputs_of(N_TOKENS_CHECK))
    inputs = inputs_of(N_TOKENS)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    forward_backward(scan, inputs)
    # not ru_maxrss, which a process inherits from the one that started it
    peak_kib = next(
        int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return peak_kib * 1024 - resident


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    print(added_bytes(int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None))
