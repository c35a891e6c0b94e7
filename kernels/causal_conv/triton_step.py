"""One token of the causal convolution in Triton: result and next tail in one launch, for decoding."""

# B batch, C channels, K conv taps.
# Python numbers become constexpr, and launches have options of their own, which annotations cannot say.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

CHANNELS = 256  # small programs: a few rows must spread over the GPU


@triton.jit
def conv_step_kernel(
    tail_pointer, x_pointer, weight_pointer, bias_pointer, y_pointer, next_pointer,
    C, tail_batch_stride, tail_token_stride, x_batch_stride, weight_channel_stride, weight_tap_stride,
    K: tl.constexpr, CHANNELS: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    in_width = channel < C
    tail = tail_pointer + row * tail_batch_stride + channel
    following = next_pointer + row * (K - 1) * C + channel
    taps = weight_pointer + channel * weight_channel_stride
    pre = tl.load(bias_pointer + channel, mask=in_width, other=0.0).to(tl.float32)
    for index in tl.static_range(K):
        if index < K - 1:
            value = tl.load(tail, mask=in_width, other=0.0).to(tl.float32)
            tail += tail_token_stride
        else:
            value = tl.load(x_pointer + row * x_batch_stride + channel, mask=in_width, other=0.0).to(tl.float32)
        if index > 0:
            tl.store(following, value.to(next_pointer.dtype.element_ty), mask=in_width)
            following += C
        pre += tl.load(taps, mask=in_width, other=0.0).to(tl.float32) * value
        taps += weight_tap_stride
    if SILU:
        pre = pre / (1.0 + tl.exp(-pre))
    tl.store(y_pointer + row * C + channel, pre.to(y_pointer.dtype.element_ty), mask=in_width)


def step_fwd(
    tail_BKC: Tensor, x_BC: Tensor, weight_CK: Tensor, bias_C: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Result like `x_BC` and the next tail, a new tensor in the dtype that holds both."""
    tail = tail_BKC if tail_BKC.stride(2) == 1 else tail_BKC.contiguous()
    x = x_BC if x_BC.stride(1) == 1 else x_BC.contiguous()
    n_rows, n_channels = x.shape
    y_BC = x.new_empty(x.shape)
    next_BKC = torch.empty(tail.shape, dtype=torch.promote_types(tail.dtype, x.dtype), device=x.device)
    channels = min(triton.next_power_of_2(max(n_channels, 1)), CHANNELS)
    conv_step_kernel[(n_rows, triton.cdiv(n_channels, channels))](
        tail, x, weight_CK, bias_C.contiguous(), y_BC, next_BKC,
        n_channels, *tail.stride()[:2], x.stride(0), *weight_CK.stride(),
        K=weight_CK.shape[1], CHANNELS=channels, SILU=activation == "silu", num_warps=2,
    )  # fmt: skip
    return y_BC, next_BKC
