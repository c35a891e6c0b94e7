"""The TransMamba mixer: one set of projections, two readings, one way out."""
# B batch, T tokens, D model width, H heads, N key/state width, V value width, C conv channels, K conv taps.

from torch import Tensor, nn

from transmamba.config import ModelConfig
from transmamba.kernels.documents import Documents
from transmamba.kernels.gated_norm import gated_rms_norm
from transmamba.model.mixing import HeadWeights, MixOptions, TokenStreams, mix_tokens
from transmamba.model.norm import Conv, HeadNorm, PerHead


class TransMambaMixer(nn.Module):
    """Attention before the TransPoint, a state-space scan from it on, one set of weights.

    The projections are shared: Q is C, K is B, V is x; only the reading changes. The gate z acts on scanned tokens
    alone (paper A.4.2); the norm is per head, so its statistics do not depend on how many heads a rank holds.
    Weight rows are grouped by head, so a shard of heads is a contiguous slice.

    Source: TransMamba, arXiv 2503.24067, section 2.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        heads = config.n_heads
        width = config.head_dim or config.d_model // heads
        self.n_heads, self.eps = heads, config.norm_eps
        self.options = MixOptions(width, config.conv_activation, config.rope, config.rope_theta)
        self.qkv = nn.Linear(config.d_model, heads * 3 * width, bias=False)
        self.z = nn.Linear(config.d_model, heads * width, bias=False)
        self.dt = nn.Linear(config.d_model, heads, bias=False)
        self.conv = Conv(heads * 3 * width, config.conv_width)
        self.A_log = PerHead(heads)
        self.dt_bias = PerHead(heads)
        self.D = PerHead(heads) if config.d_skip else None
        self.mixer_norm = HeadNorm(heads, width) if config.mixer_norm == "head" else None
        self.out = nn.Linear(heads * width, config.d_model, bias=False)

    def forward(self, x_TBD: Tensor, transpoint: int | float, documents: Documents) -> Tensor:
        """Mix a window of tokens; sequence first, because sequence parallelism shards dimension 0."""
        tokens = self.project(x_TBD)
        y_BTHV = mix_tokens(tokens, self.per_head(), transpoint, documents, self.options)
        return self.finish(y_BTHV.transpose(0, 1), x_TBD, (documents.pos_BT >= transpoint).T)

    def project(self, x_TBD: Tensor) -> TokenStreams:
        """The streams that tokens exchange, batch first."""
        return TokenStreams(self.qkv(x_TBD).transpose(0, 1), self.dt(x_TBD).transpose(0, 1))

    def per_head(self) -> HeadWeights:
        """The weights that go with the heads wherever these are sent."""
        return HeadWeights(
            self.conv.weight,
            self.conv.bias,
            self.A_log(),
            self.dt_bias(),
            None if self.D is None else self.D(),
        )

    def finish(self, y_TBHV: Tensor, x_TBD: Tensor, is_scanned_TB: Tensor) -> Tensor:
        """Gate the scanned tokens, normalise every head and project back: work per token."""
        z_TBHV = self.z(x_TBD).unflatten(-1, (self.n_heads, -1))
        if self.mixer_norm is None:
            gated = y_TBHV * nn.functional.silu(z_TBHV)
            y_TBHV = gated.where(is_scanned_TB[..., None, None], y_TBHV)
        else:
            y_TBHV = gated_rms_norm(y_TBHV, self.mixer_norm.weight, z_TBHV, gate_BT=is_scanned_TB, eps=self.eps)
        return self.out(y_TBHV.flatten(-2))
