"""The scan on a GPU beside mamba-ssm and flash-linear-attention: 65,536 tokens, in rows of several lengths."""
# B batch, T tokens, H heads, G groups of B and C, N key/state width, V value width.

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from transmamba.doctor.report import kernel_findings
from transmamba.kernels import launches
from transmamba.kernels.cases import cases

N_TOKENS = 65_536
LENGTHS = (2048, 8192, 32_768, 65_536)
# How many times as fast as a peer the scan is meant to be, by peer and whether every head has its own B and C.
WANTED = {("mamba-ssm", True): 4.0, ("fla", True): 1.3, ("mamba-ssm", False): 1.5}

Measure = Callable[[Callable[[], Any]], float]  # median seconds of a call
Sizes = tuple[int, int, int, int]


def median_seconds(call: Callable[[], Any]) -> float:
    """Median seconds of a call on the GPU, caches cleared before each."""
    from triton.testing import do_bench

    median = do_bench(call, return_mode="median")
    assert isinstance(median, float)
    return median / 1e3


def scan_rows(
    contestants: dict[str, launches.Contestant],
    device: torch.device,
    measure: Measure = median_seconds,
    shapes: tuple[Sizes, ...] = launches.SHAPES,
    n_tokens: int = N_TOKENS,
) -> Iterator[dict[str, Any]]:
    """Check the scan against float64, then time it and its peers, forward and with backward.

    Args:
        contestants: by name; "transmamba" is ours.
        measure: times a call.
        shapes: H, G, N, V.
        n_tokens: tokens of all rows together; lengths above it are left out.

    Yields:
        One dict a shape, length, direction and peer: `row`, `unit`, `ours`, `peers`, `best_peer`, `ratio`, `target`;
        `missing` says why a peer has no time.

    Raises:
        AssertionError: the scan computes wrong numbers here; nothing is timed then.
    """
    for finding in kernel_findings(list(cases("ssd")), device, is_small=device.type == "cpu"):
        assert finding.verdict == "ok", f"{finding.check}: {finding.value}"
    for sizes in shapes:
        for length in (length for length in LENGTHS if length <= n_tokens):
            times = {
                name: _times(contestant, sizes, (n_tokens // length, length), device, measure)
                for name, contestant in contestants.items()
            }
            yield from _rows(times, sizes, length)


def _times(
    contestant: launches.Contestant, sizes: Sizes, shape: tuple[int, int], device: torch.device, measure: Measure
) -> tuple[float, float] | str:
    """Seconds of forward, and of forward and backward; or why there are none."""
    try:
        op, described = contestant(*sizes)
        inputs = {name: _drawn(name, value, shape, device) for name, value in described.items()}
        leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}

        def forward() -> Tensor:
            result = op(**inputs)
            return result[0] if isinstance(result, tuple) else result

        def both() -> tuple[Tensor, ...]:
            result = op(**leaves)
            result = result[0] if isinstance(result, tuple) else result
            return torch.autograd.grad(result, list(leaves.values()), result.detach())

        with torch.no_grad():
            seconds = measure(forward)
        return seconds, measure(both)
    except Exception as error:  # a peer may fail in any way on hardware it was not made for; ours may not
        if contestant is launches.ours:
            raise
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _drawn(name: str, described: Tensor, shape: tuple[int, int], device: torch.device) -> Tensor:
    """Values for an input: streams get the rows and tokens of `shape`; decays are negative."""
    sizes = (*shape, *described.shape[2:]) if described.dim() > 1 else tuple(described.shape)
    values = torch.randn(sizes, device=device)
    if name in ("A", "A_H"):
        values = -values.abs() - 0.5
    if name == "g":
        values = -values.abs() * 0.1
    if name in ("dt", "dt_BTH"):
        values = values - 2
    return values.to(described.dtype)


def _rows(times: dict[str, tuple[float, float] | str], sizes: Sizes, length: int) -> Iterator[dict[str, Any]]:
    ours = times["transmamba"]
    n_heads, n_groups, n_keys, n_values = sizes
    for direction, what in enumerate(("forward", "forward + backward")):
        row = f"scan {what}, bf16, H{n_heads} G{n_groups} N{n_keys} V{n_values} T{length}"
        for peer, theirs in times.items():
            if peer == "transmamba" and len(times) > 1:
                continue
            if isinstance(ours, str) or isinstance(theirs, str):
                yield {"row": row, "missing": ours if isinstance(ours, str) else f"{peer}: {theirs}"}
                continue
            yield {
                "row": row,
                "unit": "s",
                "ours": ours[direction],
                "peers": {peer: theirs[direction]},
                "best_peer": peer,
                "ratio": theirs[direction] / ours[direction],
                "target": WANTED.get((peer, n_groups == n_heads), 1.0),
            }
