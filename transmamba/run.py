"""Everything a training step needs, put together once."""

import json
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

from transmamba.batches import Batches, MicroBatch, Packer
from transmamba.compose import to_yaml
from transmamba.config import Config, padded_vocab, tokens_per_step
from transmamba.corpus import Corpus
from transmamba.costs import logit_flops
from transmamba.data_pipeline.mixture import Length
from transmamba.data_pipeline.tokenizer import load_tokenizer, token_bytes
from transmamba.evaluate import Held
from transmamba.machine import environment
from transmamba.model.init import global_name
from transmamba.model.model import Model
from transmamba.optimizer import decayed_names
from transmamba.parallel.gradients import mark_copy
from transmamba.parallel.pipeline import Stage, StageOutput
from transmamba.parallel.shards import WHOLE, Shards
from transmamba.parallel.topology import Topology
from transmamba.parallel.zero import Optimizer
from transmamba.plan import make_plan
from transmamba.stages import partition
from transmamba.transpoint import layer_kinds


@dataclass
class Run:
    """One run, as one of its ranks sees it."""

    config: Config
    topology: Topology
    folder: Path
    corpus: Corpus
    chunks: list[Model]
    optimizer: Optimizer
    stage: Stage
    batches: Batches
    held: list[Held]
    surplus_tokens: int = 0
    """Tokens read so far beyond steps x tokens per step: not 0 once windows had another length."""
    lengths: Sequence[Length] = ()
    """That the windows had so far, the present one included."""

    def tokens_at(self, step: int) -> int:
        """Tokens read in the first `step` steps; none of these is ahead of a change of the windows' length."""
        return step * tokens_per_step(self.config) + self.surplus_tokens

    @property
    def layers(self) -> dict[int, nn.Module]:
        """The layers on this rank by number."""
        return {int(index): layer for chunk in self.chunks for index, layer in chunk.layers.items()}

    @property
    def checkpoints(self) -> Path:
        """Where this run's checkpoints lie."""
        return self.folder / "checkpoints"


def build_run(config: Config, topology: Topology, folder: Path, corpus: Corpus, lengths: Sequence[Length] = ()) -> Run:
    """Build model, optimiser and data of a run; nothing is read from checkpoints yet.

    Args:
        lengths: that its windows had, the present one included; not given, it never had another.
    """
    lengths = lengths or [Length(0, config.data.seq_len)]
    chunks = build_chunks(config, corpus.vocab_size, topology, stage_layers(config, corpus))
    optimizer = build_optimizer(chunks, config, topology)
    stage = build_stage(chunks, optimizer, config, topology)

    bytes_of = token_bytes(load_tokenizer(corpus.first.tokenizer_path))
    packer = Packer(config.data, config.train, topology)
    held = [Held(name, corpus.held_stream(name, config), packer, bytes_of) for name in corpus.held]
    ledger = folder if config.data.ledger else None
    batches = Batches(corpus.mixture(config).following(lengths), config, topology, ledger)
    return Run(config, topology, folder, corpus, chunks, optimizer, stage, batches, held, lengths=lengths)


def build_model(config: Config, n_tokens_known: int) -> Model:
    """The whole model of a configuration with its initial weights, in float32 on the CPU."""
    return _build(config, n_tokens_known, WHOLE, None)


def build_chunks(config: Config, n_tokens_known: int, topology: Topology, layers: Sequence[range]) -> list[Model]:
    """This rank's chunks, in the order in which a micro-batch meets them.

    Args:
        n_tokens_known: vocabulary of the tokenizer.
        layers: of all chunks of the whole model; chunk i lives on pipeline rank i % pp (Megatron's interleaving).
    """
    own = layers[topology.pp_rank :: topology.pp]
    return [_build(config, n_tokens_known, topology.shards, part).to(topology.device) for part in own]


def _build(config: Config, n_tokens_known: int, shards: Shards, layers: range | None) -> Model:
    return Model(
        config.model,
        layer_kinds(config.model),
        n_tokens_known=n_tokens_known,
        n_rows=padded_vocab(config.model.vocab_size or n_tokens_known),
        seed=config.seed,
        recompute=config.train.recompute,
        shards=shards,
        layers=layers,
    )


def stage_layers(config: Config, corpus: Corpus | None) -> list[range]:
    """Layers of every chunk: neighbours whose costs at their TransPoints balance, the output projection included."""
    plan = make_plan(config, corpus)
    costs = [layer.forward_flops_per_token for layer in plan.layers]
    n_chunks = config.parallel.pp * config.parallel.vpp
    return partition(costs, n_chunks, last_extra=logit_flops(config.model, plan.vocab_rows))


def named_weights(chunks: Sequence[Model], config: Config) -> dict[str, nn.Parameter]:
    """This rank's parameters by global name."""
    tied = config.model.tied
    return {global_name(name, tied): weight for chunk in chunks for name, weight in chunk.named_parameters()}


def build_optimizer(chunks: Sequence[Model], config: Config, topology: Topology) -> Optimizer:
    """AdamW over the chunks' weights, which it takes over, in the configured ZeRO stage and precision."""
    names = named_weights(chunks, config)
    shared = None
    if config.model.tied and topology.pp > 1 and (chunks[0].is_first or chunks[-1].is_last):
        shared = names["embedding.weight"]
        if chunks[-1].is_last:
            mark_copy(shared)
    return Optimizer(
        chunks[0] if len(chunks) == 1 else nn.ModuleList(chunks),
        names,
        decayed_names(names, config),
        config.optim,
        topology,
        stage=config.zero.stage,
        bf16=config.precision == "bf16",
        micro_batch=config.train.micro_batch,
        shared=shared,
    )


def build_stage(chunks: Sequence[Model], optimizer: Optimizer, config: Config, topology: Topology) -> Stage:
    """The chunks as a pipeline stage: a micro-batch in, its share of the step's loss out."""
    z_loss = config.optim.z_loss

    def forward(module: nn.Module, batch: MicroBatch, x_TBD: Tensor | None) -> StageOutput | Tensor:
        output = module(
            batch.ids_BT,
            batch.targets_BT,
            batch.weight_BT,
            batch.transpoints,
            batch.documents,
            z_loss=z_loss,
            x_TBD=x_TBD,
        )
        return output if isinstance(output, Tensor) else StageOutput(output.loss, output.nll)

    # Stages 2 and 3 follow the gradients by hooks on the engine's forward; they have no pipeline.
    modules = [optimizer.module] if len(chunks) == 1 else chunks
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    return Stage(modules, forward, topology, config.parallel, hidden_size=config.model.d_model, dtype=dtype)


def make_folder(config: Config, topology: Topology) -> Path:
    """Create the run folder, a fresh one under runs/ unless `run.dir` names it, and note who holds it."""
    folder = topology.on_first(lambda: _make_folder(config))
    config.run.dir = str(folder)
    return folder


def _make_folder(config: Config) -> Path:
    if config.run.dir is None:
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        folder = Path("runs") / f"{stamp}-{config.model.kind}"
        attempt = 1
        while folder.exists():
            attempt += 1
            folder = Path("runs") / f"{stamp}-{config.model.kind}-{attempt}"
        config.run.dir = str(folder)
    folder = Path(config.run.dir)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "logs").mkdir(exist_ok=True)
    holder = {"host": socket.gethostname(), "pid": os.getpid()}
    (folder / "lock.json").write_text(json.dumps(holder), encoding="utf-8")
    return folder


def describe(config: Config, folder: Path, device: torch.device) -> None:
    """Write the resolved configuration and the environment into the run folder."""
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    record = json.dumps(environment(config, device), indent=1)
    (folder / "env.json").write_text(record + "\n", encoding="utf-8")
