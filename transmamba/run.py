"""Everything a training step needs, put together once."""

import hashlib
import json
import os
import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from transmamba.batches import Batches, MicroBatch
from transmamba.compose import to_yaml
from transmamba.config import Config, padded_vocab
from transmamba.data_pipeline.manifest import Manifest
from transmamba.data_pipeline.stream import Stream
from transmamba.data_pipeline.tokenizer import load_tokenizer, token_bytes
from transmamba.data_pipeline.tokens import TokenStore
from transmamba.evaluate import Held
from transmamba.machine import environment
from transmamba.model.model import Model
from transmamba.optimizer import decayed_names
from transmamba.parallel.pipeline import Stage, StageOutput
from transmamba.parallel.topology import Topology
from transmamba.parallel.zero import Optimizer
from transmamba.transpoint import layer_kinds


@dataclass
class Run:
    """One run in one process."""

    config: Config
    topology: Topology
    folder: Path
    manifest: Manifest
    model: Model
    optimizer: Optimizer
    stage: Stage
    batches: Batches
    held: list[Held]

    @property
    def checkpoints(self) -> Path:
        """Where this run's checkpoints lie."""
        return self.folder / "checkpoints"


def build_run(config: Config, topology: Topology, folder: Path, manifests: dict[str, Manifest]) -> Run:
    """Build model, optimiser and data of a run; nothing is read from checkpoints yet.

    Args:
        manifests: the training data under "train" and every validation set by name.
    """
    manifest = manifests["train"]
    model = build_model(config, manifest.vocab_size)
    model.to(topology.device)
    optimizer = build_optimizer(model, config)
    stage = build_stage(optimizer.module, config)

    def batches_of(source: Manifest, split: str) -> Batches:
        stream = Stream(
            TokenStore(source, split),
            seq_len=config.data.seq_len,
            seed=config.seed,
            shuffle_shards=config.data.shuffle_shards,
        )
        return Batches(stream, config.data, config.train, topology.device)

    held = []
    for name, source in manifests.items():
        batches = batches_of(source, "validation")
        bytes_of = token_bytes(load_tokenizer(source.tokenizer_path))
        held.append(Held("validation" if name == "train" else name, batches.stream, batches, bytes_of))
    return Run(config, topology, folder, manifest, model, optimizer, stage, batches_of(manifest, "train"), held)


def build_model(config: Config, n_tokens_known: int) -> Model:
    """The model of a configuration with its initial weights, in float32 on the CPU."""
    return Model(
        config.model,
        layer_kinds(config.model),
        n_tokens_known=n_tokens_known,
        n_rows=padded_vocab(config.model.vocab_size or n_tokens_known),
        seed=config.seed,
        recompute=config.train.recompute == "full",
    )


def build_optimizer(model: Model, config: Config) -> Optimizer:
    """AdamW over the model's weights, which it takes over, in the configured ZeRO stage and precision."""
    return Optimizer(
        model,
        decayed_names(model, config),
        config.optim,
        stage=config.zero.stage,
        bf16=config.precision == "bf16",
        micro_batch=config.train.micro_batch,
    )


def build_stage(module: torch.nn.Module, config: Config) -> Stage:
    """The model as a pipeline stage: a micro-batch in, its share of the step's loss out."""
    z_loss = config.optim.z_loss

    def forward(batch: MicroBatch) -> StageOutput:
        sums = module(
            batch.ids_BT, batch.targets_BT, batch.weight_BT, batch.transpoints, batch.documents, z_loss=z_loss
        )
        return StageOutput(sums.loss, sums.nll)

    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    return Stage(module, forward, hidden_size=config.model.d_model, dtype=dtype)


def make_folder(config: Config) -> Path:
    """Create the run folder (a fresh one under runs/ unless `run.dir` names it) and note who holds it."""
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


def fingerprint(manifest: Manifest) -> str:
    """A hash that changes with the tokens, their order on disk or the tokenizer, but not with the folder's place."""
    parts = [manifest.tokenizer_sha256]
    for name, split in sorted(manifest.splits.items()):
        parts += [name, *(shard.sha256 for shard in split.shards)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
