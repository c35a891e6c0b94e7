"""A small model trained for a few steps on random packed rows, in any layout, precision and ZeRO stage."""
# B rows, T tokens.

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from transmamba import resume
from transmamba.batches import MicroBatch
from transmamba.checkpoint import Piece, assemble
from transmamba.config import Config
from transmamba.kernels.documents import Documents
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


def batches_of(config: Config, step: int, topology: Topology) -> list[MicroBatch]:
    """This rank's part of the same global batch however it is cut; rows carry unequal weights."""
    draw = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(0, VOCAB, (ROWS, TOKENS + 1), generator=draw)
    weight = (torch.rand(ROWS, TOKENS, generator=draw) > torch.linspace(0.0, 0.8, ROWS)[:, None]).float()
    starts = [[0, 3 + row, 21 + row] for row in range(ROWS)]
    size, n_local = config.train.micro_batch, ROWS // topology.dp
    own = topology.shards.own_tokens
    first_row = topology.dp_rank * n_local
    return [
        MicroBatch(
            own(ids[first : first + size, :-1]),
            own(ids[first : first + size, 1:]),
            own(weight[first : first + size] / weight.sum()),
            Documents.from_starts(starts[first : first + size], TOKENS)
            if config.data.document_mask
            else Documents.whole(size, TOKENS),
            effective_points(config, step),
        )
        for first in range(first_row, first_row + n_local, size)
    ]


def train(config: Config, topology: Topology, n_steps: int = 6) -> Trained:
    """Train from the seed's weights; returns this rank's part."""
    n_chunks = config.parallel.pp * config.parallel.vpp
    layers = partition(LAYER_COSTS[: config.model.n_layers], n_chunks, last_extra=0.3)
    chunks = build_chunks(config, VOCAB, topology, layers)
    optimizer = build_optimizer(chunks, config, topology)
    stage = build_stage(chunks, optimizer, config, topology)
    trained = Trained()

    def keep(kind: str, step: int) -> None:
        pieces = resume.pieces(chunks, optimizer, step, topology)
        trained.pieces += [piece._replace(values=piece.values.clone()) for piece in pieces if piece.kind == kind]

    for step in range(n_steps):
        batches = batches_of(config, step, topology)
        losses = run_schedule(stage, batches, n_rows=config.train.micro_batch, n_tokens=TOKENS)
        trained.losses.append(float(topology.sum_tokens(sum(losses, torch.zeros(())).double())))
        trained.norms.append(optimizer.step(learning_rate(config, step + 1)))
        if step == 0:
            keep("exp_avg", 1)
    keep("master", n_steps)
    return trained


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
