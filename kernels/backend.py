"""Which code runs an operation: the device of its tensors decides, nothing else."""

import torch
from torch import Tensor


def runs_triton(stream: Tensor) -> bool:
    """True for CUDA tensors; float64 keeps the torch path everywhere, because Triton's kernels sum in float32."""
    return stream.is_cuda and stream.dtype != torch.float64
