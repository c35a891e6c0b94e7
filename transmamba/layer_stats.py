"""Per-layer statistics of one step, on request: size of the activations and of their gradients."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def layer_stats(layers: nn.ModuleList) -> Iterator[dict[str, list[float]]]:
    """Watch the layers' outputs while the block runs.

    Yields:
        A dictionary that holds, after the block, one number per layer: `output_rms`, and `output_grad_rms` (of the
        gradient that comes back into the layer), root mean squares over everything the block computed.
    """
    names = ("output_rms", "output_grad_rms")
    squares = {name: [torch.zeros(()) for _ in layers] for name in names}
    counts = {name: [0 for _ in layers] for name in names}

    def note(name: str, index: int, values: Tensor) -> None:
        squares[name][index] = squares[name][index] + values.float().square().sum().cpu()
        counts[name][index] += values.numel()

    def watch(index: int) -> Any:
        def on_output(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            note("output_rms", index, output.detach())
            if output.requires_grad:
                output.register_hook(lambda gradient: note("output_grad_rms", index, gradient))

        return on_output

    handles = [layer.register_forward_hook(watch(index)) for index, layer in enumerate(layers)]
    result: dict[str, list[float]] = {}
    try:
        yield result
    finally:
        for handle in handles:
            handle.remove()
    for name in names:
        result[name] = [
            (float(total) / max(count, 1)) ** 0.5 for total, count in zip(squares[name], counts[name], strict=True)
        ]
