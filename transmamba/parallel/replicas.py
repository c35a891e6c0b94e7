"""Weights that several ranks hold must be the same bit for bit; a drift is found by comparing checksums."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from transmamba.parallel.shards import shard_dim
from transmamba.parallel.topology import Topology

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, so that no single changed bit can vanish modulo 2^64


class Drift(NamedTuple):
    """Ranks that disagree about one weight."""

    name: str
    ranks: list[int]  # the fewest that differ from the rest; all of them where there is no majority


def find_drift(weights: Mapping[str, nn.Parameter], topology: Topology) -> list[Drift]:
    """Compare this rank's weights with every rank that must hold the same; every rank gets its own findings.

    Over dp x cp all weights are replicas, over tp those that are not cut. Weights that ZeRO has partitioned (stage 3)
    have no replicas and are passed over.
    """
    names = [name for name, weight in weights.items() if weight.numel()]
    if not names:
        return []
    sums = torch.stack([checksum(weights[name]) for name in names])
    is_cut = [shard_dim(weights[name]) is not None for name in names]
    found = _compare(names, sums, topology.replica_group, topology.replicas)
    whole = [index for index, cut in enumerate(is_cut) if not cut]
    if whole:
        found += _compare([names[i] for i in whole], sums[whole], topology.shards.tp_group, topology.shards.tp)
    return found


def checksum(values: Tensor) -> Tensor:
    """A 64-bit number that changes with any single bit and with the order of `values`."""
    bits = values.detach().flatten().view(_BITS[values.element_size()]).to(torch.int64)
    place = torch.arange(bits.numel(), device=bits.device) * 2 + 1
    return (bits * (place * _MULTIPLIER)).sum()


def _compare(names: list[str], sums: Tensor, group: object, size: int) -> list[Drift]:
    if size == 1:
        return []
    every = [torch.empty_like(sums) for _ in range(size)]
    dist.all_gather(every, sums, group=group)  # pyright: ignore[reportArgumentType]
    table = torch.stack(every).cpu()
    ranks = dist.get_process_group_ranks(group)  # pyright: ignore[reportArgumentType]
    found = []
    for column in (table != table[0]).any(0).nonzero().flatten().tolist():
        values = table[:, column].tolist()
        usual = max(set(values), key=values.count)
        has_majority = 2 * values.count(usual) > size
        odd = [rank for rank, value in zip(ranks, values, strict=True) if value != usual or not has_majority]
        found.append(Drift(names[column], odd))
    return found
