"""The TransMamba mixer: one set of projections, two readings, one way out."""
# B batch, T tokens, D model width, H heads, N key/state width, V value width, C conv channels, K conv taps.

from torch import Tensor, nn

from transmamba.config import ModelConfig, head_width
from transmamba.kernels.documents import Documents
from transmamba.kernels.gated_norm import gated_rms_norm
from transmamba.model.linear import RowLinear, column_linear
from transmamba.model.mixing import HeadWeights, MixOptions, TokenStreams, mix_tokens
from transmamba.model.norm import Conv, HeadNorm, PerHead
from transmamba.model.recompute import run_or_recompute
from transmamba.parallel.shards import WHOLE, Shards


class TransMambaMixer(nn.Module):
    """Attention before the TransPoint, a state-space scan from it on, one set of weights.

    The projections are shared: Q is C, K is B, V is x; only the reading changes. The gate z acts on scanned tokens
    alone (paper A.4.2); the norm is per head, so its statistics do not depend on how many heads a rank holds.
    Weight rows are grouped by head, so a shard of heads is a contiguous slice.

    Source: TransMamba, arXiv 2503.24067, section 2.
    """

    def __init__(self, config: ModelConfig, shards: Shards = WHOLE, recompute_mixing: bool = False):
        super().__init__()
        self.shards, self.recompute_mixing = shards, recompute_mixing
        heads, width = config.n_heads, head_width(config)
        self.width, self.eps = width, config.norm_eps
        self.options = MixOptions(width, config.conv_activation, config.rope, config.rope_theta)
        self.qkv = column_linear(config.d_model, heads * 3 * width, shards)
        self.z = column_linear(config.d_model, heads * width, shards)
        self.dt = column_linear(config.d_model, heads, shards)
        self.conv = Conv(heads * 3 * width, config.conv_width, shards)
        self.A_log = PerHead(heads, shards)
        self.dt_bias = PerHead(heads, shards)
        self.D = PerHead(heads, shards) if config.d_skip else None
        self.mixer_norm = HeadNorm(heads, width, shards) if config.mixer_norm == "head" else None
        self.out = RowLinear(heads * width, config.d_model, shards)

    def forward(self, x_TBD: Tensor, transpoint: int | float, documents: Documents) -> Tensor:
        """Mix a window of tokens; sequence first, because sequence parallelism shards dimension 0.

        `documents` describes the whole window; with context parallelism x_TBD holds this rank's tokens of it.
        """
        x_TBD = self.shards.gather_tokens(x_TBD)
        tokens, heads = self.project(x_TBD), self.per_head()
        y_BTHV = run_or_recompute(self.recompute_mixing, mix_tokens, tokens, heads, transpoint, documents, self.options)
        y_TBHV = self.shards.heads_to_tokens(y_BTHV.transpose(0, 1).flatten(-2)).unflatten(-1, (-1, self.width))
        return self.finish(y_TBHV, x_TBD, self.shards.own_tokens(documents.pos_BT >= transpoint).T)

    def project(self, x_TBD: Tensor) -> TokenStreams:
        """The streams that tokens exchange, batch first: this rank's heads of all tokens."""
        qkv_TBC, dt_TBH = self.shards.tokens_to_heads(self.qkv(x_TBD), self.dt(x_TBD))
        return TokenStreams(qkv_TBC.transpose(0, 1), dt_TBH.transpose(0, 1))

    def per_head(self) -> HeadWeights:
        """The weights that go with the heads wherever these are sent."""
        own = self.shards.own_heads
        return HeadWeights(
            own(self.conv.weight),
            own(self.conv.bias),
            own(self.A_log()),
            own(self.dt_bias()),
            None if self.D is None else own(self.D()),
        )

    def finish(self, y_TBHV: Tensor, x_TBD: Tensor, is_scanned_TB: Tensor) -> Tensor:
        """Gate the scanned tokens, normalise every head and project back: work per token."""
        z_TBHV = self.z(x_TBD).unflatten(-1, (-1, self.width))
        if self.mixer_norm is None:
            gated = y_TBHV * nn.functional.silu(z_TBHV)
            y_TBHV = gated.where(is_scanned_TB[..., None, None], y_TBHV)
        else:
            y_TBHV = gated_rms_norm(y_TBHV, self.mixer_norm.weight, z_TBHV, gate_BT=is_scanned_TB, eps=self.eps)
        return self.out(y_TBHV.flatten(-2))
