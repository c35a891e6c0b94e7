"""The ledger: which window went to which step and rank, for audits."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from torch import Tensor

from transmamba.checkpoint import look, published
from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.mixture import Length, Mixture, Sample
from transmamba.data_position import lengths_of
from transmamba.sealed import CheckpointError

FOLDER = "ledger"


class Ledger:
    """Appends a line per step: `{"step", "data_step", "rank", "samples"}`, a sample as its fields and the digest of its
    tokens. A step that is run again after a restart is written again.

    Args:
        folder: of the run.
        rank: data-parallel rank, whose first model-parallel rank writes.
    """

    def __init__(self, folder: Path, rank: int):
        path = folder / FOLDER / f"rank{rank:05d}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._rank = rank
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, data_step: int, samples: Sequence[Sample], tokens_BT: Tensor) -> None:
        """Note the windows of a training step (from 0) before they are used."""
        digests = [digest_of(row.numpy()) for row in tokens_BT]
        entries = [[*astuple(sample), digest] for sample, digest in zip(samples, digests, strict=True)]
        record = {"step": step, "data_step": data_step, "rank": self._rank, "samples": entries}
        self._file.write(json.dumps(record, separators=(",", ":")) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def digest_of(tokens_T: np.ndarray) -> str:
    """Eight hexadecimal digits that change with the tokens of a window."""
    return xxhash.xxh3_64_hexdigest(np.ascontiguousarray(tokens_T, dtype=np.int64).data)[:8]


def read_ledger(folder: Path) -> Iterator[dict[str, Any]]:
    """Lines of all ranks of a run; one cut short by a kill is left out.

    Raises:
        DataError: a line is no record of a step.
    """
    for path in sorted((folder / FOLDER).glob("rank*.jsonl")):
        with path.open(encoding="utf-8") as file:
            for line in file:
                if not line.endswith("\n"):
                    continue
                try:
                    record = json.loads(line)
                    [Sample(*fields) for *fields, _ in record["samples"]]
                    yield {key: record[key] for key in ("step", "data_step", "rank", "samples")}
                except (ValueError, TypeError, LookupError) as error:
                    problem = f"holds a line that is no record of a step ({line[:40]!r})"
                    raise DataError(str(path), problem, "restore the file from a copy") from error


def audit(folder: Path, mixture: Mixture, global_batch: int) -> tuple[int, list[str]]:
    """Compare a run's ledger with the order that its configuration defines and with the data as it is now.

    Args:
        folder: of the run; its newest checkpoint tells of other lengths that its windows had before.
        mixture: in windows of the length that they have now.
        global_batch: windows per step.

    Returns:
        the number of steps, and one line per fault: a step whose windows are not exactly those of its global batch,
        or whose tokens were others.
    """
    steps: dict[int, dict[int, str]] = {}
    data_steps: dict[int, int] = {}
    faults = []
    by_length = _by_length(folder, mixture)
    for record in read_ledger(folder):
        step = record["step"]
        if data_steps.setdefault(step, record["data_step"]) != record["data_step"]:
            faults.append(f"step {step}: run again with data step {record['data_step']} after {data_steps[step]}")
        seen = steps.setdefault(step, {})
        for *fields, digest in record["samples"]:
            sample = Sample(*fields)
            own = next((later for later in by_length if later.first <= sample.position), by_length[-1])
            if [sample] != own.samples(sample.position, 1):
                faults.append(f"step {step}: {sample} is not what position {sample.position} holds")
            if seen.setdefault(sample.position, digest) != digest:
                faults.append(f"step {step}: the tokens of position {sample.position} changed")
            elif digest != digest_of(own.tokens(sample.position, 1)[0]):
                faults.append(f"step {step}: position {sample.position} holds other tokens now")
    for step, seen in sorted(steps.items()):
        first = data_steps[step] * global_batch
        if sorted(seen) != list(range(first, first + global_batch)):
            faults.append(f"step {step}: {len(seen)} windows instead of positions {first} to {first + global_batch}")
    return len(steps), faults


def _by_length(folder: Path, mixture: Mixture) -> list[Mixture]:
    """The mixture for every length that the run's windows had, the last one first."""
    lengths = [Length(0, mixture.seq_len)]
    for path in published(folder / "checkpoints"):
        with suppress(CheckpointError):
            lengths = lengths_of(look(path).manifest, mixture.seq_len)
            break
    return [mixture.following(lengths[:n]) for n in range(len(lengths), 0, -1)]
