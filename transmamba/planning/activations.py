"""Bytes that a rank keeps from the forward of a micro-batch for its backward, by closed formulas. Imports no torch.

What counts is what autograd saves, every storage once, weights excluded; rows are whole windows (`document_mask` of
packed documents copies the attended tokens once more, padded to powers of two, which is not counted).

Symbols: B windows, T tokens of a window, t = T B / cp tokens here, o = t tokens outside mixers and feed-forward
networks (t / tp with sequence parallelism), D model width, F feed-forward width, e bytes per value (4 or 2),
P = min(point, T). Of one rank: H heads of width N per token, h = H / cp of all T B tokens, so t H = T B h.

operation        saved                                  bytes                            where
norm             input                                  o D e                            cpu: o D 4
                 one over the root mean square          o 4
                 normalised input, unscaled             o D 4                            cpu only
                 output, which the projections read     t D e
projections      q, k, v (transmamba, transformer)      t 3HN e
                 x, B, C (mamba2)                       T B C_h e
                 dt                                     t H e                            triton; with cp of any backend
convolution      output                                 as its input, q, k, v or x, B, C
rope             cosines and sines, of q and of k       4 P B (N / 2) 4                  cpu: whole on every rank
                 positions                              P 8                              triton; B T 8 for all layers
                 rotated q and k                        2 P B h N e
attention        output                                 P B h N e                        see `_attention`
                 log of the sum of exponentials         P B h 4
scan, triton     state that enters every 64 tokens      B h ceil(T / 64) N V e           V padded to 16 bytes
scan, cpu        time steps and what they are made of   2 T B h 4
                 sources of a chunk of L tokens         B h (N + L) V 4 a chunk
                 weights of a chunk with outputs        B h L (N + L) 4 a chunk
scan             x of several groups of B and C         T B I_h e                        mamba2
mixer's norm     y, z                                   2 t H V e
                 scale, which tokens are gated          t H 4, T B                       mamba2: t G 4, nothing
output           its input                              t H V e
feed-forward     gate, up; silu(gate); their product    4 t F e
per head         decay rates, skip, bias of dt          a few h 4

With recomputation the forward keeps only what a recomputed part reads, and its result where another operation reads it;
while a part is repeated, what it saves is there too, for one layer at a time: `layer_saved_bytes(recompute="none")`.
"""

import math
from dataclasses import dataclass
from typing import Literal

from transmamba.config import ModelConfig, head_width
from transmamba.costs import mamba2_widths
from transmamba.transpoint import LayerKind

Backend = Literal["triton", "cpu"]
Recompute = Literal["none", "selective", "full"]
_FLOAT32, _INT64 = 4, 8
# Of kernels/ssd: tokens per chunk on a GPU, and on a CPU of chunks that only build state, and with outputs.
_TRITON_CHUNK, _STATE_CHUNK, _NARROW_CHUNK, _WIDE_CHUNK = 64, 256, 32, 64
_NARROW_WIDTH, _WIDEST_TRITON_STATE = 32, 256
# Of kernels/cross_entropy: so many logits at most stay for the backward of the CPU's path, and round widths.
_KEPT_LOGITS, _ROUND = 1 << 24, 64
_N_CHUNKS, _NARROWEST = 8, 512


@dataclass(frozen=True, slots=True)
class _Rank:
    """Sizes of a micro-batch on one rank, in the letters of the table above."""

    B: int
    T: int
    e: int
    tp: int
    cp: int
    sp: bool
    backend: Backend

    @property
    def t(self) -> int:
        """Tokens of mixers and feed-forward networks."""
        return self.B * self.T // self.cp

    @property
    def o(self) -> int:
        """Tokens outside them."""
        return self.t // self.tp if self.sp else self.t


@dataclass(frozen=True, slots=True)
class _Scan:
    """A scan on one rank: heads, width of keys and of values, groups that share keys, D and bias or not."""

    heads: int
    n_keys: int
    n_values: int
    groups: int
    has_skip: bool


def layer_saved_bytes(
    model: ModelConfig,
    kind: LayerKind,
    point: int | float,
    *,
    seq_len: int,
    micro_batch: int,
    bytes_per_value: Literal[2, 4],
    tp: int = 1,
    cp: int = 1,
    sp: bool = False,
    recompute: Recompute = "none",
    backend: Backend = "triton",
) -> dict[str, int]:
    """Bytes by name of what one layer keeps of one micro-batch on one rank, as the table of this module has it.

    Args:
        point: TransPoint in tokens, 0 to inf; transformer and mamba2 layers have one reading whatever it is.
        seq_len, micro_batch: T and B; tp, cp and their product with sp divide what they cut (`validate`).
        recompute: "selective" repeats the mixing of tokens, "full" the whole layer.
        backend: "triton" is what CUDA tensors meet.
    """
    rank = _Rank(micro_batch, seq_len, bytes_per_value, tp, cp, sp, backend)
    d, e = model.d_model, rank.e
    if recompute == "full":
        return {"layer input": rank.o * d * e}
    mixers = {"transmamba": _transmamba, "transformer": _transformer, "mamba2": _mamba2}
    found = _norm("input norm", d, rank) | mixers[kind](model, point, rank, recompute == "selective")
    if model.d_ff:
        width = rank.t * model.d_ff // tp * e
        found |= _norm("ffn norm", d, rank)
        found |= {"ffn gate and up": 2 * width, "ffn activated gate": width, "ffn product": width}
    return {name: size for name, size in found.items() if size}


def head_saved_bytes(
    model: ModelConfig,
    n_vocab_rows: int,
    *,
    seq_len: int,
    micro_batch: int,
    bytes_per_value: Literal[2, 4],
    tp: int = 1,
    cp: int = 1,
    sp: bool = False,
    backend: Backend = "triton",
) -> dict[str, int]:
    """Bytes by name of what the final norm and the loss keep of one micro-batch on a rank of the last stage.

    Args:
        n_vocab_rows: rows of the embedding, on all tp ranks.

    Logits are computed again on a GPU; on a CPU the exponentials of a small vocabulary stay.
    """
    rank = _Rank(micro_batch, seq_len, bytes_per_value, tp, cp, sp, backend)
    columns = n_vocab_rows // tp
    found = _norm("final norm", model.d_model, rank)
    found |= {
        "targets": rank.t * _INT64,
        "largest logit, share of the sum": 2 * rank.t * _FLOAT32,
        "weights of tokens": rank.t * _FLOAT32,
    }
    if backend == "cpu" and rank.t * columns <= _KEPT_LOGITS:
        found["exponentials of the logits"] = rank.t * _round_up(columns, _ROUND) * _FLOAT32
    return {name: size for name, size in found.items() if size}


def head_working_bytes(
    model: ModelConfig,
    n_vocab_rows: int,
    *,
    seq_len: int,
    micro_batch: int,
    bytes_per_value: Literal[2, 4],
    tp: int = 1,
    cp: int = 1,
) -> dict[str, int]:
    """Bytes by name that the loss needs while it runs, beside what is saved: one chunk of logits, two gradients."""
    n_tokens, columns = micro_batch * seq_len // cp, n_vocab_rows // tp
    width = columns
    if n_tokens * columns > _KEPT_LOGITS:
        widest = max(columns // _N_CHUNKS // _ROUND * _ROUND, _NARROWEST)
        width = _round_up(-(-columns // -(-columns // widest)), _ROUND)
    return {
        "logits of a chunk": n_tokens * _round_up(width, _ROUND) * bytes_per_value,
        "gradient of the hidden states": n_tokens * model.d_model * _FLOAT32,
        "gradient of the output weight": columns * model.d_model * bytes_per_value,
    }


def in_flight(pp: int, vpp: int, n_micro: int, pipeline_rank: int) -> float:
    """How many micro-batches' worth of its activations a pipeline rank holds at the peak.

    1F1B (vpp = 1): the forwards before the first backward, pp - rank. Interleaved: (vpp - 1) pp + 2 (pp - rank - 1)
    chunks before the first backward and the one that it goes back through, each 1 / vpp of the rank's layers; chunks
    of unequal layers make this a mean. Source: arXiv 2104.04473, section 2.2, in the order of megatron-core.

    Raises:
        ValueError: no such stage, or a size below 1.
    """
    if min(pp, vpp, n_micro) < 1 or not 0 <= pipeline_rank < pp:
        raise ValueError(f"pp={pp}, vpp={vpp}, {n_micro} micro-batches, pipeline rank {pipeline_rank}")
    if vpp == 1:
        return float(min(n_micro, pp - pipeline_rank))
    ahead = (vpp - 1) * pp + 2 * (pp - pipeline_rank - 1)
    return min(n_micro * vpp, ahead + 1) / vpp


def _transmamba(model: ModelConfig, point: int | float, rank: _Rank, again: bool) -> dict[str, int]:
    heads, width, e = model.n_heads // rank.tp, head_width(model), rank.e
    stream = rank.t * heads * width * e
    n_attended = math.ceil(min(point, rank.T))
    scan = _Scan(heads // rank.cp, width, width, heads // rank.cp, model.d_skip)
    # Context parallelism sends dt in one message with q, k and v, and keeps it as long.
    is_sent = rank.cp > 1
    keeps_dt = is_sent or again or (rank.backend == "triton" and n_attended < rank.T)
    found = {"q, k, v": 3 * stream, "dt": rank.t * heads * e * keeps_dt}
    if again:
        found["per head"] = (2 + model.d_skip) * heads * _FLOAT32
    else:
        found["convolved q, k, v"] = 3 * stream
        rotates = {"attention": n_attended, "both": rank.T, "none": 0}[model.rope]
        found |= _rotation(rotates, scan.heads, width, rank)
        found |= _attention(n_attended, scan.heads, width, rank)
        found |= _scan(n_attended, scan, rank)
    found |= {"mixed tokens": stream, "gate": stream, "gated tokens": rank.B * rank.T}
    if model.mixer_norm == "head":
        found["mixer norm scale"] = rank.t * heads * _FLOAT32
    else:
        found["activated gate"] = stream
    return found | {"mixer output": stream}


def _transformer(model: ModelConfig, point: int | float, rank: _Rank, again: bool) -> dict[str, int]:
    heads, width = model.n_heads // rank.tp, head_width(model)
    stream = rank.t * heads * width * rank.e
    found = {"q, k, v": 3 * stream, "mixer output": stream}
    if not again:
        found |= _rotation(rank.T if model.rope != "none" else 0, heads // rank.cp, width, rank)
        found |= _attention(rank.T, heads // rank.cp, width, rank)
        # Attention writes in the order of q, which rope makes rows first; the projection reads tokens first.
        if rank.cp == 1 and (rank.B == 1 or model.rope == "none"):
            found["attention output"] = 0  # the projection's input itself
    return found


def _mamba2(model: ModelConfig, point: int | float, rank: _Rank, again: bool) -> dict[str, int]:
    inner, heads, _ = mamba2_widths(model)
    inner, heads, groups = inner // rank.tp, heads // rank.tp, model.ssm_groups // rank.tp
    # Ranks that share a group have a copy of its B and C each.
    copies = rank.cp // math.gcd(groups, rank.cp)
    n_tokens, n_groups = rank.B * rank.T, groups * copies // rank.cp
    convolved = n_tokens * (inner // rank.cp + 2 * n_groups * model.ssm_state) * rank.e
    scan = _Scan(heads // rank.cp, model.ssm_state, model.ssm_head_dim, n_groups, True)
    stream = rank.t * inner * rank.e
    keeps_dt = rank.cp > 1 or again or rank.backend == "triton"
    found = {"x, B, C": convolved, "dt": rank.t * heads * rank.e * keeps_dt}
    if not again:
        found["convolved x, B, C"] = convolved
        channels = inner + 2 * groups * copies * model.ssm_state
        found["copied taps"] = channels * (model.conv_width + 1) * rank.e * (copies > 1)
        found |= _scan(0, scan, rank)
    norm = rank.t * groups * _FLOAT32
    return found | {"mixed tokens": stream, "gate": stream, "mixer norm scale": norm, "mixer output": stream}


def _norm(name: str, width: int, rank: _Rank) -> dict[str, int]:
    """On a CPU torch's norm is made of operations that keep a float32 copy and the product of two of them."""
    is_cpu = rank.backend == "cpu"
    return {
        f"{name} input": rank.o * width * (_FLOAT32 if is_cpu else rank.e),
        f"{name} scale": rank.o * _FLOAT32,
        f"{name} unscaled": rank.o * width * _FLOAT32 * is_cpu,
        f"{name} output": rank.t * width * rank.e,
    }


def _rotation(n_tokens: int, heads: int, width: int, rank: _Rank) -> dict[str, int]:
    is_fused = rank.backend == "triton"
    return {
        "rope angles": 0 if is_fused else 4 * n_tokens * rank.B * (width // 2) * _FLOAT32,
        "rope positions": 8 * n_tokens * is_fused,
        "rotated q, k": 2 * n_tokens * rank.B * heads * width * rank.e,
    }


def _attention(n_tokens: int, heads: int, width: int, rank: _Rank) -> dict[str, int]:
    """The output is in the order [B, P, heads]; what reads it, in another, has a copy that counts there."""
    n_rows = n_tokens * rank.B * heads
    return {"attention output": n_rows * width * rank.e, "attention log-sums": n_rows * _FLOAT32}


def _scan(n_before: int, scan: _Scan, rank: _Rank) -> dict[str, int]:
    """A scan whose first `n_before` tokens only build state; of no token with an output it is left out."""
    per_head = (2 + scan.has_skip) * scan.heads * _FLOAT32
    if n_before == rank.T:
        return {"per head": per_head}
    n_lines, n_tokens = rank.B * scan.heads, rank.B * rank.T
    # x is a view of the convolved stream unless the heads of several groups have to be brought together.
    is_copied = scan.heads != scan.groups > 1
    found = {"x by heads": n_tokens * scan.heads * scan.n_values * rank.e * is_copied}
    if rank.backend == "triton" and scan.n_keys <= _WIDEST_TRITON_STATE:
        state = scan.n_keys * _round_up(scan.n_values * rank.e, 16)
        chunks = -(-rank.T // _TRITON_CHUNK)
        return found | {"chunk states": n_lines * chunks * state, "per head": per_head + scan.heads * _FLOAT32}
    narrow = scan.n_keys + scan.n_values <= _NARROW_WIDTH
    outputs = _chunks(rank.T - n_before, _NARROW_CHUNK if narrow else _WIDE_CHUNK)
    sources = sum(n * (scan.n_keys + length) for n, length in (*_chunks(n_before, _STATE_CHUNK), *outputs))
    weights = sum(n * length * (scan.n_keys + length) for n, length in outputs)
    return found | {
        "time steps": 2 * n_tokens * scan.heads * _FLOAT32,
        "chunk sources": n_lines * sources * scan.n_values * _FLOAT32,
        "chunk weights": n_lines * weights * _FLOAT32,
        "per head": per_head,
    }


def _chunks(n_tokens: int, length: int) -> list[tuple[int, int]]:
    """(how many, tokens of each): whole chunks and what is left."""
    whole, left = divmod(n_tokens, length)
    return [(whole, length), (int(left > 0), left)]


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit
