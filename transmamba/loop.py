"""The training loop: one step on a card, and what happens between steps."""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from transmamba import resume
from transmamba.batches import MicroBatch
from transmamba.config import tokens_per_step, total_steps
from transmamba.errors import EXIT_DONE, EXIT_NON_FINITE, EXIT_STOP_FILE, RunError
from transmamba.evaluate import HeldOut, held_out
from transmamba.heartbeat import Heartbeat, Phase
from transmamba.layer_stats import layer_stats
from transmamba.metrics import Journal
from transmamba.optimizer import learning_rate
from transmamba.parallel.pipeline import run_schedule
from transmamba.parallel.replicas import find_drift
from transmamba.parallel.topology import Topology
from transmamba.report import Report
from transmamba.run import Run, named_weights
from transmamba.saving import Saver
from transmamba.stopping import StopRequest
from transmamba.transpoint import effective_points


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did."""

    step: int  # optimizer steps done, this one included
    loss: float  # nats per token, over the whole global batch
    grad_norm: float  # before clipping
    lr: float
    past_transpoint: list[float]  # share of the tokens that each layer scanned


def train_step(run: Run, step: int) -> StepReport:
    """One optimizer step (`step` counts from 0): every micro-batch through the schedule, then one update.

    Raises:
        RunError: the loss or the gradient norm is not finite (exit 20); nothing of this step is saved.
    """
    config, topology = run.config, run.topology
    batches = run.batches.of_step(step, effective_points(config, step))
    losses = run_schedule(run.stage, batches, n_rows=config.train.micro_batch, n_tokens=config.data.seq_len)
    loss = float(topology.sum_tokens(sum(losses, torch.zeros((), device=topology.device)).double()))
    _must_be_finite("loss", loss, step)
    lr = learning_rate(config, step + 1)
    grad_norm = run.optimizer.step(lr)
    _must_be_finite("gradient norm", grad_norm, step)
    return StepReport(step + 1, loss, grad_norm, lr, _past_transpoint(batches, topology))


def train_steps(
    run: Run, first: int, journal: Journal, report: Report, heartbeat: Heartbeat, flops_per_token: float
) -> int:
    """Run the steps from `first` (already done) to the end or until somebody asks to stop; returns the exit code."""
    config, topology, last = run.config, run.topology, total_steps(run.config)
    meter = _Meter(run, flops_per_token, first)
    stop = StopRequest(run.folder)
    try:
        with report.steps(first, last), _saver(run, journal, heartbeat) as saver:
            for step in range(first, last):
                done = step + 1
                stats_every = config.train.layer_stats_every
                is_watched = stats_every and done % stats_every == 0
                watched = layer_stats(run.layers, config.model.n_layers, topology) if is_watched else nullcontext()
                started = time.perf_counter()
                heartbeat.beat(done, Phase.STEP)
                if not run.batches.ready(step, lambda: stop.code is not None):
                    code = topology.agree(stop.code or 0) or EXIT_STOP_FILE
                    heartbeat.beat(step, Phase.SAVE)
                    if step > first and step % config.checkpoint.every:
                        save(run, step, saver, is_last=True)
                    saver.finish_last()
                    return _stopped(run, stop, code, step, journal)
                with watched as layers:
                    trained = train_step(run, step)
                record = meter.record(trained, time.perf_counter() - started)
                if layers is not None:
                    record["layers"] = layers
                check_every = config.train.replica_check_every
                if check_every and done % check_every == 0:
                    check_replicas(run, done, journal)
                every = config.validation.every
                if done == last or (every and done % every == 0):
                    heartbeat.beat(done, Phase.VALIDATE)
                    record["validation"] = validate(run, done, report, is_last=done == last)
                journal.metrics(record)
                report.step(record, last, meter.left_s(last - done))
                code = topology.agree(stop.code or 0) or None
                saver.poll()
                if done == last or code is not None or done % config.checkpoint.every == 0:
                    heartbeat.beat(done, Phase.SAVE)
                    save(run, done, saver, is_last=done == last or code is not None)
                if code is not None and done < last:
                    return _stopped(run, stop, code, done, journal)
    finally:
        stop.restore()
    return EXIT_DONE


def _stopped(run: Run, stop: StopRequest, code: int, step: int, journal: Journal) -> int:
    """Note that the run stops after `step` because it was asked to; returns `code`."""
    cause = stop.cause if stop.code == code else "asked of another rank"
    if run.topology.is_first:
        (run.folder / "STOP").unlink(missing_ok=True)
    journal.event("stop", cause=cause, step=step)
    return code


def validate(run: Run, step: int, report: Report, *, is_last: bool) -> dict[str, dict[str, float]]:
    """Loss of every validation set; all of its tokens at the end of the run."""
    points = effective_points(run.config, step)
    results: dict[str, dict[str, float]] = {}
    for held in run.held:
        result: HeldOut = held_out(run.stage, held, points, 0 if is_last else run.config.validation.tokens)
        report.validation(step, held, result)
        results[held.name] = {"loss": result.loss, "bits_per_byte": result.bits_per_byte}
    return results


def save(run: Run, step: int, saver: Saver, *, is_last: bool) -> None:
    """Start a checkpoint of `step`; the run's last one is awaited.

    Raises:
        RunError: the file system refuses to take checkpoints (exit 40); older ones are untouched.
    """
    data = {
        "fingerprint": run.corpus.fingerprint(),
        "next_row": run.batches.data_step(step) * run.config.train.global_batch,
        "vocab_size": run.corpus.vocab_size,
        "eod_id": run.corpus.first.eod_id,
    }
    pieces = resume.pieces(run.chunks, run.optimizer, step, run.topology)
    record = resume.record(run.config, step, data, run.topology, run.tokens_at(step), run.lengths)
    saver.begin(step, pieces, record)
    if is_last:
        saver.finish_last()


def _saver(run: Run, journal: Journal, heartbeat: Heartbeat) -> Saver:
    def beat(step: int) -> None:
        heartbeat.beat(step, Phase.SAVE)

    return Saver(run.checkpoints, run.config.checkpoint, journal, run.topology, beat)


class _Meter:
    """Turns durations into rates."""

    def __init__(self, run: Run, flops_per_token: float, first: int):
        from transmamba.machine import peak_flops

        self._run, self._tokens_per_step = run, tokens_per_step(run.config)
        self._flops_per_token = flops_per_token
        self._peak = peak_flops(run.topology.device)
        self._world_size = run.topology.world_size
        self._started = time.perf_counter()
        self._first = first
        self._mean_s = 0.0

    def record(self, done: StepReport, step_s: float) -> dict[str, Any]:
        """The step's line in metrics.jsonl. `time_s` counts from the start of this process's first step."""
        self._mean_s = step_s if not self._mean_s else 0.9 * self._mean_s + 0.1 * step_s
        rate = self._tokens_per_step / step_s
        mfu = None if self._peak is None else rate * self._flops_per_token / (self._peak * self._world_size)
        return {
            "step": done.step,
            "tokens": self._run.tokens_at(done.step),
            "loss": done.loss,
            "grad_norm": done.grad_norm,
            "lr": done.lr,
            "tokens_per_s": rate,
            "time_s": time.perf_counter() - self._started,
            "step_s": step_s,
            "mfu": mfu,
            "past_transpoint": done.past_transpoint,
        }

    def left_s(self, n_steps: int) -> float:
        """Seconds for so many more steps at the recent pace."""
        return self._mean_s * n_steps


def check_replicas(run: Run, step: int, journal: Journal) -> None:
    """Compare the weights that several ranks hold.

    Raises:
        RunError: they differ (exit 20); the line names ranks, weight and step.
    """
    drifts = find_drift(named_weights(run.chunks, run.config), run.topology)
    found = sorted({(drift.name, *drift.ranks) for own in run.topology.collect(drifts) for drift in own})
    if not found:
        return
    name, *ranks = found[0]
    for drift in found:
        journal.event("replica.mismatch", step=step, weight=drift[0], ranks=list(drift[1:]))
    raise RunError(
        EXIT_NON_FINITE,
        f"train.replica_check_every: {name} differs on rank {', '.join(map(str, ranks))} at step {step} "
        f"({len(found)} weights in all). Fix: look at these ranks' hardware, and resume from an older checkpoint",
    )


def _past_transpoint(batches: Sequence[MicroBatch], topology: Topology) -> list[float]:
    """Share of tokens with pos >= P per layer, from the boundaries on the host."""
    lengths = [length for batch in batches for _, _, length in batch.documents.spans()]
    past = [sum(max(length - min(point, length), 0) for length in lengths) for point in batches[0].transpoints]
    *past, total = topology.sum_rows(torch.tensor([*past, sum(lengths)], dtype=torch.float64)).tolist()
    return [round(n_tokens / total, 4) for n_tokens in past]


def _must_be_finite(what: str, value: float, step: int) -> None:
    if not math.isfinite(value):
        raise RunError(
            EXIT_NON_FINITE,
            f"train: the {what} of step {step + 1} is {value}; nothing of this step was saved. "
            "Fix: lower optim.lr or skip its data with data.skip, and resume from the last checkpoint",
        )
