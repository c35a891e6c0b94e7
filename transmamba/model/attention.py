"""The mixer of the Transformer baseline: Llama's attention."""
# B batch, T tokens, D model width, H heads, N head width.

import math

from torch import Tensor, nn

from transmamba.config import ModelConfig, head_width
from transmamba.kernels.attention import prefix_attention
from transmamba.kernels.documents import Documents
from transmamba.kernels.rope import rope_qk
from transmamba.model.linear import RowLinear, column_linear
from transmamba.model.recompute import run_or_recompute
from transmamba.parallel.shards import WHOLE, Shards


class AttentionMixer(nn.Module):
    """Causal multi-head attention with rotary positions; no convolution, gate or norm (Llama)."""

    def __init__(self, config: ModelConfig, shards: Shards = WHOLE, recompute_mixing: bool = False):
        super().__init__()
        self.shards, self.recompute_mixing = shards, recompute_mixing
        heads, self.width = config.n_heads, head_width(config)
        self.rope_theta = config.rope_theta if config.rope != "none" else None
        self.qkv = column_linear(config.d_model, heads * 3 * self.width, shards)
        self.out = RowLinear(heads * self.width, config.d_model, shards)

    def forward(self, x_TBD: Tensor, transpoint: int | float, documents: Documents) -> Tensor:
        """Attend inside every document; `transpoint` is inf for this kind of layer."""
        y_BTHN = run_or_recompute(
            self.recompute_mixing, self.attend, *self.heads(self.shards.gather_tokens(x_TBD)), documents
        )
        return self.out(self.shards.heads_to_tokens(y_BTHN.transpose(0, 1).flatten(-2)))

    def attend(self, q_BTHN: Tensor, k_BTHN: Tensor, v_BTHN: Tensor, documents: Documents) -> Tensor:
        """Rotate and attend."""
        return prefix_attention(q_BTHN, k_BTHN, v_BTHN, documents, math.inf, rope_theta=self.rope_theta)

    def heads(self, x_TBD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, batch first, not rotated."""
        (qkv_TBC,) = self.shards.tokens_to_heads(self.qkv(x_TBD))
        qkv_BTHE = qkv_TBC.transpose(0, 1).unflatten(-1, (-1, 3 * self.width))
        q_BTHN, k_BTHN, v_BTHN = qkv_BTHE.chunk(3, dim=-1)
        return q_BTHN, k_BTHN, v_BTHN

    def rotated_heads(self, x_TBD: Tensor, pos_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same with queries and keys rotated to their positions, as the decoding cache keeps them."""
        q_BTHN, k_BTHN, v_BTHN = self.heads(x_TBD)
        if self.rope_theta is not None:
            q_BTHN, k_BTHN = rope_qk(q_BTHN, k_BTHN, pos_BT, self.rope_theta)
        return q_BTHN, k_BTHN, v_BTHN
