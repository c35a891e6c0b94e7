"""Held-out loss: nats per token and bits per byte of a validation set, next to two yardsticks of the same text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from transmamba.batches import Packer
from transmamba.data_pipeline.stream import Stream
from transmamba.parallel.pipeline import Stage, run_schedule


@dataclass(frozen=True)
class Held:
    """A validation set: its windows in the order of the text, and what a byte counts for."""

    name: str
    stream: Stream
    packer: Packer
    token_bytes: np.ndarray  # bytes that each token id stands for

    def unigram_entropy(self) -> float:
        """Entropy in nats per token of the set's own token frequencies: what counting alone can reach."""
        counts = self.stream.token_counts()
        share = counts[counts > 0] / counts.sum()
        return float(-(share * np.log(share)).sum())

    @property
    def gzip_bits_per_byte(self) -> float | None:
        """What gzip -9 makes of the same text."""
        return self.stream.store.split.gzip9_bits_per_byte


@dataclass(frozen=True)
class HeldOut:
    """Result of one validation."""

    loss: float
    """Nats per token."""
    bits_per_byte: float
    n_tokens: int


def held_out(stage: Stage, held: Held, transpoints: Sequence[int | float], n_tokens: int = 0) -> HeldOut:
    """Loss over the first `n_tokens` tokens of a set (0 takes all of it), without gradients.

    The targets are those of training: every token but the first of a document and of the set, document ends
    included. Bytes are those of exactly these targets.
    """
    stream, size, topology = held.stream, held.packer.micro_batch, held.packer.topology
    n_windows = stream.n_sequential_windows
    if n_tokens:
        n_windows = min(n_windows, math.ceil(n_tokens / stream.seq_len))
    nll, weight, n_bytes = 0.0, 0.0, 0.0
    stage.train(False)
    with torch.no_grad():
        for turn in range(0, n_windows, size * topology.dp):
            first = turn + topology.dp_rank * size
            n_rows = min(size, n_windows - first)
            # Every rank makes every pass, because ZeRO's ranks meet in it: one that has no rows left counts nothing.
            windows = stream.sequential(first, n_rows) if n_rows > 0 else stream.sequential(0, 1)
            windows = replace(windows, weight_BT=windows.weight_BT * (n_rows > 0))
            n_rows = len(windows.weight_BT)
            batch = held.packer.pack_windows(windows, transpoints)
            reports = run_schedule(stage, [batch], n_rows=n_rows, n_tokens=stream.seq_len, forward_only=True)
            nll += sum(report.item() for report in reports)
            weight += float(windows.weight_BT.sum())
            n_bytes += float((held.token_bytes[windows.tokens_BT[:, 1:]] * windows.weight_BT).sum())
    stage.train()
    nll = float(topology.sum_tokens(torch.tensor(nll, dtype=torch.float64)))
    weight, n_bytes = topology.sum_rows(torch.tensor([weight, n_bytes], dtype=torch.float64)).tolist()
    return HeldOut(nll / max(weight, 1.0), nll / math.log(2) / max(n_bytes, 1), int(weight))
