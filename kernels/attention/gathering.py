"""Tokens of a batch into the order in which they attend, and back."""

from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class Gathering(NamedTuple):
    """Which token lies where: `tokens` once each, at the places `slots` of the list that `order` makes.

    `order` may hold a token more than once, as padding. Without `slots` the list is `tokens` itself.
    """

    order: Tensor
    tokens: Tensor
    slots: Tensor | None = None


class _TakeGrads(NamedTuple):
    flat: Tensor
    gathering: None = None


class Take(Function):
    """Tokens into slots. Padding sends no gradient back: the adjoint writes a token at most once."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, gathering: Gathering) -> Tensor:
        """Of all tokens [B * T, ...] those that attend."""
        ctx.gathering, ctx.n_flat = gathering, flat.shape[0]
        return flat.index_select(0, gathering.order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> _TakeGrads:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Zero for tokens without a slot."""
        return _TakeGrads(_spread(grads[0], ctx.gathering, ctx.n_flat))


class _PutGrads(NamedTuple):
    listed: Tensor
    gathering: None = None
    n_flat: None = None


class Put(Function):
    """Slots back to tokens; tokens without a slot become 0."""

    @staticmethod
    def forward(ctx: Any, listed: Tensor, gathering: Gathering, n_flat: int) -> Tensor:
        """All tokens [n_flat, ...]."""
        ctx.gathering, ctx.n_slots = gathering, listed.shape[0]
        return _spread(listed, gathering, n_flat)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> _PutGrads:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Zero for slots that hold padding."""
        (d_flat,), gathering = grads, ctx.gathering
        d_tokens = d_flat.index_select(0, gathering.tokens)
        if gathering.slots is None:
            return _PutGrads(d_tokens)
        d_listed = d_flat.new_zeros(ctx.n_slots, *d_flat.shape[1:])
        return _PutGrads(d_listed.index_copy_(0, gathering.slots, d_tokens))


def _spread(listed: Tensor, gathering: Gathering, n_flat: int) -> Tensor:
    if gathering.slots is not None:
        listed = listed.index_select(0, gathering.slots)
    return listed.new_zeros(n_flat, *listed.shape[1:]).index_copy_(0, gathering.tokens, listed)
