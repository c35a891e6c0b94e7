"""Reading packed batches beside other readers of the same tokens: one process, one thread, alternated, medians."""
# B windows, T tokens.

import contextlib
import io
import json
import tarfile
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from transmamba.bench.kernels import results_folder
from transmamba.data_pipeline.manifest import Manifest, Split
from transmamba.data_pipeline.mixture import Mixture
from transmamba.data_pipeline.shards import BLOCK_TOKENS, ShardWriter, join_parts
from transmamba.data_pipeline.stream import Stream
from transmamba.data_pipeline.tokens import TokenStore
from transmamba.machine import describe_device

SEQ_LENS = (2048, 8192)
BATCH = 64
N_TOKENS = 100_000_000
VOCAB, EOD = 50_000, 0
MEAN_LENGTH = 600
# What a reader must reach against each peer: the peer's time over ours.
TARGETS = {"memmap gather": 0.8, "Megatron GPTDataset": 1.0, "webdataset": 10.0}

# Takes a batch, int64 [BATCH, seq_len + 1] or two of seq_len, and returns it.
Reader = Callable[[], object]


def bench_read(budget_s: float, out: Path) -> int:
    """Measure tokens per second of every reader, print a table, write `out`/<hardware>/data-read.json.

    The batches are random windows of synthetic documents. Ours twice: the tokens alone, which is what the others
    read, and with document starts and weights, which is what training takes.

    Returns:
        0, or 1 when a target is missed.
    """
    device = describe_device(torch.device("cpu"))
    record: dict[str, Any] = {
        "hardware": device,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "tokens": N_TOKENS,
        "batch": BATCH,
        "versions": {name: version(name) for name in ("megatron-core", "webdataset", "numpy")},
        "rows": [],
    }
    torch.set_num_threads(1)
    deadline = time.monotonic() + budget_s
    with tempfile.TemporaryDirectory() as folder:
        manifest = _synthetic(Path(folder))
        for seq_len in SEQ_LENS:
            record["rows"].append(_measure(manifest, seq_len, deadline))
    file = results_folder(out, device) / "data-read.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    missed = _show(record)
    print(f"written to {file}")
    return 1 if missed else 0


def _synthetic(folder: Path) -> Manifest:
    """Documents of random tokens with lengths around `MEAN_LENGTH`, as shards."""
    draw = np.random.default_rng(1)
    writer = ShardWriter(folder, "train", dtype=np.dtype("<u2"), eod_id=EOD)
    done = 0
    while done < N_TOKENS:
        length = int(draw.exponential(MEAN_LENGTH)) + 2
        document = draw.integers(1, VOCAB, length, dtype=np.uint16)
        document[-1] = EOD
        writer.add(document)
        done += length
    train: Split = join_parts(folder, "train", [writer.finish()], n_text_bytes=1)
    return Manifest("", "", VOCAB, EOD, "<u2", BLOCK_TOKENS, "synthetic", {"train": train}, folder)


def _measure(manifest: Manifest, seq_len: int, deadline: float) -> dict[str, Any]:
    stream = Stream(TokenStore(manifest, "train"), seq_len=seq_len, seed=1, shuffle_shards="all")
    mixture = Mixture({"train": stream})
    started = time.perf_counter()
    for position in range(0, stream.n_windows - BATCH, BATCH):
        mixture.rows(position, BATCH)
    first_epoch = stream.n_windows * seq_len / (time.perf_counter() - started) / 1e6
    flat = manifest.folder / "flat.bin"
    tokens = stream.store.read(0, stream.store.n_tokens)
    tokens.tofile(flat)
    positions = count(0, BATCH)
    with contextlib.ExitStack() as stack:
        readers: dict[str, Reader] = {
            "tokens": lambda: mixture.tokens(next(positions), BATCH),
            "windows": lambda: mixture.rows(next(positions), BATCH),
            "memmap gather": _memmap(flat, seq_len),
            "Megatron GPTDataset": _megatron(manifest, tokens, seq_len),
            "webdataset": _webdataset(manifest.folder, tokens, seq_len, stack),
        }
        rates: dict[str, list[float]] = {name: [] for name in readers}
        while len(rates["tokens"]) < 9 and time.monotonic() < deadline:
            for name, read in readers.items():
                rates[name].append(_rate(read, seq_len))
    return {
        "seq_len": seq_len,
        "Mtokens_per_s": {name: median(found) for name, found in rates.items()},
        "first_epoch_with_verification_Mtokens_per_s": first_epoch,
        "blocks": len(rates["tokens"]),
    }


def _rate(read: Reader, seq_len: int) -> float:
    """Million tokens per second of CPU time, over a fifth of a second: waiting for other processes does not count."""
    n_batches, started = 0, time.process_time()
    while time.process_time() - started < 0.2:
        for _ in range(4):
            read()
        n_batches += 4
    return n_batches * BATCH * seq_len / (time.process_time() - started) / 1e6


def _memmap(path: Path, seq_len: int) -> Reader:
    tokens = np.asarray(np.memmap(path, dtype="<u2", mode="r"))
    order = np.random.default_rng(0).permutation((len(tokens) - 1) // seq_len) * seq_len
    turns = _turns(order)

    def read() -> np.ndarray:
        out_BT = np.empty((BATCH, seq_len + 1), dtype=np.int64)
        for row, first in enumerate(next(turns)):
            out_BT[row] = tokens[first : first + seq_len + 1]
        return out_BT

    return read


def _turns(order: np.ndarray) -> Iterator[list[int]]:
    while True:
        for first in range(0, len(order) - BATCH, BATCH):
            yield order[first : first + BATCH].tolist()


def _megatron(manifest: Manifest, tokens: np.ndarray, seq_len: int) -> Reader:
    """megatron-core's dataset in its quickest setting: no masks or positions that depend on documents."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
    from megatron.core.datasets.utils import Split as MegatronSplit

    prefix = str(manifest.folder / f"megatron{seq_len}")
    builder = IndexedDatasetBuilder(prefix + ".bin", dtype=np.uint16)
    ends = np.flatnonzero(tokens == EOD) + 1
    builder.add_document(torch.from_numpy(tokens), np.diff(ends, prepend=0).tolist())
    builder.finalize(prefix + ".idx")
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=seq_len,
        split="1,0,0",
        tokenizer=_NoTokenizer(),  # pyright: ignore[reportArgumentType]
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        path_to_cache=str(manifest.folder / "cache"),
    )
    source = IndexedDataset(prefix, mmap=True)
    documents = np.arange(len(ends), dtype=np.int32)
    dataset = GPTDataset(source, prefix, documents, None, MegatronSplit.train, config)
    turns = count(0, BATCH)

    def read() -> object:
        first = next(turns) % (len(dataset) - BATCH)
        rows = [dataset[i] for i in range(first, first + BATCH)]
        return torch.stack([row["tokens"] for row in rows]), torch.stack([row["labels"] for row in rows])

    return read


class _NoTokenizer:
    """What megatron-core asks of a tokenizer."""

    vocab_size, eod, pad = VOCAB, EOD, -1
    unique_identifiers = {"class": "none"}  # noqa: RUF012


def _webdataset(folder: Path, tokens: np.ndarray, seq_len: int, stack: contextlib.ExitStack) -> Reader:
    """webdataset as it is commonly used: a window per member, a shuffle buffer, batches of arrays."""
    from webdataset.compat import WebDataset

    path = folder / f"windows{seq_len}.tar"
    with tarfile.open(path, "w") as tar:
        for window in range(min(20_000_000 // seq_len, (len(tokens) - 1) // seq_len)):
            data = io.BytesIO()
            np.save(data, tokens[window * seq_len : window * seq_len + seq_len + 1])
            member = tarfile.TarInfo(f"{window:08d}.tokens.npy")
            member.size = len(data.getvalue())
            tar.addfile(member, io.BytesIO(data.getvalue()))

    def batches() -> Generator[np.ndarray]:
        while True:
            dataset = WebDataset([str(path)], shardshuffle=False).shuffle(1000).decode().to_tuple("tokens.npy")
            rows: list[np.ndarray] = []
            for (row,) in dataset:  # pyright: ignore[reportGeneralTypeIssues]
                rows.append(row)
                if len(rows) == BATCH:
                    yield np.stack(rows).astype(np.int64)
                    rows = []

    source = batches()
    stack.callback(source.close)
    return lambda: next(source)


def _show(record: dict[str, Any]) -> bool:
    table = Table("seq_len", "reader", "Mtokens/s", "ours over it", "target", title=f"{record['hardware']}, one core")
    missed = False
    for row in record["rows"]:
        rates = row["Mtokens_per_s"]
        for name, rate in rates.items():
            target = TARGETS.get(name)
            ratio = rates["tokens"] / rate
            missed |= target is not None and ratio < target
            cells = ("", "") if target is None else (f"{ratio:.2f}", f"{target:g}")
            table.add_row(str(row["seq_len"]), name, f"{rate:.1f}", *cells)
        rate = row["first_epoch_with_verification_Mtokens_per_s"]
        table.add_row(str(row["seq_len"]), "windows, first epoch (every block hashed)", f"{rate:.1f}", "", "")
    Console().print(table)
    return missed
