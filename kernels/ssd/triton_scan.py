"""Launches the Triton kernels of the scan: tiles, segments and buffers."""

# B batch, T tokens, C chunks, S segments, L tokens per chunk, H heads, G groups of B and C, N key/state width,
# V value width, BV columns of V in a program. A line is one head of one row: B * H of them.
# Python numbers become constexpr, which the annotations of jitted functions and of triton.cdiv cannot say.
# pyright: reportArgumentType=false, reportReturnType=false, reportCallIssue=false

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad
from triton.tools.tensor_descriptor import TensorDescriptor

from transmamba.kernels.documents import Documents
from transmamba.kernels.ssd.slabs import Streams
from transmamba.kernels.ssd.triton_bwd import chunk_bwd_kernel, prefix_bwd_kernel, state_bwd_kernel
from transmamba.kernels.ssd.triton_fwd import pass_states_kernel, scan_fwd_kernel

# Tokens per chunk. Its tile of pairs takes as many registers as a state of 64 x 64; with 128 tokens both spill.
L = 64
# Columns of V in a program of the forward, by the width of the state, and of the state's backward: without spills.
FORWARD_COLUMNS = {16: 64, 32: 64, 64: 64, 128: 32, 256: 16}
BACKWARD_COLUMNS = {16: 64, 32: 64, 64: 64, 128: 64, 256: 32}
OPTIONS = {"num_warps": 4, "num_stages": 2}
CHUNK_OPTIONS = {"num_warps": 4, "num_stages": 1}
# Tiles up to this width fit the registers of the chunks' backward side by side. If keys or values are wider, it loads c
# twice; if both are, the states too, whose shared memory would leave no room for a second program.
NARROW = 64
# A shorter segment costs more in states than its programs gain.
LEAST_CHUNKS_PER_SEGMENT = 8
PROGRAMS_PER_PROCESSOR = 2
WIDEST_STATE = 256


class Problem(NamedTuple):
    """What one scan computes, beside its streams.

    Attributes:
        dt_bias_H: if given, the step sizes are softplus(dt + dt_bias).
        documents: boundaries, or None.
        transpoint: tokens whose offset in their document is below it have no output; at most T.
        first_output: the smallest column with an output.
    """

    dt_bias_H: Tensor | None
    documents: Documents | None
    transpoint: int
    first_output: int


class TritonGrads(NamedTuple):
    """Gradients of the streams, of the initial state and of the bias of the step sizes."""

    c_BTGN: Tensor
    b_BTGN: Tensor
    x_BTHV: Tensor
    dt_BTH: Tensor
    A_H: Tensor
    D_H: Tensor
    initial_state_BHNV: Tensor
    dt_bias_H: Tensor


def triton_forward(
    streams: Streams, problem: Problem, initial_BHNV: Tensor | None, y_BTHV: Tensor, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Write the outputs into `y_BTHV`, where `aligned` holds; tokens without an output keep what is there.

    Returns:
        The final state, float32; if `keep`, the states that enter the chunks, [B * H, C, N, V], for the backward.
    """
    streams = _aligned(streams)
    common, n_lines = _common(streams, problem), streams.x_BTHV.shape[0] * streams.x_BTHV.shape[2]
    n_chunks = common["n_chunks"]
    columns = FORWARD_COLUMNS[common["WIDTH_N"]]
    n_programs = n_lines * triton.cdiv(streams.x_BTHV.shape[3], columns)
    n_segments = count_segments(n_programs, n_chunks, _n_processors(y_BTHV))
    states = _states(streams, n_lines, n_chunks, streams.x_BTHV.dtype) if keep else None
    final = _states(streams, n_lines, n_segments, torch.float32)
    arguments = common | {
        "c": _tiles(streams.c_BTGN, common["WIDTH_N"]),
        "b": _tiles(streams.b_BTGN, common["WIDTH_N"]),
        "x": _tiles(streams.x_BTHV, columns),
        "D_pointer": streams.D_H,
        "chunks_per_segment": triton.cdiv(n_chunks, n_segments),
        "V": streams.x_BTHV.shape[3],
        "BV": columns,
        "MASKED": problem.first_output % L != 0 or (problem.documents is not None and problem.transpoint > 0),
    }
    grid = (n_programs, n_segments)
    initial = None if initial_BHNV is None else _lines(initial_BHNV, streams)
    if n_segments > 1:
        carry = torch.empty(n_lines, n_segments, dtype=torch.float32, device=y_BTHV.device)
        only_state = {"y": None, "states": None, "initial": None, "first_output": n_chunks * L}
        scan_fwd_kernel[grid](
            **arguments | only_state, final=_state_tiles(final, columns), carry_pointer=carry, **OPTIONS
        )
        initial = _pass_states(final, carry, initial, backward=False)
    scan_fwd_kernel[grid](
        **arguments,
        y=_tiles(y_BTHV, columns),
        states=_state_tiles(states, columns),
        initial=_state_tiles(initial, columns),
        final=_state_tiles(final, columns),
        carry_pointer=None,
        **OPTIONS,
    )
    return final[:, -1].unflatten(0, (-1, streams.x_BTHV.shape[2])), states


def triton_backward(
    streams: Streams, problem: Problem, states: Tensor, dy_BTHV: Tensor, dfinal_BHNV: Tensor | None
) -> TritonGrads:
    """Gradients, given those of the outputs and of the final state, if it has any."""
    shapes = Streams(*streams)
    streams, dy_BTHV = _aligned(streams), aligned(dy_BTHV)
    n_rows, _, n_heads, _ = streams.x_BTHV.shape
    common, n_lines = _common(streams, problem), n_rows * n_heads
    dstates, dinitial = _state_gradients(streams, problem, common, dy_BTHV, dfinal_BHNV)
    n_chunks, width_V = common["n_chunks"], _width(streams.x_BTHV.shape[3])
    heads_BTHN = (*streams.x_BTHV.shape[:3], streams.c_BTGN.shape[3])
    dc, db = (room_like(stream, heads_BTHN) for stream in (streams.c_BTGN, streams.b_BTGN))
    dx, ddt = room_like(streams.x_BTHV, streams.x_BTHV.shape), torch.empty_like(streams.dt_BTH)
    sums = torch.empty(n_rows * n_chunks, 3, n_heads, dtype=torch.float32, device=dx.device)
    arguments = common | {
        "b": _tiles(streams.b_BTGN, common["WIDTH_N"]),
        "x": _tiles(streams.x_BTHV, width_V),
        "states": _state_tiles(states, width_V),
        "dstates": _state_tiles(dstates, width_V),
        "dc": _tiles(dc, common["WIDTH_N"]),
        "db": _tiles(db, common["WIDTH_N"]),
        "dx": _tiles(dx, width_V),
        "ddt_pointer": ddt,
        "sums_pointer": sums,
        "WIDTH_V": width_V,
    }
    first_chunk = problem.first_output // L
    if first_chunk > 0:
        prefix_bwd_kernel[(min(first_chunk, n_chunks), n_lines)](**arguments, **CHUNK_OPTIONS)
    if first_chunk < n_chunks:
        chunk_bwd_kernel[(n_chunks - first_chunk, n_lines)](
            **arguments,
            c=_tiles(streams.c_BTGN, common["WIDTH_N"]),
            dy=_tiles(dy_BTHV, width_V),
            D_pointer=streams.D_H,
            first_chunk=first_chunk,
            C_AGAIN=max(common["WIDTH_N"], width_V) > NARROW,
            STATES_AGAIN=min(common["WIDTH_N"], width_V) > NARROW,
            **CHUNK_OPTIONS,
        )
    dA_H, dbias_H, dD_H = sums.sum(0)
    dc, db = (_of_groups(grad, shapes.c_BTGN.shape[2]) for grad in (dc, db))
    return TritonGrads(dc, db, dx, ddt, dA_H, dD_H, dinitial.unflatten(0, (n_rows, n_heads)), dbias_H)


def _state_gradients(
    streams: Streams, problem: Problem, common: dict[str, Any], dy_BTHV: Tensor, dfinal_BHNV: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of the states that leave the chunks, [B * H, C, N, V], and of the initial state, [B * H, N, V]."""
    n_rows, _, n_heads, n_values = streams.x_BTHV.shape
    n_lines, n_chunks, columns = n_rows * n_heads, common["n_chunks"], BACKWARD_COLUMNS[common["WIDTH_N"]]
    n_programs = n_lines * triton.cdiv(n_values, columns)
    n_segments = count_segments(n_programs, n_chunks, _n_processors(dy_BTHV))
    dstates = _states(streams, n_lines, n_chunks, streams.x_BTHV.dtype)
    dinitial = _states(streams, n_lines, n_segments, torch.float32)
    arguments = common | {
        "c": _tiles(streams.c_BTGN, common["WIDTH_N"]),
        "dy": _tiles(dy_BTHV, columns),
        "dinitial": _state_tiles(dinitial, columns),
        "chunks_per_segment": triton.cdiv(n_chunks, n_segments),
        "V": n_values,
        "BV": columns,
    }
    grid = (n_programs, n_segments)
    dfinal = None if dfinal_BHNV is None else _lines(dfinal_BHNV, streams)
    if n_segments > 1:
        carry = torch.empty(n_lines, n_segments, dtype=torch.float32, device=dy_BTHV.device)
        state_bwd_kernel[grid](**arguments, dstates=None, dfinal=None, carry_pointer=carry, **OPTIONS)
        dfinal = _pass_states(dinitial, carry, dfinal, backward=True)
    state_bwd_kernel[grid](
        **arguments,
        dstates=_state_tiles(dstates, columns),
        dfinal=_state_tiles(dfinal, columns),
        carry_pointer=None,
        **OPTIONS,
    )
    return dstates, dinitial[:, 0]


def count_segments(n_programs: int, n_chunks: int, n_processors: int) -> int:
    """Parts in which a row is scanned at once: one, if heads and rows fill the device already."""
    wanted = PROGRAMS_PER_PROCESSOR * n_processors // n_programs
    n_segments = max(min(wanted, n_chunks // LEAST_CHUNKS_PER_SEGMENT), 1)
    return triton.cdiv(n_chunks, triton.cdiv(n_chunks, n_segments))  # none of them empty


def aligned(stream: Tensor) -> Tensor:
    """The stream, or a copy of it whose strides a tensor descriptor can hold: multiples of 16 bytes, and no zero."""
    unit = 16 // stream.element_size()
    is_aligned = stream.stride(-1) == 1 and stream.data_ptr() % 16 == 0
    if is_aligned and all(stride > 0 and stride % unit == 0 for stride in stream.stride()[:-1]):
        return stream
    width = stream.shape[-1]
    return pad(stream, (0, -width % unit)).contiguous()[..., :width]


def _aligned(streams: Streams) -> Streams:
    return streams._replace(
        c_BTGN=aligned(streams.c_BTGN), b_BTGN=aligned(streams.b_BTGN), x_BTHV=aligned(streams.x_BTHV)
    )


def _common(streams: Streams, problem: Problem) -> dict[str, Any]:
    """Arguments that all kernels of the scan share.

    Raises:
        ValueError: the row is too long for positions of 32 bits, which is what tensor descriptors have.
    """
    n_tokens, n_heads = streams.x_BTHV.shape[1:3]
    if n_tokens >= 2**31 - L:
        raise ValueError(f"rows of {n_tokens} tokens; at most {2**31 - L - 1} can be scanned")
    documents = problem.documents
    return {
        "dt_pointer": streams.dt_BTH,
        "bias_pointer": problem.dt_bias_H,
        "A_pointer": streams.A_H,
        "start_pointer": None if documents is None else documents.start_BT,
        "n_tokens": n_tokens,
        "n_heads": n_heads,
        "heads_per_group": n_heads // streams.c_BTGN.shape[2],
        "n_chunks": triton.cdiv(n_tokens, L),
        "first_output": problem.first_output,
        "transpoint": problem.transpoint,
        "dt_stride_b": streams.dt_BTH.stride(0),
        "dt_stride_t": streams.dt_BTH.stride(1),
        "dt_stride_h": streams.dt_BTH.stride(2),
        "WIDTH_N": _width(streams.c_BTGN.shape[3]),
        "L": L,
        "PRECISION": "tf32x3",  # of float32 streams: three products of tf32 parts, about float32; no effect on bfloat16
    }


def _width(n: int) -> int:
    """Columns of a tile that holds n: tensor cores want a power of two, 16 at least; the rest is read as zeros."""
    return max(triton.next_power_of_2(n), 16)


def _tiles(stream: Tensor, columns: int) -> TensorDescriptor:
    """[B, T, H, V] by tiles of a chunk of one head. Sizes of one come first, so that tiles load as matrices."""
    view = stream.transpose(1, 2)
    return TensorDescriptor(view, list(view.shape), list(view.stride()), [1, 1, L, columns])


def _state_tiles(states: Tensor | None, columns: int) -> TensorDescriptor | None:
    """[B * H, C or S, N, V] by tiles of some columns of one state."""
    if states is None:
        return None
    return TensorDescriptor(states, list(states.shape), list(states.stride()), [1, 1, _width(states.shape[2]), columns])


def _states(streams: Streams, n_lines: int, n: int, dtype: torch.dtype) -> Tensor:
    """Room for n states of every line."""
    return _aligned_empty((n_lines, n, streams.c_BTGN.shape[3], streams.x_BTHV.shape[3]), dtype, streams.x_BTHV.device)


def _lines(state_BHNV: Tensor, streams: Streams) -> Tensor:
    """[B, H, N, V] as the only segment's state of every line."""
    return aligned(state_BHNV.to(torch.float32).flatten(0, 1)[:, None])


def room_like(stream: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Room for a gradient: rows and tokens in the stream's order of memory."""
    if stream.stride(0) < stream.stride(1):
        B, T, *others = shape
        return _aligned_empty((T, B, *others), stream.dtype, stream.device).transpose(0, 1)
    return _aligned_empty(shape, stream.dtype, stream.device)


def _aligned_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    *others, width = shape
    return torch.empty(*others, width + -width % (16 // dtype.itemsize), dtype=dtype, device=device)[..., :width]


def _of_groups(grad_BTHN: Tensor, n_groups: int) -> Tensor:
    """Heads that share b and c add their gradients."""
    if grad_BTHN.shape[2] == n_groups:
        return grad_BTHN
    return grad_BTHN.unflatten(2, (n_groups, -1)).sum(3)


def _pass_states(local: Tensor, carry: Tensor, initial: Tensor | None, *, backward: bool) -> Tensor:
    """The states that enter the segments, shaped like `local`, what each adds to a zero state."""
    entering = _aligned_empty(tuple(local.shape), local.dtype, local.device)
    if initial is not None:
        initial = _aligned_empty(tuple(initial.shape), local.dtype, local.device).copy_(initial)
    n_lines, n_segments, _, _ = local.shape
    size = local.stride(1)  # the columns that align the rows included
    pass_states_kernel[(triton.cdiv(size, 1024), n_lines)](
        local, carry, initial, entering, n_segments, SIZE=size, BACKWARD=backward, BLOCK=1024, num_warps=4
    )
    return entering


def _n_processors(stream: Tensor) -> int:
    return torch.cuda.get_device_properties(stream.device).multi_processor_count if stream.is_cuda else 1
