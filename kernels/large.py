"""Streams of more than 2^31 elements: the last tokens must come out, and send back, as they do on their own.

Offsets of 32 bits overflow there and nowhere else. The last tokens alone start from the state of all the others, which
is made in pieces of less than 2^31 elements.
"""
# B batch, T tokens, H heads, N key/state width, V value width, C channels, K conv taps.

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import softplus

from transmamba.kernels.causal_conv import causal_conv
from transmamba.kernels.gated_norm import gated_rms_norm
from transmamba.kernels.rope import rope_qk
from transmamba.kernels.ssd import final_state, ssd_scan
from transmamba.kernels.testing import relative_rms

N_HEADS, WIDTH, TAPS = 32, 64, 4
N_TOKENS = 2**31 // (N_HEADS * WIDTH) + 8192
TAIL, PIECE = 4096, 2**18
TOLERANCE = 2e-2  # of bfloat16: chunks of the whole row and of its tail may fall differently
MEMORY_GB = 60  # that a device needs for it


def far_errors(
    device: torch.device, dtype: torch.dtype = torch.bfloat16, n_tokens: int = N_TOKENS, tail: int = TAIL
) -> Iterator[tuple[str, float]]:
    """Relative RMS differences, by operation and result, between a row's last tokens and the same tokens alone.

    Args:
        device: with `MEMORY_GB` free for the full size.
        n_tokens: of one row of 32 heads of 64.
        tail: tokens that are compared.
    """
    torch.manual_seed(0)
    draw = torch.Generator(device).manual_seed(0)

    def stream() -> Tensor:
        values = torch.empty(1, n_tokens, N_HEADS, WIDTH, device=device, dtype=dtype)
        return values.normal_(generator=draw).mul_(WIDTH**-0.5).requires_grad_()

    yield from _scan(stream(), stream(), stream(), tail)
    yield from _conv(stream(), tail)
    yield from _norm(stream(), stream(), tail)
    yield from _rope(stream(), stream(), tail)


def _scan(c_BTHN: Tensor, b_BTHN: Tensor, x_BTHV: Tensor, tail: int) -> Iterator[tuple[str, float]]:
    dt_BTH = softplus(torch.randn(x_BTHV.shape[:3], device=x_BTHV.device) - 4)
    decay_H = -torch.exp(torch.rand(x_BTHV.shape[2], device=x_BTHV.device))
    whole, _ = ssd_scan(c_BTHN, b_BTHN, x_BTHV, dt_BTH, decay_H)
    state, first = None, x_BTHV.shape[1] - tail
    with torch.no_grad():
        for start in range(0, first, PIECE):
            part = slice(start, min(start + PIECE, first))
            keys, values = b_BTHN[:, part], x_BTHV[:, part]
            state = final_state(keys, values, dt_BTH[:, part], decay_H, initial_state_BHNV=state)
    c, b, x = (_end(stream, tail) for stream in (c_BTHN, b_BTHN, x_BTHV))
    alone, _ = ssd_scan(c, b, x, dt_BTH[:, first:], decay_H, initial_state_BHNV=state)
    yield from _compared("ssd", whole, alone, {"c": c_BTHN, "b": b_BTHN, "x": x_BTHV}, [c, b, x])


def _conv(x_BTHV: Tensor, tail: int) -> Iterator[tuple[str, float]]:
    n_channels = x_BTHV.shape[2] * x_BTHV.shape[3]
    weight_CK = torch.randn(n_channels, TAPS, device=x_BTHV.device)
    bias_C = torch.randn(n_channels, device=x_BTHV.device)
    end = _end(x_BTHV, tail)
    before_BKC = x_BTHV.detach().flatten(2)[:, -tail - TAPS + 1 : -tail]
    whole = causal_conv(x_BTHV.flatten(2), weight_CK, bias_C)
    alone = causal_conv(end.flatten(2), weight_CK, bias_C, tail_BKC=before_BKC)
    yield from _compared("causal_conv", whole, alone, {"x": x_BTHV}, [end])


def _norm(y_BTHV: Tensor, z_BTHV: Tensor, tail: int) -> Iterator[tuple[str, float]]:
    weight_HV = torch.ones(y_BTHV.shape[2:], device=y_BTHV.device)
    ends = [_end(stream, tail) for stream in (y_BTHV, z_BTHV)]
    whole, alone = gated_rms_norm(y_BTHV, weight_HV, z_BTHV), gated_rms_norm(ends[0], weight_HV, ends[1])
    yield from _compared("gated_norm", whole, alone, {"y": y_BTHV, "z": z_BTHV}, ends)


def _rope(q_BTHN: Tensor, k_BTHN: Tensor, tail: int) -> Iterator[tuple[str, float]]:
    pos_BT = torch.arange(q_BTHN.shape[1], device=q_BTHN.device)[None]
    q, k = (_end(stream, tail) for stream in (q_BTHN, k_BTHN))
    for name, stream, end in (("q", q_BTHN, q), ("k", k_BTHN, k)):
        both = rope_qk(q_BTHN, k_BTHN, pos_BT), rope_qk(q, k, pos_BT[:, -tail:])
        whole, alone = (turned[name == "k"] for turned in both)
        yield from _compared(f"rope of {name}", whole, alone, {name: stream}, [end])


def _end(stream: Tensor, tail: int) -> Tensor:
    return stream.detach()[:, -tail:].clone().requires_grad_()


def _compared(
    name: str, whole: Tensor, alone: Tensor, streams: dict[str, Tensor], ends: list[Tensor]
) -> Iterator[tuple[str, float]]:
    """Values and gradients of the last tokens; what comes after them is nothing, so both know the same."""
    tail = alone.shape[1]
    yield f"{name} values", relative_rms(whole[:, -tail:], alone)
    gradients = torch.autograd.grad(whole, list(streams.values()), whole.detach())
    expected = torch.autograd.grad(alone, ends, alone.detach())
    for stream, found, wanted in zip(streams, gradients, expected, strict=True):
        yield f"{name} gradient of {stream}", relative_rms(found[:, -tail:], wanted)
