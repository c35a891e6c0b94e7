"""A small model trained for a few steps on random packed rows, in any layout, precision and ZeRO stage."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from transmamba import checkpoint, resume
from transmamba.batches import Batches
from transmamba.checkpoint import Piece, assemble
from transmamba.config import Config
from transmamba.data_pipeline.stream import Windows
from transmamba.optimizer import learning_rate
from transmamba.parallel.pipeline import run_schedule
from transmamba.parallel.topology import Topology
from transmamba.run import build_chunks, build_optimizer, build_stage
from transmamba.stages import partition
from transmamba.transpoint import effective_points

ROWS, TOKENS, VOCAB = 8, 48, 100
# Neither is on an edge of a shard (12 or 24 tokens), of a chunk or of a document.
POINTS = [0, 7, 19, math.inf]
# Layers of unequal cost, so that the pipeline's stages are not equally long.
LAYER_COSTS = [1.0, 1.0, 1.5, 1.0, 1.0]


@dataclass
class Trained:
    """What one rank, or after `merge` the whole job, has to show."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)  # first moments after the first step, masters after the last

    def whole(self, kind: str) -> dict[str, torch.Tensor]:
        """Global tensors of one kind, flattened; every element must be there exactly once."""
        found: dict[str, dict[Any, list[Piece]]] = {}
        for piece in self.pieces:
            if piece.kind == kind:
                found.setdefault(piece.name, {}).setdefault(piece.shard, []).append(piece)
        result = {}
        for name, shards in found.items():
            parts = {}
            for shard, pieces in shards.items():
                pieces.sort(key=lambda piece: piece.start)
                assert [p.start for p in pieces] == [
                    sum(q.values.numel() for q in pieces[:i]) for i in range(len(pieces))
                ]
                parts[shard] = [piece.values for piece in pieces]
            result[name] = assemble(next(iter(shards.values()))[0].shape, parts)
        return result


def config_of(**options: object) -> Config:
    """The rig's configuration; `parallel__tp=2` sets a key, `model={...}` adds to a section."""
    values: dict[str, Any] = {
        "precision": "fp32",
        "model": {
            "n_layers": 5,
            "d_model": 32,
            "n_heads": 4,
            "d_ff": 40,
            "ssm_head_dim": 8,
            "ssm_state": 8,
            "ssm_groups": 4,
            "pattern": "MAMMA",
            # Larger weights make the gradient of D a small rest of large terms: 4e-5 off float64 on one rank already.
            "init_std": 0.03,
        },
        "transpoint": {"points": POINTS},
        "data": {"seq_len": TOKENS},
        "train": {"steps": 20, "global_batch": ROWS, "micro_batch": 2},
        # A large epsilon: with 1e-8 the first updates of Adam turn rounding in tiny gradients into whole steps.
        "optim": {"lr": 3e-3, "warmup": 2, "clip": 0.25, "eps": 1e-4},
    }
    for key, value in options.items():
        section, _, name = key.partition("__")
        values[section] = {**values.get(section, {}), name: value} if name else value
    return Config.model_validate(values)


class RandomRows:
    """Stands in for the stream of a corpus: row k is the same whoever asks for it; rows carry unequal weights."""

    seq_len = TOKENS
    streams: ClassVar[dict[str, object]] = {}

    def rows(self, first: int, count: int) -> Windows:
        """Rows `first` to `first + count` of the global order."""
        parts = [self._row(index) for index in range(first, first + count)]
        return Windows(
            np.stack([tokens for tokens, _, _ in parts]),
            [starts for _, starts, _ in parts],
            np.stack([weight for _, _, weight in parts]),
        )

    def _row(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        draw, place = np.random.default_rng(index), index % ROWS
        weight = draw.random(TOKENS) > 0.1 * place
        return draw.integers(0, VOCAB, TOKENS + 1), np.array([0, 3 + place, 21 + place]), weight.astype(np.float32)


def batches_of(config: Config, topology: Topology) -> Batches:
    """This rank's part of the same global batches however they are cut."""
    return Batches(RandomRows(), config, topology)  # pyright: ignore[reportArgumentType]


class Job:
    """The model, its optimiser and its data on one rank."""

    def __init__(self, config: Config, topology: Topology):
        self.config, self.topology = config, topology
        n_chunks = config.parallel.pp * config.parallel.vpp
        layers = partition(LAYER_COSTS[: config.model.n_layers], n_chunks, last_extra=0.3)
        self.chunks = build_chunks(config, VOCAB, topology, layers)
        self.optimizer = build_optimizer(self.chunks, config, topology)
        self.stage = build_stage(self.chunks, self.optimizer, config, topology)
        self.batches = batches_of(config, topology)
        self.trained = Trained()

    def step(self, step: int) -> None:
        """One optimizer step, counted from 0."""
        config, topology = self.config, self.topology
        micro_batches = self.batches.of_step(step, effective_points(config, step))
        losses = run_schedule(self.stage, micro_batches, n_rows=config.train.micro_batch, n_tokens=TOKENS)
        self.trained.losses.append(float(topology.sum_tokens(sum(losses, torch.zeros(())).double())))
        self.trained.norms.append(self.optimizer.step(learning_rate(config, step + 1)))

    def keep(self, kind: str, step: int) -> None:
        """Keep this rank's pieces of one kind as they are after `step` steps."""
        pieces = resume.pieces(self.chunks, self.optimizer, step, self.topology)
        self.trained.pieces += [p._replace(values=p.values.clone()) for p in pieces if p.kind == kind]

    def save(self, folder: Path, step: int) -> None:
        """Publish a checkpoint of `step`, all ranks together."""
        pieces = resume.pieces(self.chunks, self.optimizer, step, self.topology)
        checkpoint.save(folder, step, pieces, {}, self.topology)

    def load(self, folder: Path, step: int) -> None:
        """Continue from a checkpoint of any layout."""
        saved = checkpoint.read(checkpoint.directory_of(folder, step))
        resume.restore(saved, self.chunks, self.optimizer, self.topology.shards)


def train(config: Config, topology: Topology, n_steps: int = 6) -> Trained:
    """Train from the seed's weights; returns this rank's part."""
    job = Job(config, topology)
    for step in range(n_steps):
        job.step(step)
        if step == 0:
            job.keep("exp_avg", 1)
    job.keep("master", n_steps)
    return job.trained


def merge(ranks: Sequence[Trained]) -> Trained:
    """The job's result; all ranks must report the same losses and norms."""
    first = ranks[0]
    assert all((rank.losses, rank.norms) == (first.losses, first.norms) for rank in ranks), (
        "ranks report different losses"
    )
    return Trained(first.losses, first.norms, [piece for rank in ranks for piece in rank.pieces])


def gradients(trained: Trained, config: Config) -> dict[str, torch.Tensor]:
    """Every gradient of the first step by global name, as the first moment and the norm reveal it."""
    clip = config.optim.clip
    scale = 1.0 if clip is None else min(1.0, clip / (trained.norms[0] + 1e-6))
    return {name: moment / ((1 - config.optim.betas[0]) * scale) for name, moment in trained.whole("exp_avg").items()}
