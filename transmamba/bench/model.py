"""`transmamba bench model`: whole training steps of equal-size models, and decoding at several contexts.

Every row runs in a process of its own, so that none inherits another's memory. A step is the framework's own
`train_step` on the built-in corpus; token ids reach the preset's vocabulary only in the embedding's and the head's
size, which is what costs.
"""
# B batch.

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from transmamba import session
from transmamba.bench.rows import Row, Work, measure_rows
from transmamba.compose import load
from transmamba.corpus import open_corpus
from transmamba.loop import train_step
from transmamba.machine import peak_flops
from transmamba.model.decode import prefill, step
from transmamba.parallel import topology as groups
from transmamba.plan import make_plan
from transmamba.run import build_model, build_run, make_folder
from transmamba.transpoint import effective_points

KINDS = {"transformer": "_transformer", "transmamba": "", "mamba2": "_mamba2", "hybrid": "_hybrid"}
# TransPoints of at most 1,024 tokens, tiled over the layers.
POINTS = "transpoint.points=[0,128,256,512,1024]"
WARM_UP, STEPS, DECODED = 3, 8, 32
WANTED = {8192: 1.35, 32_768: 2.8}  # times the transformer's tokens per second
WANTED_MFU = 0.45


def bench_model(budget_s: float, out: Path, preset: str, lengths: list[int], vocabulary: int) -> int:
    """Train and decode with a preset's four kinds; prints as it goes, writes `out`/<hardware>/model.json, returns 0.

    Args:
        budget_s: seconds after which no new row is begun; the same command goes on.
        out: folder of results.
        preset: a model preset whose kinds have equal parameters.
        lengths: tokens per window; a step reads as many windows as make the longest.
        vocabulary: rows of the embedding.
    """
    settings = {"preset": preset, "vocabulary": vocabulary, "points": POINTS, "window": max(lengths)}
    rows = measure_rows("model", _work(preset, lengths, vocabulary), budget_s, out, settings)
    print("\n".join(_summary({row["row"]: row for row in rows if "error" not in row}, lengths)))
    return 0


def train_row(preset: str, kind: str, length: int, n_tokens: int, vocabulary: int) -> Row:
    """Median seconds of a training step, and what follows from them."""
    session.quieten_libraries()
    with tempfile.TemporaryDirectory() as folder:
        points = [POINTS] if kind == "transmamba" else []
        config = load(
            [
                *(f"model={preset}{KINDS[kind]}", f"model.vocab_size={vocabulary}", *points),
                *(f"data.seq_len={length}", "data.prefetch=0", "data.document_mask=false"),
                *(f"train.global_batch={n_tokens // length}", "train.micro_batch=1", "train.recompute=selective"),
                *(f"train.steps={WARM_UP + STEPS}", f"run.dir={folder}/run", "sample.prompt=''"),
            ]
        )
        corpus = open_corpus(config)
        topology = groups.start(config.parallel)
        try:
            session.settle_machine(config, topology, None)
            run = build_run(config, topology, make_folder(config, topology), corpus)
            seconds = [_seconds(lambda number=number: train_step(run, number)) for number in range(WARM_UP + STEPS)]
        finally:
            groups.stop()
    plan, peak = make_plan(config, corpus), peak_flops(topology.device)
    step_s = statistics.median(seconds[WARM_UP:])
    row: Row = {"step_s": step_s, "tokens_per_s": n_tokens / step_s, "parameters": plan.parameters}
    if peak is not None:
        row["mfu"] = n_tokens / step_s * plan.training_flops_per_token / peak
        row["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return row


def decode_row(preset: str, length: int, vocabulary: int) -> Row:
    """Median seconds of one more token after `length` tokens, TransPoints behind."""
    config = load([f"model={preset}", f"model.vocab_size={vocabulary}", POINTS, f"data.seq_len={length}"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(config, vocabulary).to(device)
    if device.type == "cuda":
        for weight in model.parameters():
            weight.data = weight.data.bfloat16()
    ids_BT = torch.randint(vocabulary, (1, length), device=device)
    _, state = prefill(model, ids_BT, effective_points(config))
    times = [_seconds(lambda: step(model, ids_BT[:, -1], state)) for _ in range(DECODED)]
    return {"token_s": statistics.median(times[4:])}


def _work(preset: str, lengths: list[int], vocabulary: int) -> Iterator[Work]:
    for length in lengths:
        for kind in KINDS:
            sizes = (preset, kind, length, max(lengths), vocabulary)
            yield f"train T{length} {kind}", lambda sizes=sizes: _alone(train_row, *sizes)
    for length in (max(min(lengths) // 4, 16), *lengths):
        yield f"decode after {length}", lambda length=length: _alone(decode_row, preset, length, vocabulary)


def _alone(measure: Callable[..., Row], *sizes: object) -> Row:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as other:
        return other.submit(measure, *sizes).result()


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _summary(rows: dict[str, Row], lengths: list[int]) -> Iterator[str]:
    for length in lengths:
        rates = {kind: rows.get(f"train T{length} {kind}", {}).get("tokens_per_s", math.nan) for kind in KINDS}
        ratio = rates["transmamba"] / rates["transformer"]
        wanted = f", at least {WANTED[length]} wanted" if length in WANTED else ""
        mfu = rows.get(f"train T{length} transmamba", {}).get("mfu")
        share = f"; MFU {mfu:.1%}, at least {WANTED_MFU:.0%} wanted" if mfu is not None else ""
        yield f"T{length}: TransMamba trains at {ratio:.2f}x the Transformer's tokens per second{wanted}{share}"
    decoded = {name: row["token_s"] for name, row in rows.items() if name.startswith("decode")}
    if len(decoded) > 1:
        yield f"decoding: the slowest context takes {max(decoded.values()) / min(decoded.values()):.2f}x the quickest's"
