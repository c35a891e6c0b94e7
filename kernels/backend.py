"""Which code runs an operation: the device of its tensors decides, nothing else."""

import torch
from torch import Tensor


def runs_triton(stream: Tensor) -> bool:
    """True for CUDA tensors; float64 keeps the torch path everywhere, because Triton's kernels sum in float32."""
    return stream.is_cuda and stream.dtype != torch.float64


def runs_varlen(q_stream: Tensor, v_stream: Tensor) -> bool:
    """True for what torch's attention over packed documents takes: CUDA, 16 bits, one width of 8, 16, ... 256."""
    width = q_stream.shape[-1]
    fits = width == v_stream.shape[-1] and width % 8 == 0 and width <= 256
    return q_stream.is_cuda and q_stream.dtype in (torch.bfloat16, torch.float16) and fits
