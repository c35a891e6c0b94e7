"""The scan in Triton, backward: the state's gradient from the last chunk to the first, then all chunks at once."""

# B batch, T tokens, H heads, G groups of B and C, N key/state width, V value width, L tokens per chunk,
# BV columns of V in a program.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportIndexIssue=false

import triton
import triton.language as tl

from transmamba.kernels.ssd.triton_tiles import decays, load_steps, sum_from


@triton.jit
def state_bwd_kernel(
    c,
    dy,
    dstates,
    dfinal,
    dinitial,
    dt_pointer,
    bias_pointer,
    A_pointer,
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
    dstate = tl.zeros((WIDTH_N, BV), tl.float32)
    if dfinal is not None:
        dstate = dfinal.load([line, segment, 0, v0]).reshape(WIDTH_N, BV)
    begin = segment.to(tl.int64) * chunks_per_segment
    end = tl.minimum(begin + chunks_per_segment, n_chunks).to(tl.int32)
    begin = begin.to(tl.int32)
    first_chunk = tl.minimum(tl.maximum(first_output // L, begin), end)
    log_total = 0.0
    for step in range(end - first_chunk):
        chunk = (end.to(tl.int64) - 1 - step).to(tl.int32)
        token = chunk * L + within
        dt, _ = load_steps(dt_pointer, bias_pointer, token, head, n_tokens, dt_stride_t)
        decay = decays(dt, rate, start_pointer, token, n_tokens, first_output, transpoint, L)
        c_LN = c.load([row, group, chunk * L, 0]).reshape(L, WIDTH_N)
        dy_LV = dy.load([row, head, chunk * L, v0]).reshape(L, BV)
        if dstates is not None:
            dstates.store([line, chunk, 0, v0], dstate.to(dy_LV.dtype).reshape(1, 1, WIDTH_N, BV))
        read = tl.exp2(tl.where(decay.reads & decay.gives, decay.log_decay, float("-inf")))
        read_LV = (dy_LV.to(tl.float32) * read[:, None]).to(dy_LV.dtype)
        dstate = tl.dot(tl.trans(c_LN), read_LV, dstate * tl.exp2(decay.log_carry), input_precision=PRECISION)
        log_total += decay.log_carry
    for step in range(first_chunk - begin):
        chunk = (first_chunk.to(tl.int64) - 1 - step).to(tl.int32)
        token = chunk * L + within
        dt, _ = load_steps(dt_pointer, bias_pointer, token, head, n_tokens, dt_stride_t)
        decay = decays(dt, rate, start_pointer, token, n_tokens, first_output, transpoint, L)
        if dstates is not None:
            dstates.store([line, chunk, 0, v0], dstate.to(dstates.dtype).reshape(1, 1, WIDTH_N, BV))
        dstate *= tl.exp2(decay.log_carry)
        log_total += decay.log_carry
    if dinitial is not None:
        dinitial.store([line, segment, 0, v0], dstate.reshape(1, 1, WIDTH_N, BV))
    if carry_pointer is not None:
        tl.store(carry_pointer + line.to(tl.int64) * tl.num_programs(1) + segment, log_total)


@triton.jit
def carried(state, dstate, log_carry):
    """What the decay of the whole chunk has as its gradient: the part of the entering state that leaves."""
    return tl.sum(tl.sum(dstate.to(tl.float32) * state.to(tl.float32), 1), 0) * tl.exp2(log_carry)


@triton.jit
def store_step_gradients(ddt_pointer, sums_pointer, inside, n_heads, ddt, dda, dD, dt, slope, rate):
    """Gradients of what the step sizes were made of, and a chunk's parts of those that are sums over tokens.

    `ddt` is the gradient of the step sizes but for what they do to the decay, which has `dda`. The sums, [B * C, 3, H],
    are those of A, of the bias and of D.
    """
    dlogit = (ddt + dda * rate) * slope
    tl.store(ddt_pointer, dlogit.to(ddt_pointer.dtype.element_ty), mask=inside)
    tl.store(sums_pointer, tl.sum(dda * dt, 0))
    tl.store(sums_pointer + n_heads, tl.sum(dlogit, 0))
    tl.store(sums_pointer + n_heads + n_heads, dD)


@triton.jit
def prefix_bwd_kernel(
    b,
    x,
    states,
    dstates,
    dc,
    db,
    dx,
    dt_pointer,
    bias_pointer,
    A_pointer,
    start_pointer,
    ddt_pointer,
    sums_pointer,
    n_tokens,
    n_heads,
    heads_per_group,
    n_chunks,
    first_output,
    transpoint,
    dt_stride_b,
    dt_stride_t,
    dt_stride_h,
    WIDTH_N: tl.constexpr,
    WIDTH_V: tl.constexpr,
    L: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Chunks without outputs: only the leaving state depends on them."""
    chunk, line = tl.program_id(0), tl.program_id(1)
    at = (chunk.to(tl.int64) * L).to(tl.int32)
    row, head = line // n_heads, line % n_heads
    group = head // heads_per_group
    offset = row.to(tl.int64) * dt_stride_b + head.to(tl.int64) * dt_stride_h
    if start_pointer is not None:
        start_pointer += row.to(tl.int64) * n_tokens
    rate = tl.load(A_pointer + head).to(tl.float32)
    token = at + tl.arange(0, L)
    dt, slope = load_steps(dt_pointer + offset, bias_pointer, token, head, n_tokens, dt_stride_t)
    decay = decays(dt, rate, start_pointer, token, n_tokens, first_output, transpoint, L)
    write = tl.exp2(tl.where(decay.writes, decay.log_rest, float("-inf")))
    state = states.load([line, chunk, 0, 0]).reshape(WIDTH_N, WIDTH_V)
    dstate = dstates.load([line, chunk, 0, 0]).reshape(WIDTH_N, WIDTH_V)
    d_carry = carried(state, dstate, decay.log_carry)
    b_LN = b.load([row, group, at, 0]).reshape(L, WIDTH_N)
    dx_LV = tl.dot(b_LN, dstate, input_precision=PRECISION) * write[:, None]
    x_LV = x.load([row, head, at, 0]).reshape(L, WIDTH_V)
    dtype = x_LV.dtype
    wrote = tl.sum(dx_LV * x_LV.to(tl.float32), 1)
    dx.store([row, head, at, 0], (dx_LV * dt[:, None]).to(dtype).reshape(1, 1, L, WIDTH_V))
    db_LN = tl.dot(x_LV, tl.trans(dstate), input_precision=PRECISION) * (write * dt)[:, None]
    db.store([row, head, at, 0], db_LN.to(dtype).reshape(1, 1, L, WIDTH_N))
    dc.store([row, head, at, 0], tl.zeros((1, 1, L, WIDTH_N), dtype))
    written = wrote * dt
    dda = tl.cumsum(written, 0) - written + d_carry
    if start_pointer is not None:
        dda = tl.where(token == decay.start, 0.0, dda)
    ddt_pointer += offset + token.to(tl.int64) * dt_stride_t
    sums_pointer += (row.to(tl.int64) * n_chunks + chunk) * 3 * n_heads + head
    store_step_gradients(ddt_pointer, sums_pointer, token < n_tokens, n_heads, wrote, dda, 0.0, dt, slope, rate)


@triton.jit
def chunk_bwd_kernel(
    c,
    b,
    x,
    dy,
    states,
    dstates,
    dc,
    db,
    dx,
    dt_pointer,
    bias_pointer,
    A_pointer,
    D_pointer,
    start_pointer,
    ddt_pointer,
    sums_pointer,
    n_tokens,
    n_heads,
    heads_per_group,
    n_chunks,
    first_chunk,
    first_output,
    transpoint,
    dt_stride_b,
    dt_stride_t,
    dt_stride_h,
    WIDTH_N: tl.constexpr,
    WIDTH_V: tl.constexpr,
    L: tl.constexpr,
    C_AGAIN: tl.constexpr,
    STATES_AGAIN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Chunks with outputs.

    What it lacks is registers: a tile whose elements are summed one by one is in them from its load to the sum, as an
    operand of products it is not. So a load stands right before the sum, and where tiles are wide c and the states
    are loaded again for what comes later.
    """
    chunk, line = tl.program_id(0).to(tl.int64) + first_chunk, tl.program_id(1)
    at = (chunk * L).to(tl.int32)
    chunk = chunk.to(tl.int32)
    row, head = line // n_heads, line % n_heads
    group = head // heads_per_group
    offset = row.to(tl.int64) * dt_stride_b + head.to(tl.int64) * dt_stride_h
    if start_pointer is not None:
        start_pointer += row.to(tl.int64) * n_tokens
    rate = tl.load(A_pointer + head).to(tl.float32)
    within = tl.arange(0, L)
    token = at + within
    dt, slope = load_steps(dt_pointer + offset, bias_pointer, token, head, n_tokens, dt_stride_t)
    decay = decays(dt, rate, start_pointer, token, n_tokens, first_output, transpoint, L)
    log_decay, start, gives = decay.log_decay, decay.start, decay.gives
    b_LN = b.load([row, group, at, 0]).reshape(L, WIDTH_N)
    c_LN = c.load([row, group, at, 0]).reshape(L, WIDTH_N)
    dtype = c_LN.dtype
    # The pairs of README.md's step 4 as [j, i]: what token j writes and token i reads.
    sees = (within[:, None] <= within[None, :]) & (start[:, None] == start[None, :]) & gives[None, :]
    pair = tl.exp2(tl.where(sees, log_decay[None, :] - log_decay[:, None], float("-inf")))
    m_JI = tl.dot(b_LN, tl.trans(c_LN), input_precision=PRECISION) * pair * dt[:, None]
    is_same = (within[:, None] == within[None, :]) & gives[None, :]
    if D_pointer is not None:
        m_JI += tl.where(is_same, tl.load(D_pointer + head).to(tl.float32), 0.0)
    state = states.load([line, chunk, 0, 0]).reshape(WIDTH_N, WIDTH_V)
    dstate = dstates.load([line, chunk, 0, 0]).reshape(WIDTH_N, WIDTH_V)
    d_carry = carried(state, dstate, decay.log_carry)
    write = tl.exp2(tl.where(decay.writes, decay.log_rest, float("-inf")))
    dx_LV = tl.dot(b_LN, dstate, input_precision=PRECISION) * write[:, None]
    x_LV = x.load([row, head, at, 0]).reshape(L, WIDTH_V)
    wrote = tl.sum(dx_LV * x_LV.to(tl.float32), 1)
    dy_LV = dy.load([row, head, at, 0]).reshape(L, WIDTH_V)
    dx_LV = tl.dot(m_JI.to(dtype), dy_LV, dx_LV * dt[:, None], input_precision=PRECISION)
    dx.store([row, head, at, 0], dx_LV.to(dtype).reshape(1, 1, L, WIDTH_V))
    dm_JI = tl.dot(x_LV, tl.trans(dy_LV), input_precision=PRECISION)
    dD = 0.0
    if D_pointer is not None:
        dD = tl.sum(tl.sum(tl.where(is_same, dm_JI, 0.0), 1), 0)
    dm_JI *= pair
    w_JI = tl.dot(b_LN, tl.trans(c_LN), input_precision=PRECISION) * dm_JI
    ddt = wrote + tl.sum(w_JI, 1)
    w_JI = tl.where(within[:, None] < within[None, :], w_JI, 0.0) * dt[:, None]
    dcs = tl.sum(w_JI, 0) - tl.sum(w_JI, 1)
    db_LN = tl.dot(x_LV, tl.trans(dstate), input_precision=PRECISION) * (write * dt)[:, None]
    db_LN = tl.dot((dm_JI * dt[:, None]).to(dtype), c_LN, db_LN, input_precision=PRECISION)
    db.store([row, head, at, 0], db_LN.to(dtype).reshape(1, 1, L, WIDTH_N))
    # [i, j], computed anew: Hopper code for a product with a transposed accumulator is wrong in Triton 3.4 to 3.7.0.
    read = tl.exp2(tl.where(decay.reads & gives, log_decay, float("-inf")))
    if STATES_AGAIN:
        state = states.load([line, chunk, 0, 0]).reshape(WIDTH_N, WIDTH_V)
    dc_LN = tl.dot(dy_LV, tl.trans(state), input_precision=PRECISION) * read[:, None]
    if C_AGAIN:
        c_LN = c.load([row, group, at, 0]).reshape(L, WIDTH_N)
    dcs += tl.sum(dc_LN * c_LN.to(tl.float32), 1)
    sees = (within[:, None] >= within[None, :]) & (start[:, None] == start[None, :]) & gives[:, None]
    pair = tl.exp2(tl.where(sees, log_decay[:, None] - log_decay[None, :], float("-inf")))
    dm_IJ = tl.dot(dy_LV, tl.trans(x_LV), input_precision=PRECISION) * pair * dt[None, :]
    dc_LN = tl.dot(dm_IJ.to(dtype), b_LN, dc_LN, input_precision=PRECISION)
    dc.store([row, head, at, 0], dc_LN.to(dtype).reshape(1, 1, L, WIDTH_N))
    # The decay of token t scales pairs j < t <= i, reads at i >= t, writes at j < t, and the carried state.
    if start_pointer is None:
        dda = tl.cumsum(dcs, 0, reverse=True)
    else:
        dda = tl.where(token == start, 0.0, sum_from(dcs, start, decay.next_start))
    wrote *= dt
    dda += tl.cumsum(wrote, 0) - wrote + d_carry
    ddt_pointer += offset + token.to(tl.int64) * dt_stride_t
    sums_pointer += (row.to(tl.int64) * n_chunks + chunk) * 3 * n_heads + head
    store_step_gradients(ddt_pointer, sums_pointer, token < n_tokens, n_heads, ddt, dda, dD, dt, slope, rate)
