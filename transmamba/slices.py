"""Slices of global tensors: what one rank holds of them, and how slices become whole tensors again."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Shard(NamedTuple):
    """The part of a global tensor that a tensor-parallel rank holds: slice `part` of `n_parts` along `dim`."""

    dim: int
    part: int
    n_parts: int

    def of(self, whole: Tensor) -> Tensor:
        """This part of the whole tensor in its global shape."""
        return whole.chunk(self.n_parts, self.dim)[self.part]


class Piece(NamedTuple):
    """A contiguous range of one flattened tensor of one kind, global or a shard of it, on its way to disk.

    Kinds: "master" (float32 weight), "exp_avg", "exp_avg_sq" (Adam's moments), "buffer" (saved, not trained) and
    "weight" (a value under its usual name that training holds in parts).
    """

    name: str
    kind: str
    shape: Sequence[int]  # of the global tensor
    start: int
    values: Tensor
    shard: Shard | None = None


def check_cover(shape: Sequence[int], ranges: Mapping[Shard | None, Sequence[tuple[int, int]]]) -> None:
    """Check that sorted (start, length) ranges hold every element of a tensor, or of all its shards, exactly once.

    Raises:
        ValueError: something is missing, there twice, or cut in several ways.
    """
    first = next(iter(ranges))
    n_parts = 1 if first is None else first.n_parts
    wanted = {None} if first is None else {first._replace(part=part) for part in range(n_parts)}
    n_values = torch.Size(shape).numel()
    if any(size < 1 for size in shape):
        raise ValueError(f"are of the shape {shape}")
    if set(ranges) != wanted or n_values % n_parts or (first is not None and shape[first.dim] % n_parts):
        raise ValueError("belong to several layouts")
    for parts in ranges.values():
        end = 0
        for start, length in parts:
            if start != end or length < 1:
                raise ValueError("leave a hole or overlap")
            end += length
        if end * n_parts != n_values:
            raise ValueError("end early or go too far")


def assemble(shape: Sequence[int], shards: Mapping[Shard | None, Sequence[Tensor]]) -> Tensor:
    """One flattened global tensor from its slices in order, each part of it or of a shard of it exactly once.

    Raises:
        ValueError: something is missing or there twice.
    """
    flat = {shard: parts[0] if len(parts) == 1 else torch.cat(list(parts)) for shard, parts in shards.items()}
    check_cover(shape, {shard: [(0, part.numel())] for shard, part in flat.items()})
    first = next(iter(flat))
    if first is None:
        return flat[None]
    local = [size // first.n_parts if axis == first.dim else size for axis, size in enumerate(shape)]
    return torch.cat([flat[first._replace(part=i)].view(local) for i in range(first.n_parts)], first.dim).flatten()
