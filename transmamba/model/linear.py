"""Projections of a sharded layer: into tensor-parallel work by columns, out of it by rows. Sizes given are global."""
# B batch, T tokens, C channels in or out, F feed-forward width.

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transmamba.parallel.shards import Shards


def column_linear(n_in: int, n_out: int, shards: Shards) -> nn.Linear:
    """From whole inputs to this rank's outputs; the input comes from `Shards.gather_tokens`."""
    return shards.split(nn.Linear(n_in, shards.local(n_out), bias=False))


class RowLinear(nn.Module):
    """From this rank's inputs to whole outputs, summed over the ranks."""

    def __init__(self, n_in: int, n_out: int, shards: Shards):
        super().__init__()
        self.shards = shards
        self.weight = nn.Parameter(torch.empty(n_out, shards.local(n_in)))
        shards.split(self, dim=1)

    def forward(self, x_TBC: Tensor) -> Tensor:
        return self.shards.sum_partial(F.linear(x_TBC, self.weight))


class GateUp(nn.Module):
    """Gate and up projections in one weight [2, F, C]: a shard of F is a slice of both, and they are one product."""

    def __init__(self, n_in: int, width: int, shards: Shards):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2, shards.local(width), n_in))
        shards.split(self, dim=1)

    def forward(self, x_TBC: Tensor) -> tuple[Tensor, Tensor]:
        gate_TBF, up_TBF = F.linear(x_TBC, self.weight.flatten(0, 1)).chunk(2, dim=-1)
        return gate_TBF, up_TBF
