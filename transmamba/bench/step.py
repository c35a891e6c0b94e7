"""What the framework adds to a training step: the whole loop, with logging and checkpoints, against a bare one."""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from transmamba import session
from transmamba.batches import MicroBatch
from transmamba.bench.kernels import results_folder
from transmamba.compose import load
from transmamba.config import Config
from transmamba.corpus import open_corpus
from transmamba.heartbeat import Heartbeat
from transmamba.loop import train_steps
from transmamba.machine import describe_device, versions
from transmamba.metrics import Journal, WandbFeed
from transmamba.optimizer import decayed_names, learning_rate
from transmamba.parallel import topology as groups
from transmamba.report import Report
from transmamba.run import Run, build_model, build_run, describe, make_folder
from transmamba.transpoint import effective_points

BLOCK = 30  # steps that end with a checkpoint; the default run saves less often
WANTED = 1.05


def bench_step(budget_s: float, out: Path) -> int:
    """Alternate blocks of both loops in one process; prints the median ratio, writes step.json, returns 0 or 1."""
    started = time.monotonic()
    session.quieten_libraries()
    with tempfile.TemporaryDirectory() as folder:
        config = load(
            [f"run.dir={folder}/run", f"train.steps={BLOCK}", f"checkpoint.every={BLOCK}", "sample.prompt=''"]
        )
        corpus = open_corpus(config)
        topology = groups.start(config.parallel)
        try:
            session.settle_machine(config, topology, None)
            run_folder = make_folder(config, topology)
            describe(config, run_folder, topology.device)
            run = build_run(config, topology, run_folder, corpus)
            run.held.clear()  # validation is work that was asked for, not overhead
            record = _alternate(run, started + budget_s)
        finally:
            groups.stop()
        device = describe_device(topology.device)
    record |= {"device": device, "threads": config.train.threads, "precision": config.precision}
    record |= {
        "zero_stage": config.zero.stage,
        "versions": versions(),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }
    _show(record)
    _write(record, out)
    return 0 if record["ratio"] <= WANTED else 1


def _alternate(run: Run, deadline: float) -> dict[str, Any]:
    bare = _BareLoop(run.config, run.corpus.vocab_size)
    batches = [run.batches.of_step(step, effective_points(run.config, step)) for step in range(BLOCK)]
    bare.steps(batches[:3])
    journal, feed = Journal(run.folder, 0), WandbFeed(run.folder, run.config.wandb)
    report = Report(Console(file=sys.stderr))
    pairs: list[tuple[float, float]] = []
    heartbeat = Heartbeat(run.folder, run.topology.rank)
    train_steps(run, BLOCK - 3, journal, report, heartbeat, 1.0)
    while not pairs or time.monotonic() + 1.5 * sum(pairs[-1]) * BLOCK < deadline:
        bare_s = _per_step(lambda: bare.steps(batches))
        framework_s = _per_step(lambda: train_steps(run, 0, journal, report, heartbeat, 1.0))
        pairs.append((bare_s, framework_s))
    journal.close()
    heartbeat.done()
    feed.close()
    return {
        "steps_per_block": BLOCK,
        "blocks": len(pairs),
        "bare_s": statistics.median(bare_s for bare_s, _ in pairs),
        "framework_s": statistics.median(framework_s for _, framework_s in pairs),
        "ratio": statistics.median(framework_s / bare_s for bare_s, framework_s in pairs),
        "pairs_s": pairs,
    }


class _BareLoop:
    """The same model, loss, clipping and AdamW in fp32, as one would write them by hand."""

    def __init__(self, config: Config, vocab_size: int):
        self.config, self.model = config, build_model(config, vocab_size)
        parameters = dict(self.model.named_parameters())
        decayed = decayed_names(parameters, config)
        self.adamw = torch.optim.AdamW(
            [
                {"params": [p for n, p in parameters.items() if n in decayed]},
                {"params": [p for n, p in parameters.items() if n not in decayed], "weight_decay": 0.0},
            ],
            lr=config.optim.lr,
            betas=(config.optim.betas[0], config.optim.betas[1]),
            eps=config.optim.eps,
            weight_decay=config.optim.weight_decay,
            fused=True,
        )

    def steps(self, batches: list[list[MicroBatch]]) -> None:
        for step, micro_batches in enumerate(batches):
            for ids, targets, weight, documents, points in micro_batches:
                self.model(ids, targets, weight, points, documents).loss.backward()  # pyright: ignore
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip or 1e9)
            for group in self.adamw.param_groups:
                group["lr"] = learning_rate(self.config, step + 1)
            self.adamw.step()
            self.adamw.zero_grad()


def _per_step(block: Callable[[], object]) -> float:
    started = time.perf_counter()
    block()
    return (time.perf_counter() - started) / BLOCK


def _show(record: dict[str, Any]) -> None:
    print(f"bare loop   {record['bare_s'] * 1e3:8.1f} ms per step")
    detail = f"with logging and a checkpoint every {BLOCK} steps"
    print(f"framework   {record['framework_s'] * 1e3:8.1f} ms per step, {detail}")
    print(f"ratio       {record['ratio']:8.3f}  (median of {record['blocks']} alternated blocks; at most {WANTED})")


def _write(record: dict[str, Any], out: Path) -> None:
    folder = results_folder(out, record["device"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "step.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
