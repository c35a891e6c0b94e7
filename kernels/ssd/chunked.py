"""The scan in chunks: batched matrix products inside a chunk, one state passed from chunk to chunk.

The steps are numbered as in README.md. Work goes slab by slab, a slab being neighbouring chunks whose L x L
matrices fit the caches. Saved for the backward: the inputs and one state per slab; all else is recomputed.
"""

# B batch, T tokens, C chunks of a slab, L tokens per chunk, H heads, G groups of B and C, N key/state width,
# V value width.

from typing import NamedTuple

import torch
from torch import Tensor

from transmamba.kernels.documents import Documents
from transmamba.kernels.ssd.slabs import Slab, Streams, chunked, load_slab, spans, to_groups, unchunked


class ScanGrads(NamedTuple):
    """Gradients of the streams and of the initial state."""

    c_BTGN: Tensor
    b_BTGN: Tensor
    x_BTHV: Tensor
    dt_BTH: Tensor
    A_H: Tensor
    D_H: Tensor
    initial_state_BHNV: Tensor


def scan_forward(
    streams: Streams, state_BHNV: Tensor, documents: Documents | None, first_output: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, final state, and the states that enter the slabs (slabs first).

    `state_BHNV` is the state before the row, in the working precision, already zero where a document starts.
    """
    n_rows, n_tokens, n_heads, _ = streams.x_BTHV.shape
    plan = spans(n_tokens, n_rows * n_heads, first_output)
    y_BTHV = torch.empty_like(streams.x_BTHV)
    y_BTHV[:, :first_output] = 0
    entering = state_BHNV.new_empty(len(plan), *state_BHNV.shape)
    for index, span in enumerate(plan):
        entering[index] = state_BHNV
        slab = load_slab(streams, span, documents)
        states_CBHNV = _pass_states(slab, state_BHNV)
        if span.wants_output:
            unchunked(y_BTHV, _outputs(slab, states_CBHNV, streams.D_H), span)
        state_BHNV = states_CBHNV[-1]
    return y_BTHV, state_BHNV.clone(), entering


def scan_backward(
    streams: Streams,
    entering: Tensor,
    documents: Documents | None,
    first_output: int,
    dy_BTHV: Tensor,
    dstate_BHNV: Tensor,
) -> ScanGrads:
    """Gradients, given those of the outputs and of the final state; slabs from the last to the first."""
    n_rows, n_tokens, n_heads, _ = streams.x_BTHV.shape
    n_groups = streams.b_BTGN.shape[2]
    plan = spans(n_tokens, n_rows * n_heads, first_output)
    dc, db, dx, ddt = (torch.empty_like(stream) for stream in streams[:4])
    dc[:, :first_output] = 0
    dA_H, dD_H = (entering.new_zeros(n_heads) for _ in range(2))
    A_H, D_H = (
        None if weight is None else weight.to(entering.dtype) for weight in (streams.A_H, streams.D_H)
    )
    assert A_H is not None
    for span, state_BHNV in reversed(list(zip(plan, entering, strict=True))):
        slab = load_slab(streams, span, documents)
        states_CBHNV = _pass_states(slab, state_BHNV)
        dy_CBHLV = chunked(dy_BTHV, span, entering.dtype) if span.wants_output else None
        dstates_CBHNV = _pass_gradients(slab, dy_CBHLV, dstate_BHNV)
        dc_CBHLN, db_CBHLN, du_CBHLV = _chunk_gradients(slab, dy_CBHLV, states_CBHNV, dstates_CBHNV)
        dda_CBHL = _decay_gradient(slab, dc_CBHLN, db_CBHLN, states_CBHNV, dstates_CBHNV)
        ddt_CBHL = (slab.x_CBHLV * du_CBHLV).sum(-1).addcmul_(A_H[:, None], dda_CBHL)
        dA_H += (slab.dt_CBHL * dda_CBHL).sum((0, 1, 3))
        dx_CBHLV = du_CBHLV.mul_(slab.dt_CBHL[..., None])
        if dc_CBHLN is not None:
            unchunked(dc, to_groups(dc_CBHLN, n_groups), span)
        if D_H is not None and dy_CBHLV is not None:
            dx_CBHLV.addcmul_(dy_CBHLV, D_H[:, None, None])
            dD_H += (dy_CBHLV * slab.x_CBHLV).sum((0, 1, 3, 4))
        unchunked(db, to_groups(db_CBHLN, n_groups), span)
        unchunked(dx, dx_CBHLV, span)
        unchunked(ddt, ddt_CBHL, span)
        dstate_BHNV = dstates_CBHNV[0]
    return ScanGrads(dc, db, dx, ddt, dA_H, dD_H, dstate_BHNV)


def _pass_states(slab: Slab, state_BHNV: Tensor) -> Tensor:
    """Steps 2 and 3: the C states that enter the chunks, then the one that leaves the slab."""
    weighted_CBHLV = slab.u_CBHLV * slab.write_CBHL[..., None]
    added_CBHNV = _matmul(slab.b_CBHLN.mT, weighted_CBHLV)
    states = added_CBHNV.new_empty(added_CBHNV.shape[0] + 1, *state_BHNV.shape)
    states[0] = state_BHNV
    carry_CBHNV = slab.carry_CBH[..., None, None]
    for index in range(added_CBHNV.shape[0]):
        torch.addcmul(added_CBHNV[index], states[index], carry_CBHNV[index], out=states[index + 1])
    return states


def _pair_decays(slab: Slab) -> Tensor:
    """Decay from token j to token i of a chunk; 0 where i may not see j."""
    pairs_CBHLL = slab.barrier + slab.decay_sum_CBHL[..., :, None]
    return pairs_CBHLL.sub_(slab.decay_sum_CBHL[..., None, :]).exp_()


def _outputs(slab: Slab, states_CBHNV: Tensor, D_H: Tensor | None) -> Tensor:
    """Step 4: what the tokens of a chunk read from each other and from the state that entered."""
    weights_CBHLL = _pair_decays(slab).mul_(_matmul(slab.c_CBHLN, slab.b_CBHLN.mT))
    y_CBHLV = _matmul(weights_CBHLL, slab.u_CBHLV)
    _add_matmul(y_CBHLV, slab.c_CBHLN * slab.read_CBHL[..., None], states_CBHNV[:-1])
    if D_H is not None:
        y_CBHLV.addcmul_(slab.x_CBHLV, D_H.to(y_CBHLV.dtype)[:, None, None])
    return y_CBHLV


def _pass_gradients(slab: Slab, dy_CBHLV: Tensor | None, dstate_BHNV: Tensor) -> Tensor:
    """Adjoint of step 3: gradient of the state that enters the slab, then of the C that leave chunks."""
    n_chunks = slab.carry_CBH.shape[0]
    dstates = dstate_BHNV.new_empty(n_chunks + 1, *dstate_BHNV.shape)
    dstates[-1] = dstate_BHNV
    carry_CBHNV = slab.carry_CBH[..., None, None]
    read_CBHNV = None
    if dy_CBHLV is not None:
        read_CBHNV = _matmul((slab.c_CBHLN * slab.read_CBHL[..., None]).mT, dy_CBHLV)
    for index in reversed(range(n_chunks)):
        torch.mul(dstates[index + 1], carry_CBHNV[index], out=dstates[index])
        if read_CBHNV is not None:
            dstates[index] += read_CBHNV[index]
    return dstates


def _chunk_gradients(
    slab: Slab, dy_CBHLV: Tensor | None, states_CBHNV: Tensor, dstates_CBHNV: Tensor
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Adjoints of steps 2 and 4: gradients of c, b and u, per head."""
    leaving_CBHNV = dstates_CBHNV[1:]
    db_CBHLN = _matmul(slab.u_CBHLV, leaving_CBHNV.mT).mul_(slab.write_CBHL[..., None])
    du_CBHLV = _matmul(slab.b_CBHLN, leaving_CBHNV).mul_(slab.write_CBHL[..., None])
    if dy_CBHLV is None:
        return None, db_CBHLN, du_CBHLV
    pairs_CBHLL = _pair_decays(slab)
    weights_CBHLL = _matmul(slab.c_CBHLN, slab.b_CBHLN.mT).mul_(pairs_CBHLL)
    _add_matmul(du_CBHLV, weights_CBHLL.mT, dy_CBHLV)
    dproduct_CBHLL = _matmul(dy_CBHLV, slab.u_CBHLV.mT).mul_(pairs_CBHLL)
    _add_matmul(db_CBHLN, dproduct_CBHLL.mT, slab.c_CBHLN)
    dc_CBHLN = _matmul(dy_CBHLV, states_CBHNV[:-1].mT).mul_(slab.read_CBHL[..., None])
    _add_matmul(dc_CBHLN, dproduct_CBHLL, slab.b_CBHLN)
    return dc_CBHLN, db_CBHLN, du_CBHLV


def _decay_gradient(
    slab: Slab, dc_CBHLN: Tensor | None, db_CBHLN: Tensor, states_CBHNV: Tensor, dstates_CBHNV: Tensor
) -> Tensor:
    """Gradient of dt * A per token.

    Every decay multiplies a c or a b, so the gradient of the decay sum at a token is c.dc - b.db there, and
    that of the chunk's last one adds <leaving state, its gradient>.
    """
    dsum_CBHL = -(slab.b_CBHLN * db_CBHLN).sum(-1)
    if dc_CBHLN is not None:
        dsum_CBHL += (slab.c_CBHLN * dc_CBHLN).sum(-1)
    dsum_CBHL[..., -1] += (states_CBHNV[1:] * dstates_CBHNV[1:]).sum((-2, -1))
    return dsum_CBHL.flip(-1).cumsum(-1).flip(-1)


def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """Product of contiguous stacks of matrices (or of their transposes)."""
    product = torch.bmm(left.flatten(0, 2), right.flatten(0, 2))
    return product.unflatten(0, left.shape[:3])


def _add_matmul(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product to a contiguous stack in place."""
    total.flatten(0, 2).baddbmm_(left.flatten(0, 2), right.flatten(0, 2))
