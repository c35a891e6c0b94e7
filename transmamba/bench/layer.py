"""`transmamba bench layer`: a layer of every kind at every length, and TransMamba at many TransPoints.

Forward and backward of one layer with its feed-forward network; d_ff is that of the presets with equal parameters. The
curve over TransPoints is predicted from three timings of kernels alone: attention costs a P^2, a scanned token s, and
a token that only enters the state c, so the cheapest TransPoint is (s - c) / (2 a), at any length.
"""
# B batch, T tokens, D model width, H heads, N key/state width.

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from transmamba.bench.cuda import median_seconds
from transmamba.bench.rows import Row, Work, measure_rows
from transmamba.compose import load
from transmamba.config import ModelConfig, head_width
from transmamba.kernels.attention import prefix_attention
from transmamba.kernels.documents import Documents
from transmamba.kernels.ssd import ssd_scan
from transmamba.kernels.ssd.bench import MOST_ROUNDS
from transmamba.model.init import initialise
from transmamba.model.layer import Layer

POINTS = (0, 64, 128, 256, 512, 1024, 2048, 4096)
Measure = Callable[[Callable[[], Any]], float]


def bench_layer(budget_s: float, out: Path, preset: str, lengths: list[int], n_tokens: int) -> int:
    """Time the layers of a preset's three kinds; prints as it goes, writes `out`/<hardware>/layer.json, returns 0.

    Args:
        budget_s: seconds after which no new row is begun; the same command goes on.
        out: folder of results.
        preset: a model preset whose `_transformer` and `_mamba2` have equal parameters.
        lengths: tokens per window.
        n_tokens: tokens of all windows together; a longer window stands alone.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    measure: Measure = median_seconds if device.type == "cuda" else _cpu_seconds
    settings = {"preset": preset, "n_tokens": n_tokens, "dtype": str(_dtype(device))}
    work = _work(preset, lengths, n_tokens, device, measure)
    rows = measure_rows("layer", work, budget_s, out, settings)
    print("\n".join(_summary({row["row"]: row for row in rows if "error" not in row}, lengths)))
    return 0


def cheapest_point(attention_s: float, at_tokens: int, scan_s: float, state_s: float, length: int) -> float:
    """The TransPoint (tokens) at which a layer of any length is cheapest, by the kernels' own times.

    Args:
        attention_s: of one window of `at_tokens` tokens.
        scan_s: of one window of `length` tokens, every one with an output.
        state_s: of the same window when its tokens only enter the state.
    """
    per_square = attention_s / at_tokens**2
    return max(scan_s - state_s, 0.0) / length / (2 * per_square)


def _work(preset: str, lengths: list[int], n_tokens: int, device: torch.device, measure: Measure) -> Iterator[Work]:
    for length in lengths:
        shape = (max(n_tokens // length, 1), length)

        def layer(kind: str, point: int | float, shape: tuple[int, int] = shape) -> Row:
            return _layer_row(preset, kind, point, shape, device, measure)

        for kind, point in (("transformer", math.inf), ("mamba2", 0)):
            yield f"T{length} {kind}", lambda kind=kind, point=point, layer=layer: layer(kind, point)
        for point in (*(point for point in POINTS if point < length), length):
            yield f"T{length} transmamba P{point}", lambda point=point, layer=layer: layer("transmamba", point)
        yield (
            f"T{length} cheapest TransPoint, predicted by kernels",
            lambda shape=shape: _prediction(_model(preset, "transmamba"), shape, device, measure),
        )


def _layer_row(
    preset: str, kind: str, point: int | float, shape: tuple[int, int], device: torch.device, measure: Measure
) -> Row:
    model = _model(preset, kind)
    layer = Layer(model, kind)
    initialise(layer, model, seed=0, prefix="layers.0.")
    layer = layer.to(device)
    for weight in layer.parameters():
        weight.data = weight.data.to(_dtype(device))  # buffers keep their float32, as in training
    documents = Documents.whole(*shape, device)
    n_rows, length = shape
    x_TBD = torch.randn(length, n_rows, model.d_model, device=device, dtype=_dtype(device), requires_grad=True)
    weights = [x_TBD, *layer.parameters()]

    def both() -> tuple[Tensor, ...]:
        y_TBD = layer(x_TBD, point, documents)
        return torch.autograd.grad(y_TBD, weights, y_TBD.detach())

    if not all(grad.isfinite().all() for grad in both()):
        raise ValueError("a gradient is not finite")
    seconds = measure(both)
    return {"seconds": seconds, "tokens_per_s": n_rows * length / seconds}


def _prediction(model: ModelConfig, shape: tuple[int, int], device: torch.device, measure: Measure) -> Row:
    n_rows, length = shape
    at = min(length, 2048)
    sizes = (n_rows, length, model.n_heads, head_width(model))
    q, k, v = (torch.randn(sizes, device=device, dtype=_dtype(device), requires_grad=True) for _ in range(3))
    dt_BTH = softplus(torch.randn(n_rows, length, model.n_heads, device=device) - 4)
    decay_H = -torch.exp(torch.rand(model.n_heads, device=device))
    documents = Documents.whole(n_rows, at, device)

    def attend() -> Any:
        y = prefix_attention(q[:, :at], k[:, :at], v[:, :at], documents, math.inf)
        return torch.autograd.grad(y, [q, k, v], y.detach())

    def scan(point: int) -> Any:
        before = torch.zeros_like(v[:, :point]) if point else None
        y, _ = ssd_scan(q, k, v, dt_BTH, decay_H, transpoint=point, before_BPHV=before)
        return torch.autograd.grad(y, [k, v], torch.ones_like(y))

    attention_s, scan_s = measure(attend), measure(lambda: scan(0))
    state_s = measure(lambda: scan(length - 1))
    point = cheapest_point(attention_s, at, scan_s, state_s, length)
    return {"predicted": point, "attention_s": attention_s, "scan_s": scan_s, "state_s": state_s}


def _summary(rows: dict[str, Row], lengths: list[int]) -> Iterator[str]:
    for length in lengths:
        base, found = rows.get(f"T{length} transformer"), {}
        for point in (*POINTS, length):
            if f"T{length} transmamba P{point}" in rows:
                found[point] = rows[f"T{length} transmamba P{point}"]["seconds"]
        if base is None or not found:
            continue
        best = min(found, key=lambda point: found[point])
        predicted = rows.get(f"T{length} cheapest TransPoint, predicted by kernels", {}).get("predicted", math.nan)
        yield (
            f"T{length}: cheapest measured TransPoint {best}, predicted {predicted:.0f}; "
            f"{base['seconds'] / found[best]:.2f}x the transformer layer's speed"
        )


def _model(preset: str, kind: str) -> ModelConfig:
    return load([f"model={preset}{'' if kind == 'transmamba' else f'_{kind}'}"]).model


def _dtype(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _cpu_seconds(call: Callable[[], Any]) -> float:
    from statistics import median
    from time import perf_counter

    call()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < 1 and len(times) < MOST_ROUNDS):
        started = perf_counter()
        call()
        times.append(perf_counter() - started)
    return median(times)
