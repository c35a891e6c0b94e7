"""Seconds of a training step of one process on a CPU, from counted work and a profile's constants. Imports no torch.

Work is counted forward and backward together, for float32 and whole windows:

    matmul, matmul edges    6 M N K flops of every projection, and 6 (M N + N K + K M): what a small product waits for
    attention, scores       14 flops per channel of every pair of a query and a key; pairs, for their exponentials
    scan                    6 flops per entry of the products inside a chunk and with its state
    elements                numbers read and written by everything else, counted operation by operation
    operations              calls of torch, a view counting less
    parameters              numbers that the optimizer updates, once a step

A profile (`planning/hardware/cpu.yaml`, written by `cpu_fit`) says for each number of threads how many nanoseconds
one unit of each takes. All terms add up: on one core nothing overlaps.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from transmamba.communication import weights_on_rank
from transmamba.config import Config, ModelConfig, head_width, padded_vocab
from transmamba.costs import BUILT_IN_VOCAB, mamba2_widths
from transmamba.transpoint import LayerKind, effective_points, layer_kinds

# Accesses per number of a stream, forward and backward, as torch's dispatcher shows them: a norm with its residual;
# the other gradients of a mixer's input; the feed-forward network; convolution and glue of qkv per output channel,
# with the gate and the norm behind it; attention beside its kernel; and the scan per key or value and per token of
# a chunk.
_NORM, _FAN_OUT, _FFN, _MIXING, _ATTENDING, _SCAN_WIDTH, _SCAN_CHUNK, _LOSS = 37, 6, 18, 225, 52, 18, 26, 10
# Calls: of a layer without its feed-forward network, by kind; of that network; of a slab of the convolution, of the
# scan, and of the part of the scan that only builds state; of a chunk; of everything around the layers. A view counts
# as 0.4.
_CALLS: dict[LayerKind, int] = {"transmamba": 230, "transformer": 115, "mamba2": 190}
_FFN_CALLS, _CONV_CALLS, _SLAB_CALLS, _STATE_SLAB_CALLS, _CHUNK_CALLS, _STEP_CALLS = 35, 40, 140, 90, 6, 400
# Of torch: keys that queries meet at a time. Of kernels/: numbers of a slab, and tokens of a chunk (`activations`).
_KEY_BLOCK, _CONV_SLAB, _SCAN_SLAB, _SLAB_WIDTH = 512, 1 << 18, 1 << 19, 64
_STATE_CHUNK, _NARROW_CHUNK, _WIDE_CHUNK, _NARROW = 256, 32, 64, 32


@dataclass(frozen=True, slots=True)
class Work:
    """What a step does, in units of the table above; `+` and `*` act on every field."""

    matmul: float = 0.0
    matmul_edges: float = 0.0
    attention: float = 0.0
    scores: float = 0.0
    scan: float = 0.0
    elements: float = 0.0
    operations: float = 0.0
    parameters: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(self.amounts(), other.amounts(), strict=True)))

    def __mul__(self, factor: float) -> "Work":
        return Work(*(amount * factor for amount in self.amounts()))

    def amounts(self) -> list[float]:
        """The fields in order."""
        return [getattr(self, name) for name in TERMS]


TERMS = tuple(field.name for field in fields(Work))


def step_seconds(config: Config, profile: Mapping[str, Any]) -> float:
    """Wall seconds of one optimizer step on an otherwise idle machine.

    Args:
        config: one process in float32; `train.threads` null means the most threads of the profile.
        profile: `planning/hardware/cpu.yaml` as plain values.

    Raises:
        ValueError: several ranks, bf16, or a number of threads that the profile does not have.
    """
    parallel = config.parallel
    threads = {int(n): constants for n, constants in profile["threads"].items()}
    if parallel.tp * parallel.pp * parallel.cp > 1 or config.precision == "bf16":
        raise ValueError("the CPU's profile is of one process in fp32; set parallel.* to 1 and precision=fp32")
    wanted = config.train.threads or max(threads)
    if wanted not in threads:
        raise ValueError(f"the CPU's profile has {sorted(threads)} threads, not {wanted}")
    nanoseconds = threads[wanted]
    done = work(config)
    return math.fsum(getattr(done, name) * nanoseconds[name] for name in TERMS) * 1e-9


def work(config: Config) -> Work:
    """What one step of one process does."""
    model, train, T = config.model, config.train, config.data.seq_len
    n_rows, n_micro = train.micro_batch, train.global_batch // train.micro_batch
    n_vocab = padded_vocab(model.vocab_size or BUILT_IN_VOCAB)
    kinds = layer_kinds(model)
    again = {"none": (1.0, 1.0), "selective": (1.0, 4 / 3), "full": (4 / 3, 4 / 3)}[train.recompute]
    total = _head(model, n_vocab, n_rows * T)
    for kind, point in zip(kinds, effective_points(config), strict=True):
        total += _per_token(model, kind, n_rows * T) * again[0]
        total += _mixing(model, kind, point, n_rows, T) * again[1]
    one = config.model_copy(update={"precision": "fp32"})
    held = weights_on_rank(one, n_vocab_rows=n_vocab, pipeline_rank=0, layers=range(model.n_layers))
    size = sum(weight.size for weight in held)
    update = Work(parameters=size, operations=_STEP_CALLS)
    return total * n_micro + update


def _per_token(model: ModelConfig, kind: LayerKind, n_tokens: int) -> Work:
    """Projections, norms and feed-forward network of a layer."""
    d, f = model.d_model, model.d_ff
    if kind == "mamba2":
        inner, heads, conv = mamba2_widths(model)
        outputs, n_in = [inner, conv, heads], inner
    else:
        n_in = model.n_heads * head_width(model)
        outputs = [3 * n_in] if kind == "transformer" else [3 * n_in, n_in, model.n_heads]
    done = _products(n_tokens, [(n_out, d) for n_out in outputs] + [(d, n_in)])
    elements = (_NORM + _FAN_OUT * (kind != "transformer")) * d
    done += Work(elements=elements * n_tokens, operations=_CALLS[kind])
    if f:
        done += _products(n_tokens, [(2 * f, d), (d, f)])
        done += Work(elements=(_NORM * d + _FFN * f) * n_tokens, operations=_FFN_CALLS)
    return done


def _mixing(model: ModelConfig, kind: LayerKind, point: int | float, n_rows: int, T: int) -> Work:
    """What tokens do with each other: convolution, attention before the TransPoint, scan from it on."""
    if kind == "mamba2":
        inner, heads, conv = mamba2_widths(model)
        keys, values, groups, attended = model.ssm_state, model.ssm_head_dim, model.ssm_groups, 0
    else:
        heads = groups = model.n_heads
        keys = values = head_width(model)
        inner, conv = heads * keys, 3 * heads * keys
        attended = math.ceil(min(point, T))
    n_tokens = n_rows * T
    done = _attention(n_rows, heads, keys, attended)
    if kind == "transformer":
        return done
    # Three of four streams are convolved in a transmamba layer, which is what the accesses were counted with.
    streams = (conv + inner) / 4
    slabs = math.ceil(T / max(_CONV_SLAB // (n_rows * conv), 1))
    done += Work(elements=_MIXING * streams * n_tokens, operations=_CONV_CALLS * slabs)
    return done + _scan(n_rows, heads, groups, keys, values, T, attended)


def _attention(n_rows: int, heads: int, width: int, n_tokens: int) -> Work:
    """Causal attention in torch's blocks: queries that see a key of a block of keys meet all of it."""
    block = 256 if n_tokens >= 768 else 64 if n_tokens >= 192 else 32
    lines, pairs = n_rows * heads, 0
    for first in range(0, n_tokens, block):
        stop = min(first + block, n_tokens)
        pairs += (stop - first) * min(math.ceil(stop / _KEY_BLOCK) * _KEY_BLOCK, n_tokens)
    elements = _ATTENDING * lines * n_tokens * width
    return Work(attention=14 * lines * pairs * width, scores=lines * pairs, elements=elements)


def _scan(n_rows: int, heads: int, groups: int, keys: int, values: int, T: int, n_before: int) -> Work:
    """A scan whose first `n_before` tokens build state alone; none where all do."""
    if n_before == T:
        return Work()
    length = _NARROW_CHUNK if keys + values <= _NARROW else _WIDE_CHUNK
    n_slab = _SCAN_SLAB // (n_rows * heads * _SLAB_WIDTH)
    done = Work()
    for n_tokens, chunk, reads in ((n_before, _STATE_CHUNK, 0), (T - n_before, length, 1)):
        lines = n_rows * heads * n_tokens
        inside = (keys + chunk) * values + groups / heads * chunk * keys
        slabs = math.ceil(n_tokens / (chunk * max(n_slab // chunk, 1)))
        done += Work(
            scan=6 * lines * (keys * values + reads * inside),
            elements=lines * (_SCAN_WIDTH * (keys + values) / (1 if reads else 2) + reads * _SCAN_CHUNK * chunk),
            operations=(_SLAB_CALLS if reads else _STATE_SLAB_CALLS) * slabs
            + _CHUNK_CALLS * math.ceil(n_tokens / chunk),
        )
    return done


def _head(model: ModelConfig, n_vocab: int, n_tokens: int) -> Work:
    """Embedding, final norm, logits and loss."""
    accessed = _NORM * model.d_model + _LOSS * n_vocab
    done = _products(n_tokens, [(n_vocab, model.d_model)])
    return done + Work(elements=accessed * n_tokens)


def _products(n_tokens: int, sizes: Sequence[tuple[int, int]]) -> Work:
    """Of every (outputs, inputs) the product and those of its two gradients."""
    flops = sum(6 * n_tokens * n_out * n_in for n_out, n_in in sizes)
    edges = sum(6 * (n_tokens * n_out + n_out * n_in + n_in * n_tokens) for n_out, n_in in sizes)
    return Work(matmul=flops, matmul_edges=edges)
