"""From the stream of windows to the micro-batches of a step."""
# B batch, T tokens.

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from transmamba.config import DataConfig, TrainConfig
from transmamba.data_pipeline.stream import Stream, Windows
from transmamba.kernels.documents import Documents
from transmamba.parallel.topology import Topology


class MicroBatch(NamedTuple):
    """One forward pass over this rank's rows and tokens; `documents` describes the rows' whole windows.

    The weights are already divided by their sum over the whole global batch.
    """

    ids_BT: Tensor
    targets_BT: Tensor
    weight_BT: Tensor
    documents: Documents
    transpoints: Sequence[int | float]


class Batches:
    """This rank's part of the global batches of a run; its state is the step, nothing else.

    The data-parallel ranks take consecutive rows of a global batch, so its content does not depend on their number.
    """

    def __init__(self, stream: Stream, data: DataConfig, train: TrainConfig, topology: Topology):
        self.stream, self.topology = stream, topology
        self.document_mask = data.document_mask
        self.global_batch, self.micro_batch = train.global_batch, train.micro_batch
        self.n_rows_local = train.global_batch // topology.dp
        self.skips = sorted(tuple(int(end) for end in text.split(":")) for text in data.skip)

    def data_step(self, step: int) -> int:
        """The global batch that training step `step` (from 0) uses: skipped ranges shift all later ones."""
        for first, last in self.skips:
            if step >= first:
                step += last - first
        return step

    def of_step(self, step: int, transpoints: Sequence[int | float]) -> list[MicroBatch]:
        """The micro-batches of training step `step`, in order."""
        first_row = self.data_step(step) * self.global_batch + self.topology.dp_rank * self.n_rows_local
        windows = self.stream.rows(first_row, self.n_rows_local)
        local = torch.tensor(windows.weight_BT.sum(dtype="float64"), dtype=torch.float64)
        total = float(self.topology.sum_rows(local))
        return [
            self.pack(windows, first, first + self.micro_batch, transpoints, total)
            for first in range(0, self.n_rows_local, self.micro_batch)
        ]

    def pack(
        self, windows: Windows, first: int, last: int, transpoints: Sequence[int | float], total: float
    ) -> MicroBatch:
        """Rows `first` to `last` (exclusive) as tensors; `total` divides the weights."""
        device, own = self.topology.device, self.topology.shards.own_tokens
        tokens = torch.from_numpy(windows.tokens_BT[first:last]).to(device)
        weight_BT = torch.from_numpy(windows.weight_BT[first:last]).to(device) / max(total, 1.0)
        n_rows, n_tokens = weight_BT.shape
        if self.document_mask:
            documents = Documents.from_starts(
                [starts.tolist() for starts in windows.starts[first:last]], n_tokens, device
            )
        else:
            documents = Documents.whole(n_rows, n_tokens, device)
        return MicroBatch(own(tokens[:, :-1]), own(tokens[:, 1:]), own(weight_BT), documents, transpoints)
