"""Preparation of data beside datatrove's: the same text, the same tokenizer, one core, alternated, medians."""

import importlib
import importlib.util
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from transmamba.bench.kernels import results_folder
from transmamba.data_pipeline.docstrings import read_installed_docstrings
from transmamba.data_pipeline.listing import find_files
from transmamba.data_pipeline.manifest import load_manifest
from transmamba.data_pipeline.parts import Reading, cut_parts
from transmamba.data_pipeline.prepare import prepare
from transmamba.data_pipeline.tokenizer import END_OF_TEXT, train_tokenizer
from transmamba.data_pipeline.tokens import TokenStore
from transmamba.machine import describe_device

N_CHARS = 24_000_000
VOCAB_SIZE = 8192
WANTED = 1.0
_PEER = "datatrove"


def bench_prepare(budget_s: float, out: Path, sources: list[str] | None = None) -> int:
    """Measure tokens per second of one core, print them, write `out`/<hardware>/data-prepare.json.

    Ours reads the text twice and writes verified shards in one worker process; its start is part of the time. The
    peer reads it once, in this process. Both count the processor's seconds, so other work on the machine does not.

    Args:
        budget_s: seconds of timing.
        out: folder of results.
        sources: text as for `transmamba data prepare`; None takes the installed docstrings.

    Returns:
        0, or 1 when ours is slower than the peer.

    Raises:
        AssertionError: the two made different tokens.
    """
    device = describe_device(torch.device("cpu"))
    has_peer = importlib.util.find_spec(_PEER) is not None
    names = ["tokenizers", *([_PEER] if has_peer else [])]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        n_bytes = _write_text(folder / "in", sources)
        # One thread for the peer; our worker sets its own.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        contestants: dict[str, Callable[[], int]] = {"transmamba": lambda: _ours(folder)}
        if has_peer:
            contestants[_PEER] = _peer(folder)
        n_tokens, seconds = _alternate(contestants, budget_s)
        if has_peer:
            _check_equal(folder)
    rows = {name: {"cpu_s": times, "tokens_per_core_s": n_tokens / median(times)} for name, times in seconds.items()}
    record: dict[str, Any] = {"hardware": device, "date": f"{datetime.now(UTC):%Y-%m-%d}", "bytes": n_bytes}
    record |= {"tokens": n_tokens, "versions": {name: version(name) for name in names}, "rows": rows}
    if has_peer:
        pairs = zip(seconds[_PEER], seconds["transmamba"], strict=True)
        record["ratio"] = median(theirs / ours for theirs, ours in pairs)
    else:
        record["missing"] = _PEER
    file = results_folder(out, device) / "data-prepare.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    _show(record)
    print(f"written to {file}")
    return 1 if record.get("ratio", WANTED) < WANTED else 0


def _write_text(folder: Path, sources: list[str] | None) -> int:
    """JSON lines and a tokenizer for them; returns the bytes of text."""
    folder.mkdir()
    if sources is None:
        texts = [document.text for document in read_installed_docstrings(workers=1, max_chars=N_CHARS).documents]
    else:
        parts = cut_parts(find_files(sources).files, 1 << 40)
        texts = [document.text for part in parts for document in Reading(part, "text").documents()]
    # Where a text spells the end-of-document token, the peer ends a document.
    texts = [text for text in texts if END_OF_TEXT not in text]
    with (folder / "text.jsonl").open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    train_tokenizer(texts[:: max(len(texts) // 500, 1)], vocab_size=VOCAB_SIZE).save(str(folder / "tokenizer.json"))
    return sum(len(text.encode("utf-8")) for text in texts)


def _ours(folder: Path) -> int:
    options = {"tokenizer": folder / "in" / "tokenizer.json", "workers": 1, "progress": False, "replace": True}
    manifest = prepare([str(folder / "in" / "text.jsonl")], folder / "ours", **options)
    return sum(split.n_tokens for split in manifest.splits.values())


def _peer(folder: Path) -> Callable[[], int]:
    readers = importlib.import_module("datatrove.pipeline.readers")
    tokens = importlib.import_module("datatrove.pipeline.tokens")
    importlib.import_module("loguru").logger.remove()

    def run() -> int:
        reader = readers.JsonlReader(str(folder / "in"), glob_pattern="*.jsonl")
        writer = tokens.DocumentTokenizer(
            str(folder / "theirs"),
            tokenizer_name_or_path=str(folder / "in" / "tokenizer.json"),
            save_filename="text",
            eos_token=END_OF_TEXT,
            shuffle_documents=False,
            save_final_metadata=False,
        )
        writer.run(reader.run())
        (file,) = (folder / "theirs").glob("*.ds")
        return file.stat().st_size // 2

    return run


def _alternate(contestants: dict[str, Callable[[], int]], budget_s: float) -> tuple[int, dict[str, list[float]]]:
    deadline = time.monotonic() + budget_s
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    counts = set()
    while True:
        round_started_at = time.monotonic()
        for name, run in contestants.items():
            before = _cpu_s()
            counts.add(run())
            seconds[name].append(_cpu_s() - before)
        if time.monotonic() + (time.monotonic() - round_started_at) > deadline:
            break
    assert len(counts) == 1, f"different numbers of tokens: {counts}"
    return counts.pop(), seconds


def _check_equal(folder: Path) -> None:
    """Ours has the held-out documents apart; so the documents are compared in sorted order."""
    (file,) = (folder / "theirs").glob("*.ds")
    theirs = np.fromfile(file, dtype="<u2")
    manifest = load_manifest(folder / "ours")
    stores = [TokenStore(manifest, split) for split in manifest.splits]
    ours = np.concatenate([store.read(0, store.n_tokens) for store in stores])
    documents = [np.split(tokens, np.flatnonzero(tokens == manifest.eod_id) + 1) for tokens in (ours, theirs)]
    first, second = (sorted(document.tobytes() for document in each) for each in documents)
    assert first == second, "the tokens differ"


def _cpu_s() -> float:
    """Seconds of processor that this process and its ended children have used."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def _show(record: dict[str, Any]) -> None:
    for name, row in record["rows"].items():
        print(f"{name:<12} {row['tokens_per_core_s']:12,.0f} tokens/s per core")
    if "ratio" in record:
        n_rounds = len(record["rows"][_PEER]["cpu_s"])
        print(f"ratio        {record['ratio']:12.2f}  (median of {n_rounds} alternated rounds; at least {WANTED:g})")
    else:
        print(f"{_PEER} is not installed, so there is nothing to compare with")
