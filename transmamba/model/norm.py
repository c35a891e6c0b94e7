"""Weights that every mixer needs: RMSNorm and per-head vectors in full precision. Sizes given are global."""

import torch
from torch import Tensor, nn

from transmamba.kernels.gated_norm import rms_norm
from transmamba.parallel.shards import WHOLE, Shards


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, statistics in float32."""

    def __init__(self, width: int, eps: float, shards: Shards = WHOLE):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps
        shards.replicated(self)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class PerHead(nn.Module):
    """One float32 number per head: a saved start plus a trained offset that begins at 0.

    bf16 training casts every parameter; a decay rate rounded to bf16 would move in steps of 0.4 %. The start stays
    float32, the offset is small, and their float32 sum is the weight (`A_log`, `D`, `dt_bias`).
    """

    start: Tensor

    def __init__(self, n_heads: int, shards: Shards = WHOLE):
        super().__init__()
        n_local = shards.local(n_heads)
        self.register_buffer("start", torch.empty(n_local))  # cut like the offset
        self.offset = nn.Parameter(torch.empty(n_local))
        shards.split(self)

    def forward(self) -> Tensor:
        return self.start + self.offset.to(self.start.dtype)


class Conv(nn.Module):
    """Taps [channels, width] and bias [channels] of a depthwise causal convolution."""

    def __init__(self, channels: int, width: int, shards: Shards = WHOLE):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shards.local(channels), width))
        self.bias = nn.Parameter(torch.empty(shards.local(channels)))
        shards.split(self)


class HeadNorm(nn.Module):
    """Weight [heads, width] of a norm whose statistics are per head."""

    def __init__(self, n_heads: int, width: int, shards: Shards = WHOLE):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shards.local(n_heads), width))
        shards.split(self)
