"""Lets megatron-core run without a GPU: the places where it names the CUDA device outright. Inert with a GPU.

Line numbers are megatron-core 0.16.1's.
"""

import types

import torch


class _CpuTorch(types.ModuleType):
    """Stands in for the name `torch` inside one module: factories asked for "cuda" give CPU tensors."""

    def __init__(self) -> None:
        super().__init__("torch")

    def __getattr__(self, name: str) -> object:
        attribute = getattr(torch, name)
        if name not in ("zeros", "tensor"):
            return attribute

        def factory(*args: object, **kwargs: object) -> torch.Tensor:
            return attribute(*args, **{**kwargs, "device": "cpu"})

        return factory


def adapt_megatron() -> None:
    """Patch megatron-core for CPU tensors; does nothing when CUDA is available."""
    if torch.cuda.is_available():
        return
    from megatron.core.pipeline_parallel import schedules

    # tensor_parallel/layers.py 261 ff., mappings.py 91 ff., p2p_communication.py 190 ff., parallel_state.py 931:
    # device=torch.cuda.current_device()
    torch.cuda.current_device = lambda: torch.device("cpu")  # pyright: ignore[reportAttributeAccessIssue]
    # p2p_communication.py 242 and 398: torch.cuda.synchronize() as an ordering hint
    torch.cuda.synchronize = lambda device=None: None
    # pipeline_parallel/schedules.py 596, 983, 2138: torch.zeros([], device="cuda")
    schedules.torch = _CpuTorch()  # pyright: ignore[reportAttributeAccessIssue]
