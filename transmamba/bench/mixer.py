"""Our Mamba-2 mixer against transformers' on the CPU, same weights, same numbers."""
# B batch, T tokens, D model width.

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from transmamba.config import ModelConfig
from transmamba.kernels.documents import Documents
from transmamba.kernels.ssd.bench import time_row
from transmamba.kernels.testing import assert_close
from transmamba.model.init import initialise
from transmamba.model.mamba2 import Mamba2Mixer
from transmamba.peers import mamba2_peer

ROWS, TOKENS = 2, 1024
CONFIG = ModelConfig(d_model=256, n_layers=1, ssm_expand=2, ssm_head_dim=64, ssm_state=64, ssm_groups=1)
PEER_CHUNKS = (64, 128, 256)
WANTED = 3.0


class _BatchFirst(nn.Module):
    """Our mixer with the peer's [B, T, D] in and out."""

    def __init__(self, mixer: Mamba2Mixer):
        super().__init__()
        self.mixer = mixer
        self.documents = Documents.whole(ROWS, TOKENS)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.mixer(x_BTD.transpose(0, 1), 0, self.documents).transpose(0, 1)


def mixer_rows(budget_s: float) -> Iterator[dict[str, Any]]:
    """Time the forward and the forward with backward; a missing transformers is named.

    Raises:
        AssertionError: the two compute different outputs or input gradients.
    """
    torch.manual_seed(0)
    mixer = Mamba2Mixer(CONFIG)
    initialise(mixer, CONFIG, seed=0, prefix="layers.0.mixer.")
    try:
        peers = {f"transformers chunk {size}": mamba2_peer(mixer, CONFIG, size) for size in PEER_CHUNKS}
    except ImportError:
        yield {"row": "mixer against transformers", "missing": "transformers (pip install -e '.[peers]')"}
        return
    contestants: dict[str, Any] = {"ours": _BatchFirst(mixer), **peers}
    inputs = {"x_BTD": torch.randn(ROWS, TOKENS, CONFIG.d_model)}
    shape = f"Mamba-2 mixer, float32, B{ROWS} T{TOKENS} D{CONFIG.d_model}"
    for name, step in (("forward", _forward), ("forward + backward", _forward_backward)):
        expected = step(contestants["ours"], inputs)
        for peer in peers:
            for ours, theirs in zip(expected, step(contestants[peer], inputs), strict=True):
                assert_close(ours, theirs, 1e-4, peer)
        yield time_row(f"{shape} {name}", contestants, inputs, step, budget_s / 2) | {"target": WANTED}


def _forward(module: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [module(inputs["x_BTD"])]


def _forward_backward(module: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    x_BTD = inputs["x_BTD"].detach().requires_grad_()
    y_BTD = module(x_BTD)
    module.zero_grad()
    y_BTD.backward(torch.ones_like(y_BTD))
    assert x_BTD.grad is not None
    return [y_BTD.detach(), x_BTD.grad]
