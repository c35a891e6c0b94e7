"""Small runs of every kind with a checkpoint and without training, and a corpus for them."""

import pydoc_data.topics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transmamba.checkpoints_tools.hf_export import Export, export, load_exported
from transmamba.checkpoints_tools.hf_import import save_start
from transmamba.compose import load
from transmamba.data_pipeline.tokenizer import train_tokenizer
from transmamba.model.model import Model
from transmamba.run import build_model
from transmamba.transpoint import effective_points

Points = list[int | float]

SEQ_LEN = 96
SIZES = [
    "model.n_layers=4",
    "model.d_model=32",
    "model.n_heads=4",
    "model.head_dim=null",
    "model.ssm_head_dim=8",
    "model.ssm_state=6",
    "model.ssm_groups=2",
    f"data.seq_len={SEQ_LEN}",
    "train.steps=4",
    "precision=fp32",
]
# Points on no edge of a window, of the scan's chunks or of the prompts; the stock kinds have none.
KINDS = {
    "transmamba": ["transpoint.points=[0,9,70,inf]"],
    "both": ["transpoint.points=[1,40,70,inf]", "model.rope=both", "model.mixer_norm=none", "model.d_skip=false"],
    "transformer": ["model.kind=transformer"],
    "hybrid": ["model.kind=hybrid", "model.pattern=MA", "model.tied=false"],
    "mamba2": ["model.kind=mamba2"],
    "mamba2_stock": ["model.kind=mamba2", "model.d_ff=0"],
}
STOCK = {"transformer": "LlamaForCausalLM", "mamba2_stock": "Mamba2ForCausalLM"}
N_TOKENS = 300  # of the tokenizer: 84 of the 384 rows are padding


def topics(count: int) -> list[str]:
    """Python's own help texts."""
    return [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)[:count]]


def make_run(folder: Path, kind: str, step: int = 3, *overrides: str) -> Model:
    """Write a run whose weights are far from their symmetric start; returns its model."""
    folder.mkdir(parents=True)
    tokenizer = train_tokenizer(topics(8), vocab_size=N_TOKENS)
    assert tokenizer.get_vocab_size() == N_TOKENS
    tokenizer.save(str(folder / "tokenizer.json"))
    width = [] if "model.d_ff=0" in KINDS[kind] else ["model.d_ff=48"]
    config = load([*SIZES, *KINDS[kind], *width, *overrides, f"run.dir={folder}"])
    model = build_model(config, N_TOKENS).eval()
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.08 * torch.randn(parameter.shape, generator=draw))
    save_start(folder, config, model, {"fingerprint": "", "next_row": 0, "vocab_size": N_TOKENS, "eod_id": 0}, step)
    return model


class Exported:
    """A run, what was exported of it, and both models."""

    def __init__(self, root: Path, kind: str, check_tokens: int = 0):
        self.kind, self.run, self.folder = kind, root / "run", root / "hf"
        self.ours: Model = make_run(self.run, kind)
        self.done: Export = export(self.run, self.folder, shard_bytes=100_000, check_tokens=check_tokens)
        self.points: Points = effective_points(load(["--config", str(self.run / "config.yaml")]), 3)

    def theirs(self) -> Any:
        family: Any = {"transformer": "llama", "mamba2_stock": "mamba2"}.get(self.kind, "transmamba")
        return load_exported(self.folder, family)


def ids_of(*shape: int) -> Tensor:
    return torch.randint(1, N_TOKENS, shape, generator=torch.Generator().manual_seed(3))
