"""Gated RMS norm in Triton, forward and backward."""

# B batch, T tokens, H heads, V value width.
# Python numbers become constexpr and jitted functions return values, which their annotations cannot say.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

# A program holds ROWS x V values of each tensor: 1024 in float32 are 8 registers a thread at 4 warps.
VALUES_PER_PROGRAM = 1024
# Most partial sums of the weight gradient per head: enough programs to fill a GPU, few enough to sum cheaply.
N_PARTS = 64


@triton.jit
def token_offset(token, T, batch_stride, token_stride):
    """Where a token of the flattened B * T begins; tokens are counted in 32 bits, their places in 64."""
    batch = (token.to(tl.int32) // T).to(tl.int64)
    return batch * batch_stride + (token - batch * T) * token_stride


@triton.jit
def gated(values, z_pointer, gate_pointer, z_offset, gate_offset, mask, HAS_Z: tl.constexpr, HAS_GATE: tl.constexpr):
    """Values times silu(z) where gated; also the gate's logit, its sigmoid and which rows are gated."""
    logit = tl.zeros_like(values)
    if HAS_Z:
        logit = tl.load(z_pointer + z_offset, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-logit))
    is_gated = mask
    if HAS_GATE:
        gate = tl.load(gate_pointer + gate_offset[:, None], mask=mask, other=0)
        is_gated = mask & (gate != 0)
    result = values
    if HAS_Z:
        result = tl.where(is_gated, values * logit * sigmoid, values)
    return result, logit, sigmoid, is_gated


@triton.jit
def norm_fwd_kernel(
    y_pointer, weight_pointer, z_pointer, gate_pointer, out_pointer, scale_pointer, n_rows,
    T, y_batch_stride, y_token_stride, z_batch_stride, z_token_stride, gate_batch_stride, gate_token_stride,
    out_batch_stride, out_token_stride, eps,
    H: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    mask = (row[:, None] < n_rows) & (column[None, :] < V)
    token = row // H
    inner = (row % H)[:, None] * V + column[None, :]
    y_offset = token_offset(token, T, y_batch_stride, y_token_stride)[:, None] + inner
    z_offset = token_offset(token, T, z_batch_stride, z_token_stride)[:, None] + inner
    gate_offset = token_offset(token, T, gate_batch_stride, gate_token_stride)
    y = tl.load(y_pointer + y_offset, mask=mask, other=0.0).to(tl.float32)
    u, _, _, _ = gated(y, z_pointer, gate_pointer, z_offset, gate_offset, mask, HAS_Z, HAS_GATE)
    scale = 1.0 / tl.sqrt(tl.sum(u * u, 1) / V + eps)
    weight = tl.load(weight_pointer + inner, mask=mask, other=0.0).to(tl.float32)
    out = u * scale[:, None] * weight
    out_offset = token_offset(token, T, out_batch_stride, out_token_stride)[:, None] + inner
    tl.store(out_pointer + out_offset, out.to(out_pointer.dtype.element_ty), mask=mask)
    tl.store(scale_pointer + row, scale, mask=row < n_rows)


@triton.jit
def norm_bwd_kernel(
    y_pointer, weight_pointer, z_pointer, gate_pointer, scale_pointer, dout_pointer,
    dy_pointer, dz_pointer, dweight_pointer, n_tokens, tokens_per_part,
    T, y_batch_stride, y_token_stride, z_batch_stride, z_token_stride, gate_batch_stride, gate_token_stride,
    dout_batch_stride, dout_token_stride, dy_batch_stride, dy_token_stride, dz_batch_stride, dz_token_stride,
    H: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_GATE: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    in_width = column < V
    weight = tl.load(weight_pointer + head * V + column, mask=in_width, other=0.0).to(tl.float32)
    dweight = tl.zeros((COLUMNS,), tl.float32)
    for step in range(0, tokens_per_part, ROWS):
        local = step + tl.arange(0, ROWS)
        token = part * tokens_per_part + local
        live = (local < tokens_per_part) & (token < n_tokens)
        mask = live[:, None] & in_width[None, :]
        inner = (head * V + column)[None, :]
        y_offset = token_offset(token, T, y_batch_stride, y_token_stride)[:, None] + inner
        z_offset = token_offset(token, T, z_batch_stride, z_token_stride)[:, None] + inner
        gate_offset = token_offset(token, T, gate_batch_stride, gate_token_stride)
        dout_offset = token_offset(token, T, dout_batch_stride, dout_token_stride)[:, None] + inner
        y = tl.load(y_pointer + y_offset, mask=mask, other=0.0).to(tl.float32)
        dout = tl.load(dout_pointer + dout_offset, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(scale_pointer + token * H + head, mask=live, other=0.0)
        u, logit, sigmoid, is_gated = gated(y, z_pointer, gate_pointer, z_offset, gate_offset, mask, HAS_Z, HAS_GATE)
        normal = u * scale[:, None]
        dweight += tl.sum(dout * normal, 0)
        dnormal = dout * weight[None, :]
        shared = tl.sum(dnormal * normal, 1) / V
        du = scale[:, None] * (dnormal - normal * shared[:, None])
        dy = du
        if HAS_Z:
            dy = tl.where(is_gated, du * logit * sigmoid, du)
            slope = sigmoid * (1.0 + logit * (1.0 - sigmoid))
            dz = tl.where(is_gated, du * y * slope, 0.0)
            dz_offset = token_offset(token, T, dz_batch_stride, dz_token_stride)[:, None] + inner
            tl.store(dz_pointer + dz_offset, dz.to(dz_pointer.dtype.element_ty), mask=mask)
        dy_offset = token_offset(token, T, dy_batch_stride, dy_token_stride)[:, None] + inner
        tl.store(dy_pointer + dy_offset, dy.to(dy_pointer.dtype.element_ty), mask=mask)
    tl.store(dweight_pointer + (part * H + head) * V + column, dweight, mask=in_width)


def norm_fwd(
    y_BTHV: Tensor, weight_HV: Tensor, z_BTHV: Tensor | None, gate_BT: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Result in the memory order of `y_BTHV`, and 1 / RMS of every head of every token in float32."""
    y, n_lead = _heads_last(y_BTHV), y_BTHV.dim() - 2
    z, gate = y if z_BTHV is None else _heads_last(z_BTHV), _gate(y, gate_BT)
    out_BTHV = torch.empty_like(y)
    scale_BTH1 = torch.empty(*y.shape[:-1], 1, dtype=torch.float32, device=y.device)
    options, rows = _options(y, z_BTHV, gate_BT)
    norm_fwd_kernel[(max(triton.cdiv(scale_BTH1.numel(), rows), 1),)](
        y, weight_HV.contiguous(), z, gate, out_BTHV, scale_BTH1, scale_BTH1.numel(),
        *_token_strides(n_lead, y, z, gate, out_BTHV), eps, **options,
    )  # fmt: skip
    return out_BTHV, scale_BTH1


def norm_bwd(
    y_BTHV: Tensor,
    weight_HV: Tensor,
    z_BTHV: Tensor | None,
    gate_BT: Tensor | None,
    scale_BTH1: Tensor,
    dout_BTHV: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of y, of the weight (float32) and of z."""
    y, dout, n_lead = _heads_last(y_BTHV), _heads_last(dout_BTHV), y_BTHV.dim() - 2
    z, gate = y if z_BTHV is None else _heads_last(z_BTHV), _gate(y, gate_BT)
    dy_BTHV = torch.empty_like(y)
    dz_BTHV = None if z_BTHV is None else torch.empty_like(z)
    dz = dy_BTHV if dz_BTHV is None else dz_BTHV
    options, rows = _options(y, z_BTHV, gate_BT)
    n_heads, n_values = weight_HV.shape
    n_tokens = scale_BTH1.numel() // n_heads
    n_parts = min(N_PARTS, max(triton.cdiv(n_tokens, rows), 1))
    dweight = torch.empty(n_parts, n_heads, n_values, dtype=torch.float32, device=y.device)
    norm_bwd_kernel[(n_parts, n_heads)](
        y, weight_HV.contiguous(), z, gate, scale_BTH1, dout, dy_BTHV, dz, dweight,
        n_tokens, triton.cdiv(n_tokens, n_parts), *_token_strides(n_lead, y, z, gate, dout, dy_BTHV, dz), **options,
    )  # fmt: skip
    return dy_BTHV, dweight.sum(0), dz_BTHV


def _heads_last(y_BTHV: Tensor) -> Tensor:
    """Up to two leading dimensions with any strides; a copy where heads and values are not one block, or above."""
    n_heads, n_values = y_BTHV.shape[-2:]
    is_block = y_BTHV.stride(-1) == 1 and (n_heads == 1 or y_BTHV.stride(-2) == n_values)
    return y_BTHV if is_block and y_BTHV.dim() <= 4 else y_BTHV.contiguous()


def _gate(y_BTHV: Tensor, gate_BT: Tensor | None) -> Tensor:
    """`y_BTHV` stands in for no gate."""
    if gate_BT is None:
        return y_BTHV
    return gate_BT if gate_BT.dim() <= 2 else gate_BT.contiguous()


def _token_strides(n_lead: int, *tensors: Tensor) -> list[int]:
    """T, then both token strides of every tensor. T is 1 where one stride serves, so that Triton drops the division."""
    sizes = tensors[0].shape[:n_lead]
    if n_lead == 2 and min(sizes) > 1 and any(x.stride(0) != sizes[1] * x.stride(1) for x in tensors):
        return [sizes[1], *(stride for x in tensors for stride in x.stride()[:2])]
    last = max((index for index, size in enumerate(sizes) if size > 1), default=0)
    return [1, *(stride for x in tensors for stride in (x.stride(last) if n_lead else 0, 0))]


def _options(y_BTHV: Tensor, z_BTHV: Tensor | None, gate_BT: Tensor | None) -> tuple[dict[str, int | bool], int]:
    """Compile-time arguments of both kernels, and the rows of a program."""
    n_heads, n_values = y_BTHV.shape[-2:]
    columns = 1 << (n_values - 1).bit_length()
    rows = max(VALUES_PER_PROGRAM // columns, 1)
    options = {"H": n_heads, "V": n_values, "ROWS": rows, "COLUMNS": columns}
    return {**options, "HAS_Z": z_BTHV is not None, "HAS_GATE": gate_BT is not None}, rows
