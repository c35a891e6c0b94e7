"""The TransMamba layer, written a second time from the paper's equations: loops, nothing of ours but the weights."""
# T tokens, D model width, H heads, N key/state width, V value width, C conv channels, K conv taps. One row at a time.

import math

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from transmamba.model.mixer import TransMambaMixer


def oracle_rows(mixer: TransMambaMixer, x_TBD: Tensor, transpoint: float, starts: list[list[int]]) -> Tensor:
    """The mixer's output [T, B, D] for packed rows: every document on its own, token by token."""
    rows = []
    for row, offsets in enumerate(starts):
        ends = [*offsets[1:], x_TBD.shape[0]]
        documents = [oracle(mixer, x_TBD[start:end, row], transpoint) for start, end in zip(offsets, ends, strict=True)]
        rows.append(torch.cat(documents))
    return torch.stack(rows, dim=1)


def oracle(mixer: TransMambaMixer, x_TD: Tensor, transpoint: float) -> Tensor:
    """One document: attention for t < P, the whole recurrence for t >= P, both from the same projections."""
    n_heads, (width, activation, rope, theta) = mixer.A_log.start.numel(), mixer.options
    weight, bias = mixer.conv.weight, mixer.conv.bias
    n_tokens, taps = x_TD.shape[0], weight.shape[1]
    streams = x_TD @ mixer.qkv.weight.T
    convolved = []
    for t in range(n_tokens):
        total = bias
        for tap in range(taps):
            source = t - (taps - 1) + tap
            if source >= 0:
                total = total + weight[:, tap] * streams[source]
        convolved.append(silu(total) if activation == "silu" else total)
    qkv_THE = torch.stack(convolved).view(n_tokens, n_heads, 3 * width)
    q_THN, k_THN, v_THV = qkv_THE.split(width, dim=-1)
    if rope == "both":
        q_THN, k_THN = _rotate(q_THN, theta), _rotate(k_THN, theta)
    dt_TH = softplus(x_TD @ mixer.dt.weight.T + mixer.dt_bias.start + mixer.dt_bias.offset)
    rate_H = -(mixer.A_log.start + mixer.A_log.offset).exp()
    q_rotated, k_rotated = (_rotate(q_THN, theta), _rotate(k_THN, theta)) if rope == "attention" else (q_THN, k_THN)
    z_THV = (x_TD @ mixer.z.weight.T).view(n_tokens, n_heads, width)
    state_HNV = x_TD.new_zeros(n_heads, width, width)
    outputs = []
    for t in range(n_tokens):
        decay_H11 = (rate_H * dt_TH[t]).exp()[:, None, None]
        written_HNV = dt_TH[t][:, None, None] * k_THN[t][:, :, None] * v_THV[t][:, None, :]
        state_HNV = decay_H11 * state_HNV + written_HNV
        if t < transpoint:
            scores_Hs = (q_rotated[t] * k_rotated[: t + 1]).sum(-1).T / math.sqrt(width)
            y_HV = torch.einsum("hs,shv->hv", scores_Hs.softmax(-1), v_THV[: t + 1])
        else:
            y_HV = torch.einsum("hn,hnv->hv", q_THN[t], state_HNV)
            if mixer.D is not None:
                y_HV = y_HV + (mixer.D.start + mixer.D.offset)[:, None] * v_THV[t]
            y_HV = y_HV * silu(z_THV[t])
        if mixer.mixer_norm is not None:
            y_HV = y_HV / torch.sqrt((y_HV**2).mean(-1, keepdim=True) + mixer.eps) * mixer.mixer_norm.weight
        outputs.append(y_HV.flatten() @ mixer.out.weight.T)
    return torch.stack(outputs)


def _rotate(x_THN: Tensor, theta: float) -> Tensor:
    half = x_THN.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=x_THN.dtype) / half)
    angle = torch.arange(x_THN.shape[0], dtype=x_THN.dtype)[:, None, None] * frequency
    first, second = x_THN[..., :half], x_THN[..., half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
