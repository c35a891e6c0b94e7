"""What the time model needs to know of a model and its layout: sizes without names. Imports no torch.

A published Transformer and a layer of ours at its TransPoint become the same `Layer`, so both go through the
same formulas.
"""

from dataclasses import dataclass
from typing import Literal

Kernels = Literal["fused", "eager"]
AttentionKernel = Literal["cudnn", "flash2", "triton"]
Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer, on all ranks together; per token unless it says otherwise.

    `columns` and `rows` are (inputs, outputs) of its matrices whose outputs, or inputs, tensor parallelism cuts.
    """

    columns: tuple[tuple[int, int], ...]
    rows: tuple[tuple[int, int], ...]
    attention_channels: int
    """Heads times head width."""
    head_dim: int
    keys: float
    """Mean number of keys that a token reads; 0 without attention."""
    window: float
    """Tokens that one call of the attention kernel sees."""
    stream_elements: tuple[float, float]
    """Numbers of the residual stream read and written by element-wise work, forward and backward."""
    inner_elements: tuple[float, float]
    """The same between the matrices, where tensor parallelism cuts it."""
    kernel_bytes: tuple[float, float] = (0.0, 0.0)
    """Moved by scan, convolution and gated norm, forward and backward."""
    ring_channels: int = 0
    """Keys and values that context parallelism passes around a ring."""
    exchange_channels: int = 0
    """Numbers that context parallelism exchanges between tokens and heads, in and out."""

    @property
    def parameters(self) -> int:
        """Of the matrices."""
        return sum(n_in * n_out for n_in, n_out in (*self.columns, *self.rows))


@dataclass(frozen=True, slots=True)
class Shape:
    """A whole model; `vocab_rows` of the embedding."""

    layers: tuple[Layer, ...]
    d_model: int
    vocab_rows: int
    tied: bool


@dataclass(frozen=True, slots=True)
class Layout:
    """How a step is spread over GPUs, and by what software.

    `zero` is 0 or 1 for gradients reduced once a step, 3 for weights gathered in every micro-batch (FSDP), 2 for
    gradients reduced in every micro-batch; `shard_group` is the number of ranks that share a copy of the state.
    """

    gpus: int
    seq_len: int
    global_batch: int
    micro_batch: int
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    zero: int = 1
    shard_group: int | None = None
    sp: bool = False
    recompute: Recompute = "none"
    reduce_bytes: int = 2
    kernels: Kernels = "fused"
    attention: AttentionKernel = "cudnn"
    overlaps: bool = True
    """Whether collectives run beside matrix products."""

    @property
    def dp(self) -> int:
        """Data-parallel degree."""
        return self.gpus // (self.tp * self.pp * self.cp)

    @property
    def n_micro(self) -> float:
        """Micro-batches per rank and step; published runs may end on a smaller one."""
        return self.global_batch / (self.dp * self.micro_batch)

    @property
    def tokens(self) -> float:
        """Of one micro-batch on one rank."""
        return self.seq_len / self.cp * self.micro_batch


def transformer_layer(
    d_model: int, n_heads: int, kv_heads: int, head_dim: int, d_ff: int, ffn_matrices: int, keys: float
) -> Layer:
    """A dense Transformer layer; `ffn_matrices` is 3 for SwiGLU and 2 for GELU or squared ReLU; 0 as
    `d_ff` leaves that network out.

    Element-wise work per token: two norms with their residual sums read and write 4 streams each way; the
    activation reads its inputs and writes one output, and the reverse; rotation reads and writes queries and keys.
    """
    query, key = n_heads * head_dim, kv_heads * head_dim
    rotated = 2.0 * (query + key)
    up, down = (((d_model, (ffn_matrices - 1) * d_ff),), ((d_ff, d_model),)) if d_ff else ((), ())
    return Layer(
        columns=((d_model, query + 2 * key), *up),
        rows=((query, d_model), *down),
        attention_channels=query,
        head_dim=head_dim,
        keys=keys,
        window=2 * keys - 1,
        stream_elements=(8.0 * d_model, 8.0 * d_model),
        inner_elements=(ffn_matrices * d_ff + rotated, (2 * ffn_matrices - 1) * d_ff + rotated),
        ring_channels=2 * key,
    )
