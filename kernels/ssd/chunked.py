"""The scan in chunks: batched matrix products inside a chunk, one state passed from chunk to chunk.

The steps are numbered as in README.md. Work goes slab by slab, a slab being neighbouring chunks whose L x L
matrices fit the caches. What a chunk reads, the state that enters it and its own tokens, is one matrix of S = N + L
rows, its sources; what its tokens take from them is one matrix of weights. So the outputs are one product, and
their gradients are two. Both matrices are kept for the backward.
"""

# B batch, T tokens, C chunks of a slab, L tokens per chunk, H heads, G groups of B and C, N key/state width,
# V value width, S sources of a chunk (N rows of the entering state, then L tokens).

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
    per_group,
    spans,
    sum_after,
)


class Kept(NamedTuple):
    """What the backward needs of one slab; `weights` has no elements where a slab only builds state."""

    sources_BHCSV: Tensor
    weights_BHCLS: Tensor


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
    streams: Streams, state_BHNV: Tensor, documents: Documents | None, first_output: int, keep: bool
) -> tuple[Tensor, Tensor, list[Kept]]:
    """Outputs, final state, and if `keep` what `scan_backward` needs, slab by slab.

    `state_BHNV` is the state before the row, in the working precision, already zero where a document starts.
    """
    y_BTHV = torch.empty_like(streams.x_BTHV)
    y_BTHV[:, :first_output] = 0
    shared = Workspace(state_BHNV.dtype, state_BHNV.device)
    kept: list[Kept] = []
    for span in spans(streams, first_output):
        slab = load_slab(streams, span, documents, shared)
        lasting = Workspace(state_BHNV.dtype, state_BHNV.device) if keep else shared
        sources_BHCSV, state_BHNV = _sources(slab, state_BHNV, shared, lasting)
        weights_BHCLS = state_BHNV.new_empty(0)
        if slab.c_BGCLN is not None:
            weights_BHCLS = _weights(slab, slab.c_BGCLN, shared, lasting)
            _write_outputs(chunked(y_BTHV, span), shared.matmul("y", weights_BHCLS, sources_BHCSV), slab, streams.D_H)
        if keep:
            kept.append(Kept(sources_BHCSV, weights_BHCLS))
    return y_BTHV, state_BHNV.clone(), kept


def scan_backward(
    streams: Streams,
    kept: list[Kept],
    documents: Documents | None,
    first_output: int,
    dy_BTHV: Tensor,
    dstate_BHNV: Tensor,
) -> ScanGrads:
    """Gradients, given those of the outputs and of the final state; slabs from the last to the first.

    The decay of a token scales what passes over it: from a token before it, or the entering state, to a token
    after or at it, or the leaving state. The pairs of a token with itself, often the largest by far, are left
    out before the sums, so that they need not cancel.
    """
    dc, db, dx, ddt = (torch.empty_like(stream) for stream in streams[:4])
    dc[:, :first_output] = 0
    work = dstate_BHNV.dtype
    A_H = streams.A_H.to(work)
    dA_H, dD_H = torch.zeros_like(A_H), torch.zeros_like(A_H)
    space = Workspace(work, A_H.device)
    for span, slab_kept in reversed(list(zip(spans(streams, first_output), kept, strict=True))):
        slab = load_slab(streams, span, documents, space)
        dy_BHCLV = space.copy("dy", chunked(dy_BTHV, span)) if span.wants_output else None
        dwritten_BHCLN, du_BHCLV, dlog_BHCL, dstate_BHNV = _through_states(
            slab, slab_kept, dy_BHCLV, dstate_BHNV, space
        )
        db_BGCLN = None
        if dy_BHCLV is not None and slab.c_BGCLN is not None:
            dread_BHCLN, dpairs_BGCLL, dsum_BHCL = _through_weights(slab, slab_kept, dy_BHCLV, space)
            dlog_BHCL.add_(sum_after(dsum_BHCL, slab.together))
            dc_BGCLN = space.matmul("product", dpairs_BGCLL, slab.b_BGCLN)
            _write_groups(chunked(dc, span), dc_BGCLN, dread_BHCLN, slab.read_BHCL)
            db_BGCLN = space.matmul("product", dpairs_BGCLL.mT, slab.c_BGCLN)
        _write_groups(chunked(db, span), db_BGCLN, dwritten_BHCLN, slab.write_BHCL)
        ddt_BHCL = space.multiply("product", du_BHCLV, slab.x_BHCLV).sum(-1)
        chunked(ddt, span).copy_(ddt_BHCL.addcmul_(A_H[:, None, None], dlog_BHCL))
        dA_H += (slab.dt_BHCL * dlog_BHCL).sum((0, 2, 3))
        dx_BHCLV = chunked(dx, span)
        if streams.D_H is None or dy_BHCLV is None:
            torch.mul(du_BHCLV, slab.dt_BHCL[..., None], out=dx_BHCLV)
        else:
            du_BHCLV.mul_(slab.dt_BHCL[..., None])
            torch.addcmul(du_BHCLV, dy_BHCLV, streams.D_H.to(work)[:, None, None, None], out=dx_BHCLV)
            dD_H += space.multiply("product", dy_BHCLV, slab.x_BHCLV).sum((0, 2, 3, 4))
    return ScanGrads(dc, db, dx, ddt, dA_H, dD_H, dstate_BHNV)


def _sources(slab: Slab, state_BHNV: Tensor, shared: Workspace, lasting: Workspace) -> tuple[Tensor, Tensor]:
    """Steps 2 and 3: what the chunks read, u = dt x behind the states that enter; and the state after the slab."""
    n_state, n_chunk_tokens = state_BHNV.shape[2], slab.dt_BHCL.shape[3]
    sources_BHCSV = lasting.take("sources", *slab.dt_BHCL.shape[:3], n_state + n_chunk_tokens, state_BHNV.shape[3])
    states_BHCNV, u_BHCLV = sources_BHCSV[..., :n_state, :], sources_BHCSV[..., n_state:, :]
    torch.mul(slab.x_BHCLV, slab.dt_BHCL[..., None], out=u_BHCLV)
    added_BHCNV = shared.matmul("added", _written(slab, shared).mT, u_BHCLV)
    carry_BHC11 = slab.carry_BHC[..., None, None]
    states_BHCNV[:, :, 0] = state_BHNV
    for chunk in range(1, states_BHCNV.shape[2]):
        before = states_BHCNV[:, :, chunk - 1]
        torch.addcmul(added_BHCNV[:, :, chunk - 1], carry_BHC11[:, :, chunk - 1], before, out=states_BHCNV[:, :, chunk])
    return sources_BHCSV, added_BHCNV[:, :, -1].addcmul(carry_BHC11[:, :, -1], states_BHCNV[:, :, -1])


def _weights(slab: Slab, c_BGCLN: Tensor, shared: Workspace, lasting: Workspace) -> Tensor:
    """Step 4, what the tokens of a chunk take from its sources: c through the decay since they were written."""
    n_groups, n_state = c_BGCLN.shape[1], c_BGCLN.shape[-1]
    weights_BHCLS = lasting.take("weights", *slab.dt_BHCL.shape, n_state + slab.dt_BHCL.shape[3])
    read_BHCL1 = slab.read_BHCL[..., None]
    torch.mul(
        c_BGCLN[:, :, None], per_group(read_BHCL1, n_groups), out=per_group(weights_BHCLS[..., :n_state], n_groups)
    )
    pairs_BGCLL = shared.matmul("pairs", c_BGCLN, slab.b_BGCLN.mT)
    torch.mul(
        pairs_BGCLL[:, :, None],
        per_group(_pair_decays(slab, shared), n_groups),
        out=per_group(weights_BHCLS[..., n_state:], n_groups),
    )
    return weights_BHCLS


def _written(slab: Slab, space: Workspace) -> Tensor:
    """b through the decay until the state leaves: what u is multiplied with to become state; [B, H, C, L, N]."""
    n_groups = slab.b_BGCLN.shape[1]
    written_BHCLN = space.take("written", *slab.dt_BHCL.shape, slab.b_BGCLN.shape[-1])
    write_BHCL1 = slab.write_BHCL[..., None]
    torch.mul(slab.b_BGCLN[:, :, None], per_group(write_BHCL1, n_groups), out=per_group(written_BHCLN, n_groups))
    return written_BHCLN


def _pair_decays(slab: Slab, space: Workspace) -> Tensor:
    """Decay from token j to token i of a chunk; 0 where i may not see j; [B, H, C, L, L]."""
    decays_BHCLL = space.take("decays", *slab.log_decay_BHCL.shape, slab.log_decay_BHCL.shape[-1])
    torch.add(slab.barrier, slab.log_decay_BHCL[..., :, None], out=decays_BHCLL)
    return decays_BHCLL.sub_(slab.log_decay_BHCL[..., None, :]).exp2_()


def _write_outputs(target: Tensor, y_BHCLV: Tensor, slab: Slab, D_H: Tensor | None) -> None:
    """The last part of step 4: the skip, then out of the chunks."""
    if D_H is None:
        target.copy_(y_BHCLV)
    else:
        torch.addcmul(y_BHCLV, slab.x_BHCLV, D_H.to(y_BHCLV.dtype)[:, None, None, None], out=target)


def _through_states(
    slab: Slab, kept: Kept, dy_BHCLV: Tensor | None, dstate_BHNV: Tensor, space: Workspace
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Adjoint of steps 2 and 3: gradients of the written keys, of u, of dt * A so far, and of the entering state."""
    n_state = dstate_BHNV.shape[2]
    states_BHCNV, u_BHCLV = kept.sources_BHCSV[..., :n_state, :], kept.sources_BHCSV[..., n_state:, :]
    dleaving_BHCNV = space.take("dleaving", *states_BHCNV.shape)
    carry_BHC11 = slab.carry_BHC[..., None, None]
    if dy_BHCLV is None:
        dread_BHCNV, du_read_BHCLV = space.take("product", *states_BHCNV.shape).zero_(), None
    else:
        dsources_BHCSV = space.matmul("dsources", kept.weights_BHCLS.mT, dy_BHCLV)
        dread_BHCNV, du_read_BHCLV = dsources_BHCSV[..., :n_state, :], dsources_BHCSV[..., n_state:, :]
    for chunk in reversed(range(states_BHCNV.shape[2])):
        dleaving_BHCNV[:, :, chunk] = dstate_BHNV
        dstate_BHNV = torch.addcmul(dread_BHCNV[:, :, chunk], carry_BHC11[:, :, chunk], dstate_BHNV)
    written_BHCLN = _written(slab, space)
    dwritten_BHCLN = space.matmul("dwritten", u_BHCLV, dleaving_BHCNV.mT)
    passed_BHCL = space.multiply("product", written_BHCLN, dwritten_BHCLN).sum(-1)
    carried_BHC = space.multiply("product", states_BHCNV, dleaving_BHCNV).sum((-2, -1)) * slab.carry_BHC
    dlog_BHCL = pad(passed_BHCL[..., :-1].cumsum(-1), (1, 0)).add_(carried_BHC[..., None])
    du_BHCLV = space.matmul("du", written_BHCLN, dleaving_BHCNV)
    if du_read_BHCLV is not None:
        du_BHCLV.add_(du_read_BHCLV)
    return dwritten_BHCLN, du_BHCLV, dlog_BHCL, dstate_BHNV


def _through_weights(slab: Slab, kept: Kept, dy_BHCLV: Tensor, space: Workspace) -> tuple[Tensor, Tensor, Tensor]:
    """Adjoint of step 4: gradients of c times `read`, of c b^T, and of the decay sums up to each token."""
    n_state = slab.b_BGCLN.shape[-1]
    dweights_BHCLS = space.matmul("dweights", dy_BHCLV, kept.sources_BHCSV.mT)
    passed_BHCLS = space.multiply("passed", kept.weights_BHCLS, dweights_BHCLS)
    passed_BHCLL = passed_BHCLS[..., n_state:]
    passed_BHCLL.diagonal(dim1=-2, dim2=-1).zero_()
    dsum_BHCL = passed_BHCLS.sum(-1).sub_(passed_BHCLL.sum(-2))
    dpairs_BGKCLL = per_group(_pair_decays(slab, space).mul_(dweights_BHCLS[..., n_state:]), slab.b_BGCLN.shape[1])
    dpairs_BGCLL = dpairs_BGKCLL[:, :, 0] if dpairs_BGKCLL.shape[2] == 1 else dpairs_BGKCLL.sum(2)
    return dweights_BHCLS[..., :n_state], dpairs_BGCLL, dsum_BHCL


def _write_groups(target_BGCLN: Tensor, total_BGCLN: Tensor | None, part_BHCLN: Tensor, scale_BHCL: Tensor) -> None:
    """`total`, or 0, plus `part` times `scale` summed over the heads of every group, out of the chunks."""
    total = part_BHCLN.new_zeros(()) if total_BGCLN is None else total_BGCLN
    n_groups = target_BGCLN.shape[1]
    *others, last = zip(
        per_group(part_BHCLN, n_groups).unbind(2), per_group(scale_BHCL[..., None], n_groups).unbind(2), strict=True
    )
    for part, scale in others:
        total = torch.addcmul(total, part, scale)
    torch.addcmul(total, *last, out=target_BGCLN)
