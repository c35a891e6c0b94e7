"""The mixer of the Transformer baseline: Llama's attention."""
# B batch, T tokens, D model width, H heads, N head width.

import math

from torch import Tensor, nn

from transmamba.config import ModelConfig
from transmamba.kernels.attention import prefix_attention
from transmamba.kernels.documents import Documents
from transmamba.kernels.rope import rope


class AttentionMixer(nn.Module):
    """Causal multi-head attention with rotary positions; no convolution, gate or norm (Llama)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.n_heads = config.n_heads
        self.width = config.head_dim or config.d_model // config.n_heads
        self.rope_theta = config.rope_theta if config.rope != "none" else None
        self.qkv = nn.Linear(config.d_model, self.n_heads * 3 * self.width, bias=False)
        self.out = nn.Linear(self.n_heads * self.width, config.d_model, bias=False)

    def forward(self, x_TBD: Tensor, transpoint: int | float, documents: Documents) -> Tensor:
        """Attend inside every document; `transpoint` is inf for this kind of layer."""
        y_BTHN = prefix_attention(*self.heads(x_TBD), documents, math.inf, rope_theta=self.rope_theta)
        return self.out(y_BTHN.transpose(0, 1).flatten(-2))

    def heads(self, x_TBD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, batch first, not rotated."""
        qkv_BTHE = self.qkv(x_TBD).transpose(0, 1).unflatten(-1, (self.n_heads, 3 * self.width))
        q_BTHN, k_BTHN, v_BTHN = qkv_BTHE.chunk(3, dim=-1)
        return q_BTHN, k_BTHN, v_BTHN

    def rotated_heads(self, x_TBD: Tensor, pos_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same with queries and keys rotated to their positions, as the decoding cache keeps them."""
        q_BTHN, k_BTHN, v_BTHN = self.heads(x_TBD)
        if self.rope_theta is not None:
            q_BTHN, k_BTHN = rope(q_BTHN, pos_BT, self.rope_theta), rope(k_BTHN, pos_BT, self.rope_theta)
        return q_BTHN, k_BTHN, v_BTHN
