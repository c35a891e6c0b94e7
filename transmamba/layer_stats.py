"""Per-layer statistics of one step, on request: size of the activations and of their gradients."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from transmamba.parallel.topology import Topology


@contextmanager
def layer_stats(layers: Mapping[int, nn.Module], n_layers: int, topology: Topology) -> Iterator[dict[str, list[float]]]:
    """Watch the layers' outputs while the block runs.

    Args:
        layers: those on this rank, by number.
        n_layers: of the whole model.
        topology: the ranks among which layers and tokens are spread; all must be in the block.

    Yields:
        A dictionary that holds, after the block, one number per layer: `output_rms`, and `output_grad_rms` (of the
        gradient that comes back into the layer), root mean squares over everything the block computed.
    """
    names = ("output_rms", "output_grad_rms")
    sums = torch.zeros(2, len(names), n_layers, dtype=torch.float64)  # of squares, and how many

    def note(kind: int, index: int, values: Tensor) -> None:
        sums[0, kind, index] += values.float().square().sum().cpu()
        sums[1, kind, index] += values.numel()

    def watch(index: int) -> Any:
        def on_output(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            note(0, index, output.detach())
            if output.requires_grad:
                output.register_hook(lambda gradient: note(1, index, gradient))

        return on_output

    handles = [layer.register_forward_hook(watch(index)) for index, layer in layers.items()]
    result: dict[str, list[float]] = {}
    try:
        yield result
    finally:
        for handle in handles:
            handle.remove()
    squares, counts = topology.sum_all(sums)
    # The loss is scaled by the number of replicas, whose gradients ZeRO averages.
    scales = (1.0, 1.0 / topology.replicas)
    for kind, name in enumerate(names):
        result[name] = ((squares[kind] / counts[kind].clamp(min=1)).sqrt() * scales[kind]).tolist()
