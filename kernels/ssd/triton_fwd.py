"""The scan in Triton, forward: one program walks the chunks of a segment of one head with the state in registers."""

# B batch, T tokens, H heads, G groups of B and C, N key/state width, V value width, L tokens per chunk,
# BV columns of V in a program.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false

import triton
import triton.language as tl

from transmamba.kernels.ssd.triton_tiles import decays, load_steps


@triton.jit
def advance(state, b_LN, x_LV, dt, decay, PRECISION: tl.constexpr):
    """The state after a chunk: what is carried over and what its tokens write."""
    write = tl.exp2(tl.where(decay.writes, decay.log_rest, float("-inf"))) * dt
    u_LV = (x_LV.to(tl.float32) * write[:, None]).to(x_LV.dtype)
    return tl.dot(tl.trans(b_LN), u_LV, state * tl.exp2(decay.log_carry), input_precision=PRECISION)


@triton.jit
def scan_fwd_kernel(
    c,
    b,
    x,
    y,
    states,
    initial,
    final,
    dt_pointer,
    bias_pointer,
    A_pointer,
    D_pointer,
    start_pointer,
    carry_pointer,
    n_tokens,
    n_heads,
    heads_per_group,
    n_chunks,
    chunks_per_segment,
    first_output,
    transpoint,
    dt_stride_b,
    dt_stride_t,
    dt_stride_h,
    V: tl.constexpr,
    WIDTH_N: tl.constexpr,
    BV: tl.constexpr,
    L: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    n_blocks: tl.constexpr = (V + BV - 1) // BV
    line = tl.program_id(0) // n_blocks
    v0 = (tl.program_id(0) % n_blocks) * BV
    segment = tl.program_id(1)
    row, head = line // n_heads, line % n_heads
    group = head // heads_per_group
    dt_pointer += row.to(tl.int64) * dt_stride_b + head.to(tl.int64) * dt_stride_h
    if start_pointer is not None:
        start_pointer += row.to(tl.int64) * n_tokens
    rate = tl.load(A_pointer + head).to(tl.float32)
    within = tl.arange(0, L)
    state = tl.zeros((WIDTH_N, BV), tl.float32)
    if initial is not None:
        state = initial.load([line, segment, 0, v0]).reshape(WIDTH_N, BV)
    begin = segment.to(tl.int64) * chunks_per_segment
    end = tl.minimum(begin + chunks_per_segment, n_chunks).to(tl.int32)
    begin = begin.to(tl.int32)
    first_chunk = tl.minimum(tl.maximum(first_output // L, begin), end)
    log_total = 0.0
    for chunk in range(begin, first_chunk):
        token = chunk * L + within
        dt, _ = load_steps(dt_pointer, bias_pointer, token, head, n_tokens, dt_stride_t)
        decay = decays(dt, rate, start_pointer, token, n_tokens, first_output, transpoint, L)
        b_LN = b.load([row, group, chunk * L, 0]).reshape(L, WIDTH_N)
        x_LV = x.load([row, head, chunk * L, v0]).reshape(L, BV)
        if states is not None:
            states.store([line, chunk, 0, v0], state.to(x_LV.dtype).reshape(1, 1, WIDTH_N, BV))
        state = advance(state, b_LN, x_LV, dt, decay, PRECISION)
        log_total += decay.log_carry
    if y is not None:
        for chunk in range(first_chunk, end):
            token = chunk * L + within
            dt, _ = load_steps(dt_pointer, bias_pointer, token, head, n_tokens, dt_stride_t)
            decay = decays(dt, rate, start_pointer, token, n_tokens, first_output, transpoint, L)
            log_decay, start = decay.log_decay, decay.start
            c_LN = c.load([row, group, chunk * L, 0]).reshape(L, WIDTH_N)
            b_LN = b.load([row, group, chunk * L, 0]).reshape(L, WIDTH_N)
            x_LV = x.load([row, head, chunk * L, v0]).reshape(L, BV)
            narrow = state.to(x_LV.dtype)
            if states is not None:
                states.store([line, chunk, 0, v0], narrow.reshape(1, 1, WIDTH_N, BV))
            sees = (within[:, None] >= within[None, :]) & (start[:, None] == start[None, :])
            pair = tl.exp2(tl.where(sees, log_decay[:, None] - log_decay[None, :], float("-inf")))
            weights_LL = tl.dot(c_LN, tl.trans(b_LN), input_precision=PRECISION) * pair * dt[None, :]
            read = tl.exp2(tl.where(decay.reads, log_decay, float("-inf")))
            y_LV = tl.dot(c_LN, narrow, input_precision=PRECISION) * read[:, None]
            y_LV = tl.dot(weights_LL.to(x_LV.dtype), x_LV, y_LV, input_precision=PRECISION)
            if D_pointer is not None:
                y_LV += tl.load(D_pointer + head).to(tl.float32) * x_LV.to(tl.float32)
            out_LV = y_LV.to(x_LV.dtype)
            if MASKED:
                out_LV = tl.where(decay.gives[:, None], out_LV, y.load([row, head, chunk * L, v0]).reshape(L, BV))
            y.store([row, head, chunk * L, v0], out_LV.reshape(1, 1, L, BV))
            state = advance(state, b_LN, x_LV, dt, decay, PRECISION)
            log_total += decay.log_carry
    if final is not None:
        final.store([line, segment, 0, v0], state.reshape(1, 1, WIDTH_N, BV))
    if carry_pointer is not None:
        tl.store(carry_pointer + line.to(tl.int64) * tl.num_programs(1) + segment, log_total)


@triton.jit
def pass_states_kernel(
    local_pointer,
    carry_pointer,
    initial_pointer,
    entering_pointer,
    n_segments,
    SIZE: tl.constexpr,
    BACKWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What enters every segment, from what each adds to a zero state and carries over; or the same for gradients."""
    line = tl.program_id(1).to(tl.int64)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < SIZE
    state = tl.zeros((BLOCK,), tl.float32)
    if initial_pointer is not None:
        state = tl.load(initial_pointer + line * SIZE + element, mask=inside, other=0.0)
    for step in range(n_segments):
        segment = line * n_segments + (n_segments - 1 - step if BACKWARD else step)
        tl.store(entering_pointer + segment * SIZE + element, state, mask=inside)
        added = tl.load(local_pointer + segment * SIZE + element, mask=inside, other=0.0)
        state = state * tl.exp2(tl.load(carry_pointer + segment)) + added
