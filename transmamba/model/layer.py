"""One layer: norm -> mixer -> norm -> feed-forward, with residuals."""
# B batch, T tokens, D model width.

import torch.nn.functional as F
from torch import Tensor, nn

from transmamba.config import ModelConfig
from transmamba.kernels.documents import Documents
from transmamba.model.attention import AttentionMixer
from transmamba.model.mamba2 import Mamba2Mixer
from transmamba.model.mixer import TransMambaMixer
from transmamba.model.norm import RMSNorm

MIXERS = {"transmamba": TransMambaMixer, "transformer": AttentionMixer, "mamba2": Mamba2Mixer}


class FeedForward(nn.Module):
    """SwiGLU without biases."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up = nn.Linear(config.d_model, 2 * config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=False)

    def forward(self, x_TBD: Tensor) -> Tensor:
        gate, up = self.gate_up(x_TBD).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Layer(nn.Module):
    """A mixer and, unless d_ff is 0, a feed-forward network, each behind its norm."""

    def __init__(self, config: ModelConfig, kind: str):
        super().__init__()
        self.kind = kind
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = MIXERS[kind](config)
        has_ffn = config.d_ff > 0
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps) if has_ffn else None
        self.ffn = FeedForward(config) if has_ffn else None

    def forward(self, x_TBD: Tensor, transpoint: int | float, documents: Documents) -> Tensor:
        x_TBD = x_TBD + self.mixer(self.norm(x_TBD), transpoint, documents)
        return self.feed_forward(x_TBD)

    def feed_forward(self, x_TBD: Tensor) -> Tensor:
        """The per-token half of the layer, shared with decoding."""
        if self.ffn is None or self.ffn_norm is None:
            return x_TBD
        return x_TBD + self.ffn(self.ffn_norm(x_TBD))
