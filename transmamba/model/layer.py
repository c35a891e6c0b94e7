"""One layer: norm -> mixer -> norm -> feed-forward, with residuals."""
# B batch, T tokens, D model width.

import torch.nn.functional as F
from torch import Tensor, nn

from transmamba.config import ModelConfig
from transmamba.kernels.documents import Documents
from transmamba.model.attention import AttentionMixer
from transmamba.model.linear import GateUp, RowLinear
from transmamba.model.mamba2 import Mamba2Mixer
from transmamba.model.mixer import TransMambaMixer
from transmamba.model.norm import RMSNorm
from transmamba.parallel.shards import WHOLE, Shards

MIXERS = {"transmamba": TransMambaMixer, "transformer": AttentionMixer, "mamba2": Mamba2Mixer}


class FeedForward(nn.Module):
    """SwiGLU without biases."""

    def __init__(self, config: ModelConfig, shards: Shards):
        super().__init__()
        self.shards = shards
        self.gate_up = GateUp(config.d_model, config.d_ff, shards)
        self.down = RowLinear(config.d_ff, config.d_model, shards)

    def forward(self, x_TBD: Tensor) -> Tensor:
        gate_TBF, up_TBF = self.gate_up(self.shards.gather_tokens(x_TBD))
        return self.down(F.silu(gate_TBF) * up_TBF)


class Layer(nn.Module):
    """A mixer and, unless d_ff is 0, a feed-forward network, each behind its norm."""

    def __init__(self, config: ModelConfig, kind: str, shards: Shards = WHOLE, recompute_mixing: bool = False):
        super().__init__()
        self.kind = kind
        self.norm = RMSNorm(config.d_model, config.norm_eps, shards)
        self.mixer = MIXERS[kind](config, shards, recompute_mixing)
        has_ffn = config.d_ff > 0
        self.ffn_norm = RMSNorm(config.d_model, config.norm_eps, shards) if has_ffn else None
        self.ffn = FeedForward(config, shards) if has_ffn else None

    def forward(self, x_TBD: Tensor, transpoint: int | float, documents: Documents) -> Tensor:
        x_TBD = x_TBD + self.mixer(self.norm(x_TBD), transpoint, documents)
        return self.feed_forward(x_TBD)

    def feed_forward(self, x_TBD: Tensor) -> Tensor:
        """The per-token half of the layer, shared with decoding."""
        if self.ffn is None or self.ffn_norm is None:
            return x_TBD
        return x_TBD + self.ffn(self.ffn_norm(x_TBD))
