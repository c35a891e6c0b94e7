"""The mixer of the Mamba-2 baseline (arXiv 2405.21060), as published: expand, shared B and C groups, gated norm."""
# B batch, T tokens, D model width, H heads, G groups, N state width, V value width, C conv channels, I inner width.

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from transmamba.config import ModelConfig
from transmamba.kernels.causal_conv import causal_conv
from transmamba.kernels.documents import Documents
from transmamba.kernels.gated_norm import gated_rms_norm
from transmamba.kernels.ssd import ssd_scan
from transmamba.model.norm import Conv, HeadNorm, PerHead


class ScanReadings(NamedTuple):
    """Convolved x, B, C and the time steps of a run of tokens."""

    x_BTHV: Tensor
    b_BTGN: Tensor
    c_BTGN: Tensor
    dt_BTH: Tensor
    A_H: Tensor


class Mamba2Mixer(nn.Module):
    """Project, convolve, scan, gate and normalise per group, project back."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        inner = config.ssm_expand * config.d_model
        self.n_groups, self.state, self.width = config.ssm_groups, config.ssm_state, config.ssm_head_dim
        self.eps = config.norm_eps
        self.sizes = [inner, self.n_groups * self.state, self.n_groups * self.state]
        n_heads = inner // self.width
        self.z = nn.Linear(config.d_model, inner, bias=False)
        self.xbc = nn.Linear(config.d_model, sum(self.sizes), bias=False)
        self.dt = nn.Linear(config.d_model, n_heads, bias=False)
        self.conv = Conv(sum(self.sizes), config.conv_width)
        self.A_log = PerHead(n_heads)
        self.dt_bias = PerHead(n_heads)
        self.D = PerHead(n_heads)
        self.mixer_norm = HeadNorm(self.n_groups, inner // self.n_groups)
        self.out = nn.Linear(inner, config.d_model, bias=False)

    def forward(self, x_TBD: Tensor, transpoint: int | float, documents: Documents) -> Tensor:
        """Scan inside every document; `transpoint` is 0 for this kind of layer."""
        read = self.read(self.xbc(x_TBD).transpose(0, 1), self.dt(x_TBD).transpose(0, 1), documents=documents)
        y_BTHV, _ = ssd_scan(
            c_BTGN=read.c_BTGN,
            b_BTGN=read.b_BTGN,
            x_BTHV=read.x_BTHV,
            dt_BTH=read.dt_BTH,
            A_H=read.A_H,
            D_H=self.D(),
            documents=documents,
        )
        return self.finish(y_BTHV.transpose(0, 1), x_TBD)

    def read(
        self,
        xbc_BTC: Tensor,
        dt_BTH: Tensor,
        *,
        documents: Documents | None = None,
        tail_BKC: Tensor | None = None,
    ) -> ScanReadings:
        """Convolve and split; the time steps stay in float32."""
        xbc_BTC = causal_conv(
            xbc_BTC,
            self.conv.weight,
            self.conv.bias,
            documents=documents,
            activation="silu",
            tail_BKC=tail_BKC,
        )
        x_BTI, b, c = xbc_BTC.split(self.sizes, dim=-1)
        dt_bias_H = self.dt_bias()
        return ScanReadings(
            x_BTI.unflatten(-1, (-1, self.width)),
            b.unflatten(-1, (self.n_groups, self.state)),
            c.unflatten(-1, (self.n_groups, self.state)),
            F.softplus(dt_BTH.to(dt_bias_H.dtype) + dt_bias_H),
            -self.A_log().exp(),
        )

    def finish(self, y_TBHV: Tensor, x_TBD: Tensor) -> Tensor:
        """Gate, normalise each group's slice of the inner width and project back."""
        y_TBGW = y_TBHV.flatten(-2).unflatten(-1, (self.n_groups, -1))
        z_TBGW = self.z(x_TBD).unflatten(-1, (self.n_groups, -1))
        return self.out(gated_rms_norm(y_TBGW, self.mixer_norm.weight, z_TBGW, eps=self.eps).flatten(-2))
