"""What the layers of a TransMamba model do between tokens, and what they remember of them: plain torch."""
# B batch, T tokens, H heads, N key/state width, V value width, C conv channels, K conv taps, L tokens of a chunk.

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

CHUNK = 64


class Layout(NamedTuple):
    """Where the tokens of a call stand.

    A position is the offset in the document, so position 0 starts a document, and a token's document began `pos`
    columns before it. Columns count from the first token that the cache has seen. Padding is a document for itself.
    """

    pos_BT: Tensor
    n_seen: int  # columns before this call
    is_plain: bool  # every row is one document from column 0 on
    first_start: int  # smallest and largest column in which a document starts
    last_start: int
    nearest_end: int  # smallest position in the last column

    def before(self, transpoint: int | None) -> tuple[int, int]:
        """Tokens of this call: up to the first number all attend, from the second on all are scanned."""
        n_tokens = self.pos_BT.shape[1]
        if transpoint is None:
            return n_tokens, n_tokens
        first, last = (start + transpoint - self.n_seen for start in (self.first_start, self.last_start))
        return min(max(first, 0), n_tokens), min(max(last, 0), n_tokens)


def make_layout(ids_BT: Tensor, n_seen: int, mask_BT: Tensor | None, position_ids: Tensor | None) -> Layout:
    """Read positions off an attention mask (0 is padding) and position ids (0 starts a document).

    Raises:
        ValueError: the mask has not one entry for every token so far, or padding between tokens.
    """
    n_rows, n_tokens = ids_BT.shape[:2]
    column_T = torch.arange(n_seen, n_seen + n_tokens, device=ids_BT.device)
    if mask_BT is None and position_ids is None:
        return Layout(column_T.expand(n_rows, -1), n_seen, True, 0, 0, n_seen + n_tokens - 1)
    pos_BT = column_T if position_ids is None else position_ids
    n_gaps = torch.zeros((), dtype=torch.int64)
    if mask_BT is not None:
        if mask_BT.shape != (n_rows, n_seen + n_tokens):
            raise ValueError(f"attention_mask {tuple(mask_BT.shape)} is not [{n_rows}, {n_seen + n_tokens}]")
        real_BT = mask_BT.bool()
        n_gaps = (real_BT[:, 1:] != real_BT[:, :-1]).sum(1).max()
        if position_ids is None:
            pos_BT = (real_BT.cumsum(1) - 1)[:, n_seen:]
        pos_BT = pos_BT.expand(n_rows, -1).where(real_BT[:, n_seen:], 0)
    pos_BT = pos_BT.expand(n_rows, n_tokens)
    start_BT = column_T - pos_BT
    facts = (n_gaps.to(pos_BT.device), start_BT.min(), start_BT.max(), pos_BT[:, -1].min(), (start_BT == 0).all())
    n, first, last, nearest, is_plain = torch.stack(facts).tolist()
    if n > 1:
        raise ValueError("attention_mask has padding between tokens: pad on the left (or, without a cache, the right)")
    return Layout(pos_BT, n_seen, bool(is_plain), first, last, nearest)


class LayerMemory(CacheLayerMixin):
    """What one layer remembers: the rows before its convolution, its scan's state, and keys and values before P."""

    supports_early_init = False
    keys: Tensor | None
    values: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.tail_BKC: Tensor | None = None
        self.state_BHNV: Tensor | None = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows of the beams that go on."""
        for name in ("tail_BKC", "state_BHNV", "keys", "values"):
            held = getattr(self, name)
            if held is not None:
                setattr(self, name, held.index_select(0, beam_idx.to(held.device)))

    def reset(self) -> None:
        """Forget everything."""
        self.tail_BKC = self.state_BHNV = self.keys = self.values = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, H, T, N]; returns all that are kept."""
        if self.keys is not None and self.values is not None:
            key_states = torch.cat([self.keys, key_states], dim=2)
            value_states = torch.cat([self.values, value_states], dim=2)
        self.keys, self.values = key_states, value_states
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens whose keys are kept."""
        return 0 if self.keys is None else self.keys.shape[2]

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is made before it is known."""


class TransMambaCache(Cache):
    """Memory of all layers. It cannot be cropped, as a state cannot forget its last token."""

    def __init__(self, n_layers: int):
        super().__init__(layers=[LayerMemory() for _ in range(n_layers)])
        self.n_seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far, whatever is kept of them."""
        return self.n_seen

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.n_seen = 0


def rope(x_BTHN: Tensor, pos_BT: Tensor, theta: float) -> Tensor:
    """Rotate pairs (i, i + N/2) by pos * theta ** (-2i / N), in float32 or better."""
    n_pairs = x_BTHN.shape[-1] // 2
    work = torch.promote_types(x_BTHN.dtype, torch.float32)
    index = torch.arange(n_pairs, device=x_BTHN.device, dtype=torch.float64)
    angle = pos_BT.to(work)[..., None, None] * (theta ** (-index / n_pairs)).to(work)
    cos, sin = angle.cos(), angle.sin()
    first, second = x_BTHN.to(work).split(n_pairs, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BTHN.dtype)


def causal_conv(x_BTC: Tensor, weight_CK: Tensor, bias_C: Tensor, layout: Layout, memory: LayerMemory | None) -> Tensor:
    """y_t = bias + sum over k of weight_k x_{t - (K - 1) + k}, of the token's own document only."""
    n_taps, n_tokens = weight_CK.shape[1], x_BTC.shape[1]
    tail_BKC = None if memory is None else memory.tail_BKC
    if tail_BKC is None:
        tail_BKC = x_BTC.new_zeros(x_BTC.shape[0], n_taps - 1, x_BTC.shape[2])
    padded = torch.cat([tail_BKC, x_BTC], dim=1)
    if memory is not None:
        memory.tail_BKC = padded[:, n_tokens:].clone()
    y_BTC = bias_C.to(x_BTC.dtype).expand_as(x_BTC)
    for back in range(n_taps):
        tap = padded[:, n_taps - 1 - back :][:, :n_tokens] * weight_CK[:, n_taps - 1 - back]
        y_BTC = y_BTC + tap.where((layout.pos_BT >= back)[..., None], 0)
    return y_BTC


def attend(
    q_BTHN: Tensor, k_BTHN: Tensor, v_BTHV: Tensor, layout: Layout, memory: LayerMemory | None, transpoint: int | None
) -> Tensor:
    """Causal attention, inside documents, of the tokens before the TransPoint; what the others get has no meaning.

    Keys and values are remembered while a row may still attend, and dropped when all rows are past P.
    """
    q, k, v = (stream.transpose(1, 2) for stream in (q_BTHN, k_BTHN, v_BTHV))
    n_tokens, n_end = q.shape[2], layout.before(transpoint)[1]
    if memory is not None and n_end > 0:
        k, v = memory.update(k, v)
    if memory is not None and transpoint is not None and layout.nearest_end + 1 >= transpoint:
        memory.keys = memory.values = None
    n_after = n_tokens - n_end
    q, k, v = q[:, :, :n_end], k[:, :, : k.shape[2] - n_after], v[:, :, : v.shape[2] - n_after]
    if n_end == 0:
        y = v.new_zeros(*v.shape[:2], 0, v.shape[3])
    elif layout.is_plain and k.shape[2] == n_end:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    elif layout.is_plain and n_end == 1:
        y = F.scaled_dot_product_attention(q, k, v)
    else:
        column_Q = torch.arange(layout.n_seen, layout.n_seen + n_end, device=q.device)
        column_K = torch.arange(layout.n_seen + n_end - k.shape[2], layout.n_seen + n_end, device=q.device)
        start_BQ1 = (column_Q - layout.pos_BT[:, :n_end])[..., None]
        seen_BQK = (column_K >= start_BQ1) & (column_K <= column_Q[:, None])
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen_BQK[:, None])
    return F.pad(y.transpose(1, 2), (0, 0, 0, 0, 0, n_after))


def scan(
    c_BTHN: Tensor,
    b_BTHN: Tensor,
    x_BTHV: Tensor,
    dt_BTH: Tensor,
    A_H: Tensor,
    D_H: Tensor | None,
    layout: Layout,
    memory: LayerMemory | None,
    transpoint: int | None = 0,
) -> Tensor:
    """Mamba-2's scan (arXiv 2405.21060): h = exp(dt A) h + dt b x, y = c h + D x, h new at every document.

    Outputs before the TransPoint have no meaning: there only the state is built. All in float32 or better.
    """
    n_first, n_tokens = layout.before(transpoint)[0], x_BTHV.shape[1]
    if n_first == n_tokens and (memory is None or transpoint is None):
        return torch.zeros_like(x_BTHV)
    work = dt_BTH.dtype
    document_BT = (layout.pos_BT == 0).cumsum(1)
    before_B = torch.zeros_like(document_BT[:, 0])
    state_BHNV = None if memory is None else memory.state_BHNV
    if state_BHNV is None:
        state_BHNV = x_BTHV.new_zeros(*x_BTHV.shape[::2], b_BTHN.shape[-1], x_BTHV.shape[-1], dtype=work)
    parts = []
    for begin in range(0, n_tokens, CHUNK):
        span = slice(begin, begin + CHUNK)
        b, x, dt, document_BL = (
            b_BTHN[:, span].to(work),
            x_BTHV[:, span].to(work),
            dt_BTH[:, span],
            document_BT[:, span],
        )
        decay_BLH = (dt * A_H).cumsum(1)
        u = x * dt[..., None]
        if begin + x.shape[1] > n_first:
            c, stay_BL1 = c_BTHN[:, span].to(work), (document_BL == before_B[:, None])[..., None]
            y = torch.einsum("blhn,bhnv->blhv", c * (decay_BLH.exp() * stay_BL1)[..., None], state_BHNV)
            y = y + torch.einsum("blsh,bshv->blhv", _pairs(c, b, decay_BLH, document_BL), u)
            parts.append(y if D_H is None else y + x * D_H[:, None])
        else:
            parts.append(torch.zeros_like(x))
        last_B = document_BL[:, -1]
        kept_BLH = (decay_BLH[:, -1:] - decay_BLH).exp() * (document_BL == last_B[:, None])[..., None]
        carry_BH = decay_BLH[:, -1].exp() * (last_B == before_B)[:, None]
        added_BHNV = torch.einsum("blhn,blhv->bhnv", b * kept_BLH[..., None], u)
        state_BHNV, before_B = state_BHNV * carry_BH[..., None, None] + added_BHNV, last_B
    if memory is not None:
        memory.state_BHNV = state_BHNV
    return torch.cat(parts, dim=1).to(x_BTHV.dtype)


def _pairs(c_BLHN: Tensor, b_BLHN: Tensor, decay_BLH: Tensor, document_BL: Tensor) -> Tensor:
    """What token l of a chunk takes from token s: c_l b_s through the decay between them; [B, L, S, H]."""
    n = c_BLHN.shape[1]
    causal = torch.ones(n, n, dtype=torch.bool, device=c_BLHN.device).tril()
    together = causal & (document_BL[:, :, None] == document_BL[:, None])
    between = (decay_BLH[:, :, None] - decay_BLH[:, None]).masked_fill(~together[..., None], -math.inf)
    return torch.einsum("blhn,bshn->blsh", c_BLHN, b_BLHN) * between.exp()


def gated_norm(
    y_BTHV: Tensor, weight_HV: Tensor | None, gate_BTHV: Tensor, gated_BT: Tensor | None, eps: float
) -> Tensor:
    """y * silu(gate) on gated tokens, then RMS norm of every head (without a weight, none), in float32 or better."""
    work = torch.promote_types(y_BTHV.dtype, torch.float32)
    gate_BTHV = F.silu(gate_BTHV.to(work))
    if gated_BT is not None:
        gate_BTHV = gate_BTHV.where(gated_BT[..., None, None], 1)
    u_BTHV = y_BTHV.to(work) * gate_BTHV
    if weight_HV is not None:
        u_BTHV = u_BTHV * torch.rsqrt(u_BTHV.square().mean(-1, keepdim=True) + eps) * weight_HV.to(work)
    return u_BTHV.to(y_BTHV.dtype)
