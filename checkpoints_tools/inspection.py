"""What is in a checkpoint: its tensors as a tree, with shapes, statistics and whether their bytes are as written."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.tree import Tree
from torch import Tensor

from transmamba.checkpoint import Checkpoint
from transmamba.sealed import CheckpointError

SHOWN = ("config", "data", "format_version", "random", "schedule", "threads", "tokens_seen", "versions", "world_size")


@dataclass(frozen=True)
class TensorFacts:
    """One tensor of one kind. Statistics are of its finite values, in float64; None where it cannot be read."""

    name: str
    kind: str
    shape: list[int]
    dtype: str
    n_slices: int
    shards: int  # how many tensor-parallel parts it was saved in
    mean: float | None = None
    std: float | None = None
    low: float | None = None
    high: float | None = None
    n_zeros: int | None = None
    n_non_finite: int | None = None
    fault: str | None = None  # why it must not be used; None when every byte is as written


def facts(checkpoint: Checkpoint) -> Iterator[TensorFacts]:
    """Every tensor, one in memory at a time."""
    for (name, kind), shards in checkpoint.slices.items():
        slices = [entry for entries in shards.values() for entry in entries]
        shape = checkpoint.manifest["tensors"][name]
        known = TensorFacts(name, kind, shape, slices[0].dtype, len(slices), len(shards))
        try:
            values = checkpoint.tensors[name, kind]
        except CheckpointError as error:
            yield replace(known, fault=str(error))
            continue
        yield replace(known, **_statistics(values))


def _statistics(values: Tensor) -> dict[str, Any]:
    exact = values.double()
    finite = exact[exact.isfinite()]
    counts = {"n_zeros": int((exact == 0).sum()), "n_non_finite": exact.numel() - finite.numel()}
    if not finite.numel():
        return counts
    low, high = finite.aminmax()
    spread = float(finite.std(correction=0))
    return counts | {"mean": float(finite.mean()), "std": spread, "low": float(low), "high": float(high)}


def tree(checkpoint: Checkpoint, rows: list[TensorFacts]) -> Tree:
    """The tensors below the parts of their names."""
    n_bytes = sum(entry["bytes"] for entry in checkpoint.manifest["files"].values())
    root = Tree(f"{checkpoint.path}  step {checkpoint.step}  {len(rows)} tensors  {n_bytes:,} bytes")
    branches: dict[str, Tree] = {"": root}
    for row in sorted(rows, key=lambda row: [part.zfill(6) for part in row.name.split(".")]):
        parts = row.name.split(".")
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            if path not in branches:
                size = f"  {' x '.join(map(str, row.shape))}" if depth == len(parts) else ""
                branches[path] = branches[".".join(parts[: depth - 1])].add(f"{parts[depth - 1]}{size}")
        branches[row.name].add(_line(row), style="red" if row.fault or row.n_non_finite else "")
    return root


def _line(row: TensorFacts) -> str:
    if row.fault is not None:
        return f"{row.kind:<10} DAMAGED: {row.fault}"
    numbers = (
        "all values non-finite"
        if row.mean is None
        else (f"mean {row.mean:+.3e}  std {row.std:.3e}  from {row.low:+.3e} to {row.high:+.3e}")
    )
    extra = f"  {row.n_non_finite} non-finite" if row.n_non_finite else ""
    extra += f"  {row.n_zeros} zeros" if row.n_zeros else ""
    slices = f"{row.n_slices} slice" + ("s" if row.n_slices > 1 else "")
    return f"{row.kind:<10} {row.dtype:<5} {numbers}{extra}  ({slices}, verified)"


def as_json(checkpoint: Checkpoint, rows: list[TensorFacts]) -> dict[str, Any]:
    """The same for programs, with what the manifest says beside the tensors."""
    about = {key: checkpoint.manifest[key] for key in SHOWN if key in checkpoint.manifest}
    return {"path": str(checkpoint.path), "step": checkpoint.step, **about, "tensors": [asdict(row) for row in rows]}
