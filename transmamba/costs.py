"""Parameters and FLOPs of a layer at its TransPoint, by closed formulas. Imports no torch.

Convention of the FLOPs: two per multiply-add, attention counts the causal half only, the scan counts dense
chunks of 64 tokens, norms and activations are left out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transmamba.config import ModelConfig, head_width
from transmamba.transpoint import LayerKind

FLOP_CONVENTION = "2 per multiply-add; causal half of attention; scan in dense chunks of 64; training = 3 x forward"
CHUNK = 64
BUILT_IN_VOCAB = 2048
TRAINING_OVER_FORWARD = 3


@dataclass(frozen=True, slots=True)
class PositionShares:
    """How the tokens of a window spread over their offsets within documents.

    `survival[p]` is the share of tokens whose offset in their document is p or more, for p = 0 .. seq_len.
    """

    survival: tuple[float, ...]

    def past(self, point: int | float) -> float:
        """Share of tokens at offset `point` or later."""
        return self.survival[int(point)] if point < len(self.survival) else 0.0

    def attended(self, point: int | float) -> float:
        """Mean number of keys a token reads in attention: sum over p < point of (p + 1) Pr(offset = p)."""
        stop = min(point, len(self.survival) - 1)
        shares = self.survival
        return math.fsum((p + 1) * (shares[p] - shares[p + 1]) for p in range(int(stop)))


def whole_windows(seq_len: int) -> PositionShares:
    """Every window is one document."""
    return PositionShares(tuple((seq_len - p) / seq_len for p in range(seq_len + 1)))


def packed_documents(lengths: Sequence[tuple[float, float]], seq_len: int) -> PositionShares:
    """Documents end to end, cut by windows of `seq_len` at a uniformly distributed phase.

    A token is at offset p or later when the document has p tokens before it and the window does too; at a
    uniform phase these are independent: F(p) (1 - p / seq_len).

    Args:
        lengths: (length, number of documents of this length); lengths may be means of a histogram's bins.
        seq_len: tokens per window.
    """
    tokens = math.fsum(length * n for length, n in lengths)
    ordered = sorted(lengths)
    survival, n_longer, tokens_longer, first = [], math.fsum(n for _, n in lengths), tokens, 0
    for p in range(seq_len + 1):
        while first < len(ordered) and ordered[first][0] <= p:
            tokens_longer -= ordered[first][0] * ordered[first][1]
            n_longer -= ordered[first][1]
            first += 1
        share = max(0.0, (tokens_longer - p * n_longer) / tokens)
        survival.append(share * (1 - p / seq_len) if first < len(ordered) else 0.0)
    return PositionShares(tuple(survival))


def mixer_parameters(model: ModelConfig, kind: LayerKind) -> int:
    """Trained numbers of a layer's mixer with its input norm."""
    d, h, n = model.d_model, model.n_heads, head_width(model)
    if kind == "transformer":
        return d + 4 * d * h * n
    if kind == "mamba2":
        inner, heads, conv = mamba2_widths(model)
        projections = d * (inner + conv + heads) + inner * d
        return d + projections + conv * (model.conv_width + 1) + 3 * heads + inner
    projections = 5 * d * h * n + d * h
    conv = 3 * h * n * (model.conv_width + 1)
    return d + projections + conv + (2 + model.d_skip) * h + (h * n if model.mixer_norm == "head" else 0)


def layer_parameters(model: ModelConfig, kind: LayerKind) -> int:
    """Trained numbers of one layer: mixer, feed-forward network and their norms."""
    ffn = model.d_model * (3 * model.d_ff + 1) if model.d_ff else 0
    return mixer_parameters(model, kind) + ffn


def embedding_parameters(model: ModelConfig, vocab_rows: int) -> int:
    """Trained numbers of the input embedding and, when it is not tied, the output projection."""
    return vocab_rows * model.d_model * (1 if model.tied else 2)


def mamba2_widths(model: ModelConfig) -> tuple[int, int, int]:
    """Inner width, heads and convolved channels of a mamba2 layer."""
    inner = model.ssm_expand * model.d_model
    return inner, inner // model.ssm_head_dim, inner + 2 * model.ssm_groups * model.ssm_state


def layer_flops(model: ModelConfig, kind: LayerKind, point: int | float, shares: PositionShares) -> float:
    """Forward FLOPs of one layer per token, averaged over the tokens of a window."""
    d = model.d_model
    ffn = 6 * d * model.d_ff
    if kind == "mamba2":
        inner, heads, conv = mamba2_widths(model)
        projections = 2 * d * (inner + conv + heads) + 2 * inner * d + 2 * model.conv_width * conv
        return ffn + projections + _scan_flops(heads, model.ssm_groups, model.ssm_state, model.ssm_head_dim)
    h, n = model.n_heads, head_width(model)
    attention = 4 * h * n * shares.attended(point)
    if kind == "transformer":
        return ffn + 8 * d * h * n + attention
    past = shares.past(point)
    projections = 10 * d * h * n + 2 * d * h + 2 * model.conv_width * 3 * h * n
    converter = 2 * h * n * n * (1 - past) if past > 0 else 0.0
    return ffn + projections + attention + converter + past * _scan_flops(h, h, n, n)


def logit_flops(model: ModelConfig, vocab_rows: int) -> int:
    """Forward FLOPs of the output projection per token."""
    return 2 * model.d_model * vocab_rows


def _scan_flops(heads: int, groups: int, key_width: int, value_width: int) -> float:
    """Scores of a chunk once per group, which its heads share; the rest by head."""
    return 2 * CHUNK * (groups * key_width + heads * value_width) + 4 * heads * key_width * value_width
