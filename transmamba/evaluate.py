"""Held-out loss: nats per token and bits per byte of a validation set, next to two yardsticks of the same text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from transmamba.batches import Batches
from transmamba.data_pipeline.stream import Stream
from transmamba.parallel.pipeline import Stage, run_schedule


@dataclass(frozen=True)
class Held:
    """A validation set: its windows in the order of the text, and what a byte counts for."""

    name: str
    stream: Stream
    batches: Batches
    token_bytes: np.ndarray  # bytes that each token id stands for

    def unigram_entropy(self) -> float:
        """Entropy in nats per token of the set's own token frequencies: what counting alone can reach."""
        store = self.stream.store
        counts = np.bincount(store.read(0, store.n_tokens))
        share = counts[counts > 0] / store.n_tokens
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
    stream = held.stream
    n_windows = stream.n_sequential_windows
    if n_tokens:
        n_windows = min(n_windows, math.ceil(n_tokens / stream.seq_len))
    nll, weight, n_bytes = 0.0, 0.0, 0
    was_training = stage.module.training
    stage.module.eval()
    with torch.no_grad():
        for first in range(0, n_windows, held.batches.micro_batch):
            windows = stream.sequential(first, min(held.batches.micro_batch, n_windows - first))
            batch = held.batches.pack(windows, 0, len(windows.weight_BT), transpoints, total=1.0)
            (report,) = run_schedule(stage, [batch], n_tokens=stream.seq_len, forward_only=True)
            nll += report.item()
            weight += float(windows.weight_BT.sum())
            n_bytes += int((held.token_bytes[windows.tokens_BT[:, 1:]] * windows.weight_BT).sum())
    stage.module.train(was_training)
    return HeldOut(nll / max(weight, 1.0), nll / math.log(2) / max(n_bytes, 1), int(weight))
