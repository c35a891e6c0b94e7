"""How far two checkpoints are apart, tensor by tensor and key by key."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from transmamba.checkpoint import Checkpoint


@dataclass(frozen=True)
class Difference:
    """Of one tensor of one kind; None where it is in one checkpoint only, or has another shape."""

    name: str
    kind: str
    says: str  # "equal", "differs", "other shape", "only in the first", "only in the second"
    n_values: int = 0
    n_differing: int | None = None  # values whose bits differ
    largest: float | None = None  # difference of two values
    relative: float | None = None  # L2 norm of the difference over that of the first


def tensor_differences(one: Checkpoint, other: Checkpoint) -> Iterator[Difference]:
    """Every tensor of either, two in memory at a time."""
    for name, kind in sorted(one.slices.keys() | other.slices.keys()):
        if (name, kind) not in other.slices or (name, kind) not in one.slices:
            yield Difference(name, kind, f"only in the {'first' if (name, kind) in one.slices else 'second'}")
        elif one.manifest["tensors"][name] != other.manifest["tensors"][name]:
            yield Difference(name, kind, "other shape")
        else:
            yield _compare(name, kind, one, other)


def _compare(name: str, kind: str, one: Checkpoint, other: Checkpoint) -> Difference:
    first, second = one.tensors[name, kind], other.tensors[name, kind]
    same_bits = torch.equal(first.view(torch.uint8), second.view(torch.uint8)) if first.dtype == second.dtype else False
    if same_bits:
        return Difference(name, kind, "equal", first.numel(), 0, 0.0, 0.0)
    gap, scale = (first.double() - second.double()), float(first.double().norm())
    # A difference of two zeros or two infinities of unlike bits is none; what is not a number differs from everything.
    n_differing = int((first.double() != second.double()).sum())
    relative = float(gap.norm()) / scale if scale else float("inf")
    return Difference(name, kind, "differs", first.numel(), n_differing, float(gap.abs().max()), relative)


def key_differences(one: Checkpoint, other: Checkpoint) -> Iterator[tuple[str, Any, Any]]:
    """What the manifests say differently beside the tensors: key, first, second."""
    flat = [dict(_flat(checkpoint.manifest)) for checkpoint in (one, other)]
    for key in sorted(flat[0].keys() | flat[1].keys()):
        if flat[0].get(key) != flat[1].get(key):
            yield key, flat[0].get(key), flat[1].get(key)


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if not prefix and key in ("tensors", "slices", "files"):
            continue
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
