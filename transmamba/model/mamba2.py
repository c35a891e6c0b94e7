"""The mixer of the Mamba-2 baseline (arXiv 2405.21060), as published: expand, shared B and C groups, gated norm."""
# B batch, T tokens, D model width, H heads, G groups, N state width, V value width, C conv channels, I inner width.

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from transmamba.config import ModelConfig
from transmamba.kernels.causal_conv import causal_conv
from transmamba.kernels.documents import Documents
from transmamba.kernels.gated_norm import gated_rms_norm
from transmamba.kernels.ssd import ssd_scan
from transmamba.model.linear import RowLinear, column_linear
from transmamba.model.norm import Conv, HeadNorm, PerHead
from transmamba.model.recompute import run_or_recompute
from transmamba.parallel.shards import WHOLE, Shards


class ScanReadings(NamedTuple):
    """Convolved x, B, C, decay rates, and what the time steps of a run of tokens are made of."""

    x_BTHV: Tensor
    b_BTGN: Tensor
    c_BTGN: Tensor
    dt_BTH: Tensor  # logits: a step is softplus(dt + dt_bias)
    dt_bias_H: Tensor
    A_H: Tensor


class Mamba2Mixer(nn.Module):
    """Project, convolve, scan, gate and normalise per group, project back.

    Rows of `xbc` are grouped: the x of a group's heads, its B, its C, then the next group, so that a shard of groups
    is a contiguous slice. Context-parallel ranks that share a group each get a copy of its B and C.
    """

    def __init__(self, config: ModelConfig, shards: Shards = WHOLE, recompute_mixing: bool = False):
        super().__init__()
        self.shards, self.recompute_mixing = shards, recompute_mixing
        inner, n_groups = config.ssm_expand * config.d_model, config.ssm_groups
        self.state, self.width = config.ssm_state, config.ssm_head_dim
        self.eps = config.norm_eps
        self.n_groups_local = shards.local(n_groups)
        self.copies = shards.cp // math.gcd(self.n_groups_local, shards.cp)
        self.group_inner = inner // n_groups
        channels = inner + 2 * n_groups * self.state
        n_heads = inner // self.width
        self.z = column_linear(config.d_model, inner, shards)
        self.xbc = column_linear(config.d_model, channels, shards)
        self.dt = column_linear(config.d_model, n_heads, shards)
        self.conv = Conv(channels, config.conv_width, shards)
        self.A_log = PerHead(n_heads, shards)
        self.dt_bias = PerHead(n_heads, shards)
        self.D = PerHead(n_heads, shards)
        self.mixer_norm = HeadNorm(n_groups, self.group_inner, shards)
        self.out = RowLinear(inner, config.d_model, shards)

    def forward(self, x_TBD: Tensor, transpoint: int | float, documents: Documents) -> Tensor:
        """Scan inside every document; `transpoint` is 0 for this kind of layer."""
        x_TBD = self.shards.gather_tokens(x_TBD)
        xbc_TBC, dt_TBH = self.shards.tokens_to_heads(self.copy_groups(self.xbc(x_TBD)), self.dt(x_TBD))
        y_BTHV = run_or_recompute(
            self.recompute_mixing, self.scan, xbc_TBC.transpose(0, 1), dt_TBH.transpose(0, 1), documents
        )
        return self.finish(self.shards.heads_to_tokens(y_BTHV.transpose(0, 1).flatten(-2)), x_TBD)

    def scan(self, xbc_BTC: Tensor, dt_BTH: Tensor, documents: Documents) -> Tensor:
        """Convolve and scan some heads of all tokens."""
        read = self.read(xbc_BTC, dt_BTH, documents)
        y_BTHV, _ = ssd_scan(
            c_BTGN=read.c_BTGN,
            b_BTGN=read.b_BTGN,
            x_BTHV=read.x_BTHV,
            dt_BTH=read.dt_BTH,
            A_H=read.A_H,
            dt_bias_H=read.dt_bias_H,
            D_H=self.shards.own_heads(self.D()),
            documents=documents,
        )
        return y_BTHV

    def copy_groups(self, xbc: Tensor) -> Tensor:
        """Give every context-parallel rank that shares a group its heads' x and a copy of B and C."""
        if self.copies == 1:
            return xbc
        groups = xbc.unflatten(-1, (self.n_groups_local, -1))
        x, b, c = groups.split([self.group_inner, self.state, self.state], dim=-1)
        x = x.unflatten(-1, (self.copies, -1))
        b, c = (shared[..., None, :].expand(*x.shape[:-1], -1) for shared in (b, c))
        return torch.cat((x, b, c), dim=-1).flatten(-3)

    def read(self, xbc_BTC: Tensor, dt_BTH: Tensor, documents: Documents | None = None) -> ScanReadings:
        """Convolve and split."""
        xbc_BTC = causal_conv(
            xbc_BTC,
            self.shards.own_heads(self.copy_groups(self.conv.weight.T).T),
            self.shards.own_heads(self.copy_groups(self.conv.bias)),
            documents=documents,
            activation="silu",
        )
        return self.split(xbc_BTC, dt_BTH)

    def split(self, xbc_BTC: Tensor, dt_BTH: Tensor) -> ScanReadings:
        """The convolved streams by head and group."""
        sizes = [self.group_inner // self.copies, self.state, self.state]
        x_BTGI, b_BTGN, c_BTGN = xbc_BTC.unflatten(-1, (-1, sum(sizes))).split(sizes, dim=-1)
        return ScanReadings(
            x_BTGI.unflatten(-1, (-1, self.width)).flatten(2, 3),
            b_BTGN,
            c_BTGN,
            dt_BTH,
            self.shards.own_heads(self.dt_bias()),
            -self.shards.own_heads(self.A_log()).exp(),
        )

    def finish(self, y_TBI: Tensor, x_TBD: Tensor) -> Tensor:
        """Gate, normalise each group's slice of the inner width and project back."""
        y_TBGW, z_TBGW = (inner.unflatten(-1, (self.n_groups_local, -1)) for inner in (y_TBI, self.z(x_TBD)))
        return self.out(gated_rms_norm(y_TBGW, self.mixer_norm.weight, z_TBGW, eps=self.eps).flatten(-2))
