"""One token of the scan in Triton: every state is read and written once."""

# B batch, H heads, G groups of B and C, N key/state width, V value width, BV columns of V in a program.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from transmamba.kernels.ssd.triton_tiles import softplus

VALUES_PER_PROGRAM = 4096  # of the state: 32 registers a thread


@triton.jit
def step_kernel(
    state_pointer,
    c_pointer,
    b_pointer,
    x_pointer,
    dt_pointer,
    bias_pointer,
    A_pointer,
    D_pointer,
    y_pointer,
    new_pointer,
    n_heads,
    heads_per_group,
    c_stride_b,
    c_stride_g,
    b_stride_b,
    b_stride_g,
    x_stride_b,
    x_stride_h,
    dt_stride_b,
    dt_stride_h,
    N: tl.constexpr,
    V: tl.constexpr,
    WIDTH_N: tl.constexpr,
    BV: tl.constexpr,
):
    line = tl.program_id(0).to(tl.int64)
    row, head = line // n_heads, line % n_heads
    group = head // heads_per_group
    key, value = tl.arange(0, WIDTH_N), tl.program_id(1).to(tl.int64) * BV + tl.arange(0, BV)
    in_key, in_value = key < N, value < V
    c = tl.load(c_pointer + row * c_stride_b + group * c_stride_g + key, mask=in_key, other=0.0).to(tl.float32)
    b = tl.load(b_pointer + row * b_stride_b + group * b_stride_g + key, mask=in_key, other=0.0).to(tl.float32)
    x = tl.load(x_pointer + row * x_stride_b + head * x_stride_h + value, mask=in_value, other=0.0).to(tl.float32)
    dt = tl.load(dt_pointer + row * dt_stride_b + head * dt_stride_h).to(tl.float32)
    if bias_pointer is not None:
        dt, _ = softplus(dt + tl.load(bias_pointer + head).to(tl.float32))
    tile = (line * N + key[:, None]) * V + value[None, :]
    inside = in_key[:, None] & in_value[None, :]
    state = tl.load(state_pointer + tile, mask=inside, other=0.0)
    state = state * tl.exp(dt * tl.load(A_pointer + head).to(tl.float32)) + b[:, None] * (dt * x)[None, :]
    y = tl.sum(state * c[:, None], 0)
    if D_pointer is not None:
        y += tl.load(D_pointer + head).to(tl.float32) * x
    tl.store(new_pointer + tile, state, mask=inside)
    tl.store(y_pointer + line * V + value, y.to(y_pointer.dtype.element_ty), mask=in_value)


def triton_step(
    state_BHNV: Tensor,
    c_BGN: Tensor,
    b_BGN: Tensor,
    x_BHV: Tensor,
    dt_BH: Tensor,
    A_H: Tensor,
    D_H: Tensor | None,
    dt_bias_H: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and the state after the token, as in `ssd_step`; the state is float32."""
    n_rows, n_heads, n_keys, n_values = state_BHNV.shape
    state_BHNV = state_BHNV.contiguous()
    c_BGN, b_BGN, x_BHV = (s if s.stride(-1) == 1 else s.contiguous() for s in (c_BGN, b_BGN, x_BHV))
    y_BHV = torch.empty(x_BHV.shape, dtype=x_BHV.dtype, device=x_BHV.device)
    new_BHNV = torch.empty_like(state_BHNV)
    width = triton.next_power_of_2(n_keys)
    columns = min(triton.next_power_of_2(n_values), max(VALUES_PER_PROGRAM // width, 16))
    step_kernel[(n_rows * n_heads, triton.cdiv(n_values, columns))](
        state_BHNV,
        c_BGN,
        b_BGN,
        x_BHV,
        dt_BH,
        dt_bias_H,
        A_H,
        D_H,
        y_BHV,
        new_BHNV,
        n_heads,
        n_heads // c_BGN.shape[1],
        *c_BGN.stride()[:2],
        *b_BGN.stride()[:2],
        *x_BHV.stride()[:2],
        *dt_BH.stride(),
        N=n_keys,
        V=n_values,
        WIDTH_N=width,
        BV=columns,
        num_warps=4,
    )
    return y_BHV, new_BHNV
