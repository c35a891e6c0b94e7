"""The scan in chunks: batched matrix products inside a chunk, one state passed from chunk to chunk.

The steps are numbered as in README.md. Work goes slab by slab, a slab being neighbouring chunks whose L x L
matrices fit the caches. Saved for the backward: the inputs and one state per slab; all else is recomputed.
"""

# B batch, T tokens, C chunks of a slab, L tokens per chunk, H heads, G groups of B and C, N key/state width,
# V value width.

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from transmamba.kernels.documents import Documents
from transmamba.kernels.ssd.slabs import (
    Slab,
    Streams,
    Workspace,
    chunked,
    load_slab,
    spans,
    sum_after,
    to_groups,
    unchunked,
)


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
    plan = spans(streams, first_output)
    y_BTHV = torch.empty_like(streams.x_BTHV)
    y_BTHV[:, :first_output] = 0
    entering = state_BHNV.new_empty(len(plan), *state_BHNV.shape)
    space = Workspace(state_BHNV.dtype, state_BHNV.device)
    for index, span in enumerate(plan):
        entering[index] = state_BHNV
        slab = load_slab(streams, span, documents, space)
        states_BHCNV, state_BHNV = _pass_states(slab, state_BHNV, space)
        if span.wants_output:
            unchunked(y_BTHV, _outputs(slab, states_BHCNV, streams.D_H, space), span)
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
    work, n_groups = entering.dtype, streams.b_BTGN.shape[2]
    plan = spans(streams, first_output)
    dc, db, dx, ddt = (torch.empty_like(stream) for stream in streams[:4])
    dc[:, :first_output] = 0
    A_H = streams.A_H.to(work)
    space = Workspace(work, A_H.device)
    dA_H, dD_H = torch.zeros_like(A_H), torch.zeros_like(A_H)
    for span, state_BHNV in reversed(list(zip(plan, entering, strict=True))):
        slab = load_slab(streams, span, documents, space)
        dy_BHCLV = chunked(dy_BTHV, span, space, "dy") if span.wants_output else None
        states_BHCNV, _ = _pass_states(slab, state_BHNV, space)
        dleaving_BHCNV, dentering_BHNV = _pass_gradients(slab, dy_BHCLV, dstate_BHNV, space)
        dc_BHCLN, db_BHCLN, du_BHCLV, dlog_BHCL = _chunk_gradients(slab, dy_BHCLV, states_BHCNV, dleaving_BHCNV, space)
        ddt_BHCL = space.multiply("scaled", slab.x_BHCLV, du_BHCLV).sum(-1).addcmul_(A_H[:, None, None], dlog_BHCL)
        dA_H += (slab.dt_BHCL * dlog_BHCL).sum((0, 2, 3))
        dx_BHCLV = du_BHCLV.mul_(slab.dt_BHCL[..., None])
        if dc_BHCLN is not None:
            unchunked(dc, to_groups(dc_BHCLN, n_groups), span)
        if streams.D_H is not None and dy_BHCLV is not None:
            dx_BHCLV.addcmul_(dy_BHCLV, streams.D_H.to(work)[:, None, None, None])
            dD_H += space.multiply("scaled", dy_BHCLV, slab.x_BHCLV).sum((0, 2, 3, 4))
        unchunked(db, to_groups(db_BHCLN, n_groups), span)
        unchunked(dx, dx_BHCLV, span)
        unchunked(ddt, ddt_BHCL, span)
        dstate_BHNV = dentering_BHNV
    return ScanGrads(dc, db, dx, ddt, dA_H, dD_H, dstate_BHNV)


def _transfers(carry_BHC: Tensor) -> Tensor:
    """Decay from the state that leaves chunk j to the one that enters chunk i: the carries in between."""
    n_chunks = carry_BHC.shape[-1]
    later = torch.ones(n_chunks, n_chunks, dtype=torch.bool, device=carry_BHC.device).tril(-1)
    factors_BHCC = torch.where(later[:-1], carry_BHC[..., :-1, None], 1).cumprod(-2)
    return pad(factors_BHCC, (0, 0, 1, 0)) * later


def _pass_states(slab: Slab, state_BHNV: Tensor, space: Workspace) -> tuple[Tensor, Tensor]:
    """Steps 2 and 3: the states that enter the chunks, and the one that leaves the slab."""
    weighted_BHCLV = space.multiply("scaled", slab.u_BHCLV, slab.write_BHCL[..., None])
    added_BHCNV = space.matmul("added", slab.b_BHCLN.mT, weighted_BHCLV)
    carry_BHC11 = slab.carry_BHC[..., None, None]
    added_BHCNV[:, :, 0].addcmul_(carry_BHC11[:, :, 0], state_BHNV)
    states_BHCNV = _mix_chunks(_transfers(slab.carry_BHC), added_BHCNV, space.take("states", *added_BHCNV.shape))
    states_BHCNV[:, :, 0] = state_BHNV
    leaving_BHNV = added_BHCNV[:, :, -1].clone()
    if states_BHCNV.shape[2] > 1:
        leaving_BHNV.addcmul_(carry_BHC11[:, :, -1], states_BHCNV[:, :, -1])
    return states_BHCNV, leaving_BHNV


def _pass_gradients(
    slab: Slab, dy_BHCLV: Tensor | None, dstate_BHNV: Tensor, space: Workspace
) -> tuple[Tensor, Tensor]:
    """Adjoint of step 3: gradients of the states that leave chunks, and of the one that enters the slab."""
    carry_BHC11 = slab.carry_BHC[..., None, None]
    if dy_BHCLV is None:
        read_BHCNV = dstate_BHNV.new_zeros(*slab.carry_BHC.shape, *dstate_BHNV.shape[2:])
    else:
        scaled_BHCLN = space.multiply("scaled", slab.c_BHCLN, slab.read_BHCL[..., None])
        read_BHCNV = space.matmul("added", scaled_BHCLN.mT, dy_BHCLV)
    read_BHCNV[:, :, -1].addcmul_(carry_BHC11[:, :, -1], dstate_BHNV)
    dleaving_BHCNV = _mix_chunks(_transfers(slab.carry_BHC).mT, read_BHCNV, space.take("dstates", *read_BHCNV.shape))
    dleaving_BHCNV[:, :, -1] = dstate_BHNV
    dentering_BHNV = read_BHCNV[:, :, 0].clone()
    if dleaving_BHCNV.shape[2] > 1:
        dentering_BHNV.addcmul_(carry_BHC11[:, :, 0], dleaving_BHCNV[:, :, 0])
    return dleaving_BHCNV, dentering_BHNV


def _pair_decays(slab: Slab, space: Workspace) -> Tensor:
    """Decay from token j to token i of a chunk; 0 where i may not see j."""
    pairs_BHCLL = space.take("pairs", *slab.log_decay_BHCL.shape, slab.log_decay_BHCL.shape[-1])
    torch.add(slab.barrier, slab.log_decay_BHCL[..., :, None], out=pairs_BHCLL)
    return pairs_BHCLL.sub_(slab.log_decay_BHCL[..., None, :]).exp2_()


def _outputs(slab: Slab, states_BHCNV: Tensor, D_H: Tensor | None, space: Workspace) -> Tensor:
    """Step 4: what the tokens of a chunk read from each other and from the state that entered."""
    weights_BHCLL = space.matmul("weights", slab.c_BHCLN, slab.b_BHCLN.mT).mul_(_pair_decays(slab, space))
    y_BHCLV = space.matmul("y", weights_BHCLL, slab.u_BHCLV)
    scaled_BHCLN = space.multiply("scaled", slab.c_BHCLN, slab.read_BHCL[..., None])
    _add_matmul(y_BHCLV, scaled_BHCLN, states_BHCNV)
    if D_H is not None:
        y_BHCLV.addcmul_(slab.x_BHCLV, D_H.to(y_BHCLV.dtype)[:, None, None, None])
    return y_BHCLV


def _chunk_gradients(
    slab: Slab,
    dy_BHCLV: Tensor | None,
    states_BHCNV: Tensor,
    dleaving_BHCNV: Tensor,
    space: Workspace,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Adjoints of steps 2 and 4: gradients of c, b, u and dt * A, per head.

    The decay of a token scales what passes over it: from a token before it, or the entering state, to a token
    after or at it, or the leaving state. The pairs of a token with itself, often the largest by far, are left
    out before the sums, so that they need not cancel.
    """
    db_BHCLN = space.matmul("db", slab.u_BHCLV, dleaving_BHCNV.mT).mul_(slab.write_BHCL[..., None])
    du_BHCLV = space.matmul("du", slab.b_BHCLN, dleaving_BHCNV).mul_(slab.write_BHCL[..., None])
    written_BHCL = space.multiply("scaled", slab.b_BHCLN, db_BHCLN).sum(-1)
    kept_BHC = space.multiply("added", states_BHCNV, dleaving_BHCNV).sum((-2, -1)) * slab.carry_BHC
    dlog_BHCL = pad(written_BHCL[..., :-1].cumsum(-1), (1, 0)).add_(kept_BHC[..., None])
    if dy_BHCLV is None:
        return None, db_BHCLN, du_BHCLV, dlog_BHCL
    pairs_BHCLL = _pair_decays(slab, space)
    weights_BHCLL = space.matmul("weights", slab.c_BHCLN, slab.b_BHCLN.mT).mul_(pairs_BHCLL)
    _add_matmul(du_BHCLV, weights_BHCLL.mT, dy_BHCLV)
    dweights_BHCLL = space.matmul("dweights", dy_BHCLV, slab.u_BHCLV.mT)
    passed_BHCLL = weights_BHCLL.mul_(dweights_BHCLL)
    passed_BHCLL.diagonal(dim1=-2, dim2=-1).zero_()
    dproduct_BHCLL = dweights_BHCLL.mul_(pairs_BHCLL)
    _add_matmul(db_BHCLN, dproduct_BHCLL.mT, slab.c_BHCLN)
    dc_BHCLN = space.matmul("dc", dy_BHCLV, states_BHCNV.mT).mul_(slab.read_BHCL[..., None])
    dsum_BHCL = (
        space.multiply("scaled", slab.c_BHCLN, dc_BHCLN).sum(-1).add_(passed_BHCLL.sum(-1)).sub_(passed_BHCLL.sum(-2))
    )
    _add_matmul(dc_BHCLN, dproduct_BHCLL, slab.b_BHCLN)
    return dc_BHCLN, db_BHCLN, du_BHCLV, dlog_BHCL.add_(sum_after(dsum_BHCL, slab.together))


def _add_matmul(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product to a contiguous stack in place."""
    total.flatten(0, 2).baddbmm_(left.flatten(0, 2), right.flatten(0, 2))


def _mix_chunks(weights_BHCC: Tensor, states_BHCNV: Tensor, mixed_BHCNV: Tensor) -> Tensor:
    """Weighted sums of the states of a slab, written to `mixed_BHCNV`."""
    source, target = (states.flatten(3).flatten(0, 1) for states in (states_BHCNV, mixed_BHCNV))
    torch.bmm(weights_BHCC.flatten(0, 1), source, out=target)
    return mixed_BHCNV
