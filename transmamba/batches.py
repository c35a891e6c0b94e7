"""From the stream of windows to the micro-batches of a step."""
# B batch, T tokens.

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from transmamba.config import Config, DataConfig, TrainConfig
from transmamba.data_pipeline.mixture import Mixture
from transmamba.data_pipeline.stream import Windows
from transmamba.data_position import data_step_of
from transmamba.heartbeat import sign_of_life
from transmamba.kernels.documents import Documents
from transmamba.ledger import Ledger
from transmamba.parallel.topology import Topology
from transmamba.prefetch import RowReader, Rows

_TELL_EVERY_S = 30.0


class MicroBatch(NamedTuple):
    """One forward pass over this rank's rows and tokens; `documents` describes the rows' whole windows.

    The weights are already divided by their sum over the whole global batch.
    """

    ids_BT: Tensor
    targets_BT: Tensor
    weight_BT: Tensor
    documents: Documents
    transpoints: Sequence[int | float]


class Packer:
    """Turns rows of windows into micro-batches on the device, cut to this rank's tokens."""

    def __init__(self, data: DataConfig, train: TrainConfig, topology: Topology):
        self.document_mask, self.micro_batch, self.topology = data.document_mask, train.micro_batch, topology

    def pack(self, rows: Rows, transpoints: Sequence[int | float], total: float) -> MicroBatch:
        """One micro-batch of these rows; `total` divides the weights."""
        device, own = self.topology.device, self.topology.shards.own_tokens
        tokens_BT = rows.tokens_BT.to(device, non_blocking=True)
        weight_BT = rows.weight_BT.to(device, non_blocking=True).to(torch.float32) / max(total, 1.0)
        n_rows, n_tokens = weight_BT.shape
        if self.document_mask:
            documents = Documents.from_starts([starts.tolist() for starts in rows.starts], n_tokens, device)
        else:
            documents = Documents.whole(n_rows, n_tokens, device)
        return MicroBatch(own(tokens_BT[:, :-1]), own(tokens_BT[:, 1:]), own(weight_BT), documents, transpoints)

    def pack_windows(self, windows: Windows, transpoints: Sequence[int | float]) -> MicroBatch:
        """One micro-batch of windows that count in full."""
        starts = [torch.from_numpy(row) for row in windows.starts]
        rows = Rows(torch.from_numpy(windows.tokens_BT), starts, torch.from_numpy(windows.weight_BT))
        return self.pack(rows, transpoints, total=1.0)


class Batches:
    """This rank's part of the global batches of a run; its state is the step, nothing else.

    The data-parallel ranks take consecutive rows of a global batch, so its content does not depend on their number.

    Args:
        ledger_folder: of the run, to note every window; None notes nothing.
    """

    def __init__(self, mixture: Mixture, config: Config, topology: Topology, ledger_folder: Path | None = None):
        data, train = config.data, config.train
        self.mixture, self.topology = mixture, topology
        self.packer = Packer(data, train, topology)
        self.global_batch = train.global_batch
        self.n_rows_local = train.global_batch // topology.dp
        self.first_row_local = topology.dp_rank * self.n_rows_local
        self.skip = data.skip
        on_gpu = topology.device.type == "cuda"
        self._reader = RowReader(
            mixture,
            global_batch=train.global_batch,
            first_row=self.first_row_local,
            n_rows=self.n_rows_local,
            ahead=data.prefetch,
            pin=on_gpu,
            limit_s=config.watchdog.limit_s or 0,
        )
        # Of the step that is next, once they are there.
        self._rows: Rows | None = None
        self._ledger = None
        if ledger_folder is not None and topology.is_first_of_rows:
            self._ledger = Ledger(ledger_folder, topology.dp_rank)

    def data_step(self, step: int) -> int:
        """The global batch that training step `step` (from 0) uses: skipped ranges shift all later ones."""
        return data_step_of(step, self.skip)

    def of_step(self, step: int, transpoints: Sequence[int | float]) -> list[MicroBatch]:
        """The micro-batches of training step `step`, in order."""
        data_step = self.data_step(step)
        rows, self._rows = self._rows or self._reader.rows(data_step, self.data_step(step + 1)), None
        if self._ledger is not None:
            first = data_step * self.global_batch + self.first_row_local
            samples = self.mixture.samples(first, self.n_rows_local)
            self._ledger.write(step, data_step, samples, rows.tokens_BT)
        total = float(self.topology.sum_rows(rows.weight_BT.sum(dtype=torch.float64)))
        size = self.packer.micro_batch
        return [
            self.packer.pack(rows.part(first, first + size), transpoints, total)
            for first in range(0, self.n_rows_local, size)
        ]

    def ready(self, step: int, is_stopped: Callable[[], bool]) -> bool:
        """Wait for the windows of training step `step`; a rank that waits for a store does not hang.

        Args:
            step: whose windows `of_step` will be asked for next.
            is_stopped: asked once, and about every second while some rank waits.

        Returns:
            whether every rank has them; False on all ranks if one of them is stopped.
        """
        if not self._reader.is_remote:
            return True
        data_step, tell_at = self.data_step(step), time.monotonic() + _TELL_EVERY_S
        while True:
            if self._rows is None:
                self._rows = self._reader.poll(data_step, self.data_step(step + 1))
            state = torch.tensor([self._rows is None, is_stopped()], dtype=torch.float32)
            n_missing, n_stopped = map(int, self.topology.sum_all(state).tolist())
            if not n_missing or n_stopped:
                return not n_missing
            sign_of_life()
            if self._rows is not None and self.topology.is_first and time.monotonic() > tell_at:
                tell_at = time.monotonic() + _TELL_EVERY_S
                print(f"waiting for the data of {n_missing} other ranks; see their logs", file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the reading process and the ledger."""
        self._reader.close()
        if self._ledger is not None:
            self._ledger.close()
