"""Where a run is in its data: the global batch of a step, and the lengths that its windows had. Imports no torch."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transmamba.data_pipeline.mixture import Length


def data_step_of(step: int, skip: Sequence[str]) -> int:
    """The global batch of training step `step` when the ranges "first:last" of batches are left out."""
    for first, last in sorted(tuple(int(end) for end in text.split(":")) for text in skip):
        if step >= first:
            step += last - first
    return step


def data_steps_past(n_steps: int, skip: Sequence[str]) -> int:
    """Global batches that lie behind a run of `n_steps` steps; a range to skip that comes next is still ahead."""
    return data_step_of(n_steps - 1, skip) + 1 if n_steps else 0


def lengths_of(manifest: dict[str, Any], seq_len: int) -> "list[Length]":
    """The lengths of a run's windows so far and, from a checkpoint on, `seq_len`.

    A checkpoint holds the list under `data.lengths` once there are two of them; without it all windows had the length
    of its configuration.

    Args:
        manifest: of the checkpoint.
        seq_len: of the run that goes on from it.
    """
    # It brings numpy; a configuration is checked without.
    from transmamba.data_pipeline.mixture import Length

    config, recorded = manifest["config"], manifest["data"].get("lengths")
    lengths = [Length(*entry) for entry in recorded or [(0, config["data"]["seq_len"])]]
    if lengths[-1].seq_len == seq_len:
        return lengths
    n_batches = data_steps_past(manifest["step"], config["data"].get("skip", []))
    now = Length(n_batches * config["train"]["global_batch"], seq_len)
    return [*(length for length in lengths if length.first < now.first), now]
