"""From the stream of windows to the micro-batches of a step."""
# B batch, T tokens.

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from transmamba.config import DataConfig, TrainConfig
from transmamba.data_pipeline.stream import Stream, Windows
from transmamba.kernels.documents import Documents


class MicroBatch(NamedTuple):
    """One forward pass. The weights are already divided by their sum over the whole global batch."""

    ids_BT: Tensor
    targets_BT: Tensor
    weight_BT: Tensor
    documents: Documents
    transpoints: Sequence[int | float]


class Batches:
    """The global batches of a run; its state is the step, nothing else."""

    def __init__(self, stream: Stream, data: DataConfig, train: TrainConfig, device: torch.device):
        self.stream, self.device = stream, device
        self.document_mask = data.document_mask
        self.global_batch, self.micro_batch = train.global_batch, train.micro_batch
        self.skips = sorted(tuple(int(end) for end in text.split(":")) for text in data.skip)

    def data_step(self, step: int) -> int:
        """The global batch that training step `step` (from 0) uses: skipped ranges shift all later ones."""
        for first, last in self.skips:
            if step >= first:
                step += last - first
        return step

    def of_step(self, step: int, transpoints: Sequence[int | float]) -> list[MicroBatch]:
        """The micro-batches of training step `step`, in order."""
        windows = self.stream.rows(self.data_step(step) * self.global_batch, self.global_batch)
        total = float(windows.weight_BT.sum(dtype="float64"))
        return [
            self.pack(windows, first, first + self.micro_batch, transpoints, total)
            for first in range(0, self.global_batch, self.micro_batch)
        ]

    def pack(
        self, windows: Windows, first: int, last: int, transpoints: Sequence[int | float], total: float
    ) -> MicroBatch:
        """Rows `first` to `last` (exclusive) as tensors; `total` divides the weights."""
        tokens = torch.from_numpy(windows.tokens_BT[first:last]).to(self.device)
        weight_BT = torch.from_numpy(windows.weight_BT[first:last]).to(self.device) / max(total, 1.0)
        n_rows, n_tokens = weight_BT.shape
        if self.document_mask:
            documents = Documents.from_starts(
                [starts.tolist() for starts in windows.starts[first:last]], n_tokens, self.device
            )
        else:
            documents = Documents.whole(n_rows, n_tokens, self.device)
        return MicroBatch(tokens[:, :-1], tokens[:, 1:], weight_BT, documents, transpoints)
