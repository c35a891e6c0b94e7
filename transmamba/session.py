"""One run from its configuration to its exit code: data, checkpoint, machine, loop, and the last words."""

import json
import logging
import os
import shlex
import shutil
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import torch

from transmamba import resume
from transmamba.checkpoint import Checkpoint, published
from transmamba.config import Config, total_steps
from transmamba.corpus import Corpus, open_corpus
from transmamba.data_pipeline.errors import DamagedData, DataError
from transmamba.data_pipeline.mixture import Length
from transmamba.data_pipeline.remote import Unreachable
from transmamba.data_pipeline.tokenizer import load_tokenizer
from transmamba.data_position import data_steps_past, lengths_of
from transmamba.errors import (
    EXIT_CONFIG,
    EXIT_DATA,
    EXIT_DONE,
    EXIT_HANG,
    EXIT_INTERNAL,
    EXIT_INTERRUPTED,
    ConfigError,
    RunError,
)
from transmamba.generate import complete
from transmamba.heartbeat import Heartbeat
from transmamba.heartbeat import start as start_heartbeat
from transmamba.loop import train_steps
from transmamba.machine import choose_precision, choose_threads, describe_device, has_slow_bf16, sum_in_one_order
from transmamba.metrics import Journal, WandbFeed, read_metrics
from transmamba.next_commands import installed, train_again
from transmamba.parallel import topology as groups
from transmamba.parallel.topology import Topology
from transmamba.plan import Plan, make_plan, print_plan
from transmamba.plot import plot_loss
from transmamba.report import Report
from transmamba.run import Run, build_run, describe, make_folder
from transmamba.tracking.wandb_key import mode_line
from transmamba.transpoint import effective_points

_SLOW_BF16 = "; this CPU has no bf16 units: expect a tenth of the speed of precision=fp32"


class Outcome:
    """How the run ends, and the words for it."""

    def __init__(self) -> None:
        self.code, self.cause = EXIT_INTERNAL, "internal error"

    def be(self, code: int, cause: str) -> None:
        """Settle it."""
        self.code, self.cause = code, cause

    def blame(self, error: Exception) -> None:
        """Settle it by an error, which is told where it happened: in one line if it is one of ours."""
        if isinstance(error, RunError | DataError | ConfigError):
            self.be(_code_of(error), _line_of(error))
            print(self.cause, file=sys.stderr)
        else:
            self.be(EXIT_INTERNAL, traceback.format_exc())
            traceback.print_exc()


def train(config: Config) -> int:
    """Train a validated configuration, telling the screen and the run folder; returns the exit code."""
    outcome, report = Outcome(), Report(is_quiet=os.environ.get("RANK", "0") != "0")
    with _answered(outcome), _opened(config, report, outcome) as (run, first, plan, journal, heartbeat):
        code = train_steps(run, first, journal, report, heartbeat, plan.training_flops_per_token)
        outcome.be(code, "done" if code == EXIT_DONE else "stopped")
        if code == EXIT_DONE:
            _show_sample(run, report, "after")
        _farewell(run, report, code)
    return outcome.code


@contextmanager
def _answered(outcome: Outcome) -> Iterator[None]:
    """Turn what goes wrong before there is a run folder into an exit code."""
    quieten_libraries()
    try:
        yield
    except (RunError, ConfigError, DataError) as error:
        outcome.blame(error)
    except KeyboardInterrupt:
        print("transmamba: interrupted before the first step; there is nothing to save", file=sys.stderr)
        outcome.be(EXIT_INTERRUPTED, "interrupted")


@contextmanager
def _opened(config: Config, report: Report, outcome: Outcome) -> Iterator[tuple[Run, int, Plan, Journal, Heartbeat]]:
    """The run, ready for its first step; when the block ends, its last words.

    Everything before the run folder exists may refuse without leaving a trace; from then on all is on record.
    """
    corpus = open_corpus(config)
    with groups.joined(config.parallel) as topology:
        checkpoint, rejected = None, {}
        if config.run.dir is not None:
            checkpoint, rejected = resume.find_checkpoint(Path(config.run.dir) / "checkpoints", config, topology)
        threads_reason = settle_machine(config, topology, checkpoint)
        changed = [] if checkpoint is None else resume.check_belongs(checkpoint, config, corpus.fingerprint())
        lengths = [Length(0, config.data.seq_len)]
        if checkpoint is not None:
            lengths = lengths_of(checkpoint.manifest, config.data.seq_len)
            resume.count_tokens(checkpoint, config)
        folder = make_folder(config, topology)
        first = 0 if checkpoint is None else checkpoint.step
        with _recorded(config, folder, topology, corpus, first, outcome) as (journal, heartbeat):
            resume.log_choice(journal, checkpoint, rejected, changed)
            if topology.is_first:
                resume.put_aside(rejected)
            plan = make_plan(config, corpus)
            data = _data_lines(config, corpus, lengths)
            _banner(report, config, folder, topology, threads_reason, data, plan, checkpoint)
            run = build_run(config, topology, folder, corpus, lengths)
            if checkpoint is not None:
                resume.restore(checkpoint, run.chunks, run.optimizer, topology.shards)
                run.surplus_tokens = resume.surplus_tokens(checkpoint, config)
            _show_sample(run, report, "before")
            with closing(run.batches):
                yield run, first, plan, journal, heartbeat


@contextmanager
def _recorded(
    config: Config, folder: Path, topology: Topology, corpus: Corpus, first: int, outcome: Outcome
) -> Iterator[tuple[Journal, Heartbeat]]:
    """Keep the run folder's records and the watchdog while the block runs, and say how it ended."""
    if not topology.is_first:
        _write_to(folder / "logs" / f"rank{topology.rank:05d}.log")
    heartbeat = start_heartbeat(folder, topology.rank, topology.world_size, config.watchdog.limit_s)
    if topology.is_first:
        shutil.copyfile(corpus.first.tokenizer_path, folder / "tokenizer.json")
        describe(config, folder, topology.device)
    journal = Journal(folder, first, is_writer=topology.is_first)
    feed = WandbFeed(folder, config.wandb) if topology.is_first else None
    # Whether all ranks end alike; else the watchdog ends those that wait for this one.
    is_together = topology.world_size == 1
    try:
        yield journal, heartbeat
        is_together = True
    except Exception as error:
        is_together = is_together or isinstance(error, RunError)
        outcome.blame(error)
    finally:
        if not is_together:
            heartbeat.leave(0 if outcome.code == EXIT_INTERNAL else outcome.code)
        journal.event("exit", code=outcome.code, cause=outcome.cause)
        journal.close()
        if feed is not None:
            feed.close()
        if topology.is_first:
            _write_exit(folder, outcome.code, outcome.cause)
            (folder / "lock.json").unlink(missing_ok=True)
        if is_together:
            topology.agree(0)  # launchers end all ranks once one of them ended; rank 0 has had its say by now
            heartbeat.done()


def _write_to(log: Path) -> None:
    """Send this rank's output to a file: the screen belongs to rank 0."""
    with log.open("ab") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())


def settle_machine(config: Config, topology: Topology, checkpoint: Checkpoint | None) -> str:
    """Fix threads, precision and determinism, alike on all ranks; returns why so many threads.

    Sums are split by thread, so a resumed run takes the thread count it was saved with: same bits.
    """
    saved = None
    if checkpoint is not None and checkpoint.manifest["world_size"] == topology.world_size:
        saved = checkpoint.manifest["threads"]
    n_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    threads, reason = topology.on_first(lambda: choose_threads(config.train.threads or saved, n_local))
    if config.train.threads is None and saved is not None:
        reason = "as before the stop"
    config.train.threads = threads
    torch.set_num_threads(threads)
    if config.train.deterministic:
        sum_in_one_order()
    config.precision = choose_precision(config.precision, topology.device)
    return reason


def _banner(
    report: Report,
    config: Config,
    folder: Path,
    topology: Topology,
    threads_reason: str,
    data: str | list[str],
    plan: Plan,
    checkpoint: Checkpoint | None,
) -> None:
    parallel = config.parallel
    ranks = f"{topology.world_size}: tp {parallel.tp}{' with sp' if parallel.sp else ''} x cp {parallel.cp} x dp "
    ranks += f"{topology.dp} x pp {parallel.pp}" + (f" in {parallel.vpp} chunks each" if parallel.vpp > 1 else "")
    is_slow = config.precision == "bf16" and topology.device.type == "cpu" and has_slow_bf16()
    report.facts(
        {
            "run folder": str(folder),
            "device": f"{describe_device(topology.device)}, {config.train.threads} threads ({threads_reason})",
            **({"ranks": ranks} if topology.world_size > 1 else {}),
            "precision": f"{config.precision}, ZeRO stage {config.zero.stage}" + (_SLOW_BF16 if is_slow else ""),
            "data": data,
            "start": "new" if checkpoint is None else f"continues {checkpoint.path.name}",
            **({} if config.wandb.mode == "disabled" else {"wandb": mode_line(config.wandb, folder, os.environ)}),
        }
    )
    print_plan(plan, report.console)


def _data_lines(config: Config, corpus: Corpus, lengths: Sequence[Length]) -> str | list[str]:
    """What is trained on; of several sources how often the run passes over each."""
    if not config.data.sources:
        return f"{config.data.path}: {corpus.n_tokens:,} tokens of {corpus.n_documents:,} documents"
    mixture = corpus.mixture(config).following(lengths)
    n_windows = data_steps_past(total_steps(config), config.data.skip) * config.train.global_batch
    epochs, counts = mixture.epochs(n_windows), mixture.blend.counts(n_windows)
    return [
        f"{name}: {folder.manifest.splits['train'].n_tokens:,} tokens, {counts[name] / n_windows:.1%} of the run, "
        f"{epochs[name]:.2f} epochs"
        for name, folder in corpus.sources.items()
    ]


def _show_sample(run: Run, report: Report, label: str) -> None:
    sample = run.config.sample
    if not sample.prompt or run.topology.world_size > 1:  # decoding is for one process: `transmamba generate`
        return
    tokenizer = load_tokenizer(run.corpus.first.tokenizer_path)
    pieces = complete(
        run.chunks[0],
        tokenizer,
        sample.prompt,
        effective_points(run.config, total_steps(run.config)),
        n_tokens=sample.tokens,
        eod_id=run.corpus.first.eod_id,
    )
    report.sample(label, sample.prompt, "".join(pieces))


def _farewell(run: Run, report: Report, code: int) -> None:
    """Where everything is, and what to type next."""
    if not run.topology.is_first:
        return
    picture = plot_loss(run.folder)
    newest = published(run.checkpoints)
    again = train_again(run.folder)
    rows: dict[str, str | list[str]] = {"checkpoint": str(newest[0]) if newest else "none"}
    rows["loss curve"] = str(picture or "none")
    if code != EXIT_DONE:
        report.facts(rows | {"resume": again})
        return
    records = read_metrics(run.folder)
    held = records[-1].get("validation", {}) if records else {}
    for validation in run.held:
        result = held.get(validation.name)
        if result is None:
            continue
        gzip = validation.gzip_bits_per_byte
        rows[validation.name] = (
            f"{result['loss']:.4f} nats per token (unigram entropy {validation.unigram_entropy():.4f}), "
            f"{result['bits_per_byte']:.4f} bits per byte" + ("" if gzip is None else f" (gzip -9 {gzip:.4f})")
        )
    tokens = run.config.train.tokens
    longer = f"train.steps={2 * total_steps(run.config)}" if tokens is None else f"train.tokens={2 * tokens}"
    rows["next"] = [
        installed("transmamba", "generate", str(run.folder), "-p", run.config.sample.prompt or "The"),
        f"{again} {longer}",
        f"{again} {_another(run.config, run.folder)}",
    ]
    report.facts(rows)


def _another(config: Config, folder: Path) -> str:
    """What trains another model on the same data, for as long, with windows of the same length."""
    model = "tiny" if config.model.kind == "transformer" else "tiny_transformer"
    return f"model={model} {shlex.quote(f'run.dir={folder}-{model}')}"


def _write_exit(folder: Path, code: int, cause: str) -> None:
    newest = published(folder / "checkpoints")
    record = {
        "code": code,
        "cause": cause,
        "checkpoint": str(newest[0]) if newest else None,
        "resume": train_again(folder),
    }
    (folder / "exit.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _code_of(error: Exception) -> int:
    if isinstance(error, RunError):
        return error.code
    if isinstance(error, Unreachable):  # it may be there for the next start
        return EXIT_HANG
    return EXIT_DATA if isinstance(error, DamagedData) else EXIT_CONFIG


def _line_of(error: Exception) -> str:
    if isinstance(error, DataError):
        return f"transmamba: error: {error.what}: {error.problem}. Fix: {error.fix}."
    return str(error)


def quieten_libraries() -> None:
    """Their notes about missing extras and coming changes are not for the people who train."""
    warnings.filterwarnings("ignore", module=r"(torch|megatron|deepspeed|wandb|pydantic|webdataset)(\..*)?")
    for name in ("DeepSpeed", "megatron", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
