"""A small model trained for a few steps on random packed rows, in any precision, ZeRO stage and micro-batch."""
# B rows, T tokens.

import math
from dataclasses import dataclass, field

import torch

from transmamba.batches import MicroBatch
from transmamba.config import Config
from transmamba.kernels.documents import Documents
from transmamba.optimizer import learning_rate
from transmamba.parallel.pipeline import run_schedule
from transmamba.run import build_model, build_optimizer, build_stage

ROWS, TOKENS, VOCAB = 6, 40, 100
POINTS = [0, 7, math.inf]


@dataclass
class Trained:
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    masters: dict[str, torch.Tensor] = field(default_factory=dict)


def config_of(**options: object) -> Config:
    values: dict[str, object] = {
        "precision": "fp32",
        "model": {"n_layers": 3, "d_model": 24, "n_heads": 2, "d_ff": 40, "ssm_head_dim": 12, "ssm_state": 8},
        "transpoint": {"points": POINTS},
        "data": {"seq_len": TOKENS},
        "train": {"steps": 20, "global_batch": ROWS, "micro_batch": ROWS},
        # A large epsilon: with 1e-8 the first updates of Adam turn rounding in tiny gradients into whole steps.
        "optim": {"lr": 1e-2, "warmup": 2, "clip": 0.5, "eps": 1e-4},
    }
    for key, value in options.items():
        section, _, name = key.partition("__")
        values[section] = {**values.get(section, {}), name: value} if name else value  # pyright: ignore[reportGeneralTypeIssues]
    return Config.model_validate(values)


def batches_of(config: Config, step: int) -> list[MicroBatch]:
    """The same global batch however it is cut; rows carry unequal weights."""
    draw = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(0, VOCAB, (ROWS, TOKENS + 1), generator=draw)
    weight = (torch.rand(ROWS, TOKENS, generator=draw) > torch.linspace(0.0, 0.8, ROWS)[:, None]).float()
    starts = [[0, 3 + row, 20 + row] for row in range(ROWS)]
    size = config.train.micro_batch
    return [
        MicroBatch(
            ids[first : first + size, :-1],
            ids[first : first + size, 1:],
            weight[first : first + size] / weight.sum(),
            Documents.from_starts(starts[first : first + size], TOKENS),
            POINTS,
        )
        for first in range(0, ROWS, size)
    ]


def train(config: Config, n_steps: int = 6) -> Trained:
    """Train from the seed's weights; returns losses, gradient norms and the masters after the last step."""
    model = build_model(config, VOCAB)
    optimizer = build_optimizer(model, config)
    stage = build_stage(optimizer.module, config)
    trained = Trained()
    for step in range(n_steps):
        reports = run_schedule(stage, batches_of(config, step), n_tokens=TOKENS)
        trained.losses.append(torch.stack(reports).sum().item())
        trained.norms.append(optimizer.step(learning_rate(config, step + 1)))
    for piece in optimizer.slices(n_steps):
        whole = trained.masters.setdefault(piece.name, torch.zeros(math.prod(piece.shape)))
        master = piece.views["master"]
        whole[piece.start : piece.start + master.numel()] = master
    return trained
