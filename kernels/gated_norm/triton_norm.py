"""Gated RMS norm in Triton, forward and backward."""

# B batch, T tokens, H heads, V value width.
# Python numbers become constexpr and jitted functions return values, which their annotations cannot say.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

# A program holds ROWS x V values of each tensor: 1024 in float32 are 8 registers a thread at 4 warps.
VALUES_PER_PROGRAM = 1024
# Most partial sums of the weight gradient per head: enough programs to fill a GPU, few enough to sum cheaply.
N_PARTS = 64


@triton.jit
def gated(values, z_pointer, gate_pointer, token, offset, mask, HAS_Z: tl.constexpr, HAS_GATE: tl.constexpr):
    """Values times silu(z) where gated; also the gate's logit, its sigmoid and which rows are gated."""
    logit = tl.zeros_like(values)
    if HAS_Z:
        logit = tl.load(z_pointer + offset, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-logit))
    is_gated = mask
    if HAS_GATE:
        gate = tl.load(gate_pointer + token[:, None], mask=mask, other=0)
        is_gated = mask & (gate != 0)
    result = values
    if HAS_Z:
        result = tl.where(is_gated, values * logit * sigmoid, values)
    return result, logit, sigmoid, is_gated


@triton.jit
def norm_fwd_kernel(
    y_pointer,
    weight_pointer,
    z_pointer,
    gate_pointer,
    out_pointer,
    scale_pointer,
    n_rows,
    eps,
    H: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_GATE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    mask = (row[:, None] < n_rows) & (column[None, :] < V)
    offset = row[:, None] * V + column[None, :]
    y = tl.load(y_pointer + offset, mask=mask, other=0.0).to(tl.float32)
    u, _, _, _ = gated(y, z_pointer, gate_pointer, row // H, offset, mask, HAS_Z, HAS_GATE)
    scale = 1.0 / tl.sqrt(tl.sum(u * u, 1) / V + eps)
    weight_offset = (row % H)[:, None] * V + column[None, :]
    weight = tl.load(weight_pointer + weight_offset, mask=mask, other=0.0).to(tl.float32)
    out = u * scale[:, None] * weight
    tl.store(out_pointer + offset, out.to(out_pointer.dtype.element_ty), mask=mask)
    tl.store(scale_pointer + row, scale, mask=row < n_rows)


@triton.jit
def norm_bwd_kernel(
    y_pointer,
    weight_pointer,
    z_pointer,
    gate_pointer,
    scale_pointer,
    dout_pointer,
    dy_pointer,
    dz_pointer,
    dweight_pointer,
    n_tokens,
    tokens_per_part,
    H: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_GATE: tl.constexpr,
):
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
        row = token * H + head
        offset = row[:, None] * V + column[None, :]
        y = tl.load(y_pointer + offset, mask=mask, other=0.0).to(tl.float32)
        dout = tl.load(dout_pointer + offset, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(scale_pointer + row, mask=live, other=0.0)
        u, logit, sigmoid, is_gated = gated(y, z_pointer, gate_pointer, token, offset, mask, HAS_Z, HAS_GATE)
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
            tl.store(dz_pointer + offset, dz.to(dz_pointer.dtype.element_ty), mask=mask)
        tl.store(dy_pointer + offset, dy.to(dy_pointer.dtype.element_ty), mask=mask)
    tl.store(dweight_pointer + (part * H + head) * V + column, dweight, mask=in_width)


def norm_fwd(
    y_BTHV: Tensor, weight_HV: Tensor, z_BTHV: Tensor | None, gate_BT: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Result like `y_BTHV`, and 1 / RMS of every head of every token in float32."""
    y = y_BTHV.contiguous()
    options, rows = _options(y, z_BTHV, gate_BT)
    out_BTHV = torch.empty_like(y)
    scale_BTH1 = torch.empty(*y.shape[:-1], 1, dtype=torch.float32, device=y.device)
    norm_fwd_kernel[(max(triton.cdiv(scale_BTH1.numel(), rows), 1),)](
        y,
        weight_HV.contiguous(),
        y if z_BTHV is None else z_BTHV.contiguous(),
        y if gate_BT is None else gate_BT.contiguous(),
        out_BTHV,
        scale_BTH1,
        scale_BTH1.numel(),
        eps,
        **options,
    )
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
    y, dout = y_BTHV.contiguous(), dout_BTHV.contiguous()
    options, rows = _options(y, z_BTHV, gate_BT)
    n_heads, n_values = weight_HV.shape
    n_tokens = scale_BTH1.numel() // n_heads
    dy_BTHV = torch.empty_like(y)
    dz_BTHV = None if z_BTHV is None else torch.empty_like(y, dtype=z_BTHV.dtype)
    n_parts = min(N_PARTS, max(triton.cdiv(n_tokens, rows), 1))
    dweight = torch.empty(n_parts, n_heads, n_values, dtype=torch.float32, device=y.device)
    norm_bwd_kernel[(n_parts, n_heads)](
        y,
        weight_HV.contiguous(),
        y if z_BTHV is None else z_BTHV.contiguous(),
        y if gate_BT is None else gate_BT.contiguous(),
        scale_BTH1,
        dout,
        dy_BTHV,
        dy_BTHV if dz_BTHV is None else dz_BTHV,
        dweight,
        n_tokens,
        triton.cdiv(n_tokens, n_parts),
        **options,
    )
    return dy_BTHV, dweight.sum(0), dz_BTHV


def _options(y_BTHV: Tensor, z_BTHV: Tensor | None, gate_BT: Tensor | None) -> tuple[dict[str, int | bool], int]:
    """Compile-time arguments of both kernels, and the rows of a program."""
    n_heads, n_values = y_BTHV.shape[-2:]
    columns = 1 << (n_values - 1).bit_length()
    rows = max(VALUES_PER_PROGRAM // columns, 1)
    options = {"H": n_heads, "V": n_values, "ROWS": rows, "COLUMNS": columns}
    return {**options, "HAS_Z": z_BTHV is not None, "HAS_GATE": gate_BT is not None}, rows
