"""What a rank sends per optimizer step, and what its training state occupies, by closed formulas. Imports no torch.

Symbols: tp, cp, pp, vpp, dp degrees; m micro-batches per rank and step; b windows per micro-batch; T tokens per
window, t = T / cp of them per rank; D model width; e bytes per element (4 fp32, 2 bf16). The residual stream is
[t, b, D], X = t b D e bytes, and [t / tp, b, D] with sequence parallelism (sp). Terms come once per micro-batch (and
layer, where one is named), so m times per step, unless marked "once". Groups of one rank do nothing.

group      term                               without sp                 with sp
tp         layer: mixer, ffn entry, forward   -                          all_gather X
           layer: mixer, ffn exit, forward    all_reduce X               reduce_scatter X
           layer: mixer, ffn entry, backward  all_reduce X               reduce_scatter X
           layer: mixer, ffn exit, backward   -                          all_gather X
           recompute=full                     forward terms of every layer once more, those of cp too
           embedding (first stage), forward   all_reduce X               reduce_scatter X
           embedding, backward                -                          all_gather X
           head (last stage), forward         -                          all_gather X
           head, backward                     all_reduce X               reduce_scatter X
           loss (last stage), also z-loss     3 all_reduces of t b float32 (maximum, target logit, sum of exponentials)
           norms of mixer, ffn, last stage    -                          all_reduce D e per weight
cp         layer: tokens to heads             all_to_all t b C_in e forward, the same backward
           layer: heads to tokens             all_to_all t b C_out e forward, the same backward
pp         chunk but the last: output         send X                     send X / tp
           chunk but the first: gradient      send X                     send X / tp
embedding  tied, first and last stage         all_reduce (rows / tp) D float32, once
dp_cp      gradients, ZeRO stage 0            all_reduce of every parameter, float32, once; others: `zero*_theoretical`
dp         weight of the step                 all_reduce of one float64, once
dp_cp, pp  loss                               all_reduce of one float64 in each, once

With H heads of width N: C_out = (H/tp) N, C_in = (H/tp)(3N + 1) for transmamba and (H/tp) 3N for transformer layers.
mamba2: C_in = (I + 2GrS + H) / tp, C_out = I / tp with I inner width, S state width, G groups copied r =
cp / gcd(G/tp, cp) times. The gathered input is kept, so nothing is gathered again in the backward; selective
recomputation repeats the mixing core alone, which has no collective. `bytes` are those of this rank's input tensors;
for all_gather of the output. Sources: arXiv 1909.08053 (tp), 2205.05198 (sp), 2309.14509 (cp), 1910.02054 (ZeRO).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from transmamba.config import Config, head_width
from transmamba.costs import layer_parameters, mamba2_widths
from transmamba.transpoint import LayerKind, layer_kinds

Group = Literal["tp", "cp", "pp", "embedding", "dp", "dp_cp"]
Ends = tuple[bool, bool]  # whether a stage is the first, the last
Op = Literal["all_reduce", "reduce_scatter", "all_gather", "all_to_all", "send", "reduce"]
_FLOAT32, _FLOAT64 = 4, 8
# Weights of a mixer and its input norm; `d_skip` and `mixer_norm` add one each to transmamba's.
_MIXER_TENSORS: dict[LayerKind, int] = {"transmamba": 9, "transformer": 3, "mamba2": 11}


@dataclass(frozen=True, slots=True)
class Traffic:
    """One term of the table: `calls` collectives that move `bytes` in all, per rank and optimizer step."""

    name: str
    group: Group
    op: Op
    calls: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of a rank's training state; activations and buckets of collectives are not counted."""

    weights: int
    gradients: int
    masters: int
    moments: int


def traffic(config: Config, *, n_vocab_rows: int, pipeline_rank: int, layers: Sequence[int], dp: int) -> list[Traffic]:
    """Everything a rank sends in one optimizer step, one entry per term that is not empty.

    Args:
        config: a valid configuration whose precision is not null.
        n_vocab_rows: rows of the embedding, on all tp ranks.
        pipeline_rank: stage of the rank, 0 .. pp - 1.
        layers: numbers of the layers on this rank, all chunks together.
        dp: data parallel degree, which the configuration does not know.

    Raises:
        ValueError: no such stage, a batch that dp and micro_batch do not divide, or a precision of null.
    """
    train, tp, cp, pp = config.train, config.parallel.tp, config.parallel.cp, config.parallel.pp
    if train.global_batch % (dp * train.micro_batch):
        raise ValueError(
            f"dp={dp} x train.micro_batch={train.micro_batch} does not divide train.global_batch={train.global_batch}"
        )
    n_micro = train.global_batch // (dp * train.micro_batch)
    held = parameters_on_rank(config, n_vocab_rows=n_vocab_rows, pipeline_rank=pipeline_rank, layers=layers)
    gradients = (zero0, zero1_theoretical, zero2_theoretical, zero3_theoretical)[config.zero.stage]
    ends, kinds = (pipeline_rank == 0, pipeline_rank == pp - 1), _kinds(config, layers)
    entries = [
        *_tensor_parallel(config, kinds, n_micro, ends),
        *_context_parallel(config, kinds, n_micro),
        *_pipeline_parallel(config, n_vocab_rows, n_micro, ends),
        *gradients(*held, _element_bytes(config), n_micro),
        _each("weight of the step", "dp", "all_reduce", 1, _FLOAT64),
        _each("loss over the batch", "dp_cp", "all_reduce", 1, _FLOAT64),
        _each("loss over the stages", "pp", "all_reduce", 1, _FLOAT64),
    ]
    members: dict[Group, int] = {"tp": tp, "cp": cp, "pp": pp, "embedding": pp, "dp": dp, "dp_cp": dp * cp}
    return [entry for entry in entries if members[entry.group] > 1 and entry.bytes > 0]


def parameters_on_rank(
    config: Config, *, n_vocab_rows: int, pipeline_rank: int, layers: Sequence[int]
) -> tuple[int, int]:
    """(parameter tensors, numbers in them) of a rank; arguments and errors as in `traffic`.

    The norms before mixer, feed-forward network and head are whole on every tp rank, the rest is sharded.
    """
    model, tp, pp = config.model, config.parallel.tp, config.parallel.pp
    if not 0 <= pipeline_rank < pp:
        raise ValueError(f"pipeline rank {pipeline_rank} is not one of 0 to {pp - 1}")
    is_first, is_last = pipeline_rank == 0, pipeline_rank == pp - 1
    # A tied head is a copy of the embedding when that is on another stage.
    n_tables = is_first + (is_last and not (model.tied and is_first))
    n_tensors, n_numbers = n_tables + is_last, (n_tables * (n_vocab_rows // tp) + is_last) * model.d_model
    norms = model.d_model * (2 if model.d_ff else 1)
    for kind in _kinds(config, layers):
        optional = model.d_skip + (model.mixer_norm == "head") if kind == "transmamba" else 0
        n_tensors += _MIXER_TENSORS[kind] + optional + (3 if model.d_ff else 0)
        n_numbers += norms + (layer_parameters(model, kind) - norms) // tp
    return n_tensors, n_numbers


def memory(config: Config, *, n_parameters: int, n_shards: int) -> Memory:
    """Bytes of weights, gradients, fp32 masters and Adam's two fp32 moments.

    Per parameter, n = `n_shards`, the size of the dp x cp group (ZeRO, section 3.1, with fp32 gradients):

        stage   fp32                     bf16
        0       4 + 4 + 8 (no masters)   refused (ValueError)
        1       4 + 4 + 12 / n           2 + 4 + 12 / n
        2       4 + 4 / n + 12 / n       2 + 4 / n + 12 / n
        3       4 / n + 4 / n + 12 / n   2 / n + 4 / n + 12 / n
    """
    stage, element = config.zero.stage, _element_bytes(config)
    if stage == 0 and element != _FLOAT32:
        raise ValueError("zero.stage=0 is fp32 only, not precision=bf16")
    shard = -(-n_parameters // n_shards)
    return Memory(
        weights=element * (shard if stage == 3 else n_parameters),
        gradients=_FLOAT32 * (shard if stage >= 2 else n_parameters),
        masters=_FLOAT32 * shard if stage else 0,
        moments=2 * _FLOAT32 * (shard if stage else n_parameters),
    )


def zero0(n_tensors: int, n_numbers: int, _element: int, _n_micro: int) -> list[Traffic]:
    """Stage 0 is our own loop: every parameter's float32 gradient by itself, once."""
    return [Traffic("gradients", "dp_cp", "all_reduce", n_tensors, n_numbers * _FLOAT32)]


def zero1_theoretical(_n_tensors: int, n_numbers: int, element: int, _n_micro: int) -> list[Traffic]:
    """Least that ZeRO-1 does as DeepSpeed has it: all gradients reduced whole, then the new weights gathered."""
    return [
        _each("ZeRO-1 gradients, theoretical", "dp_cp", "all_reduce", 1, n_numbers * _FLOAT32),
        _each("ZeRO-1 weights, theoretical", "dp_cp", "all_gather", 1, n_numbers * element),
    ]


def zero2_theoretical(_n_tensors: int, n_numbers: int, element: int, n_micro: int) -> list[Traffic]:
    """Least that ZeRO-2 does: no rank keeps all gradients, so every micro-batch reduces them to their owners."""
    return [
        _each("ZeRO-2 gradients, theoretical", "dp_cp", "reduce", n_micro, n_numbers * element),
        _each("ZeRO-2 weights, theoretical", "dp_cp", "all_gather", 1, n_numbers * element),
    ]


def zero3_theoretical(_n_tensors: int, n_numbers: int, element: int, n_micro: int) -> list[Traffic]:
    """Least that ZeRO-3 does: weights gathered for every forward and backward, gradients scattered at once."""
    return [
        _each("ZeRO-3 weights, theoretical", "dp_cp", "all_gather", 2 * n_micro, n_numbers * element),
        _each("ZeRO-3 gradients, theoretical", "dp_cp", "reduce_scatter", n_micro, n_numbers * element),
    ]


def _each(name: str, group: Group, op: Op, calls: int, size: int) -> Traffic:
    return Traffic(name, group, op, calls, calls * size)


def _element_bytes(config: Config) -> int:
    if config.precision is None:
        raise ValueError("precision is null: say fp32 or bf16")
    return _FLOAT32 if config.precision == "fp32" else 2


def _kinds(config: Config, layers: Sequence[int]) -> list[LayerKind]:
    kinds = layer_kinds(config.model)
    return [kinds[layer] for layer in layers]


def _tokens(config: Config) -> int:  # t b
    return config.data.seq_len // config.parallel.cp * config.train.micro_batch


def _tensor_parallel(config: Config, kinds: Sequence[LayerKind], n_micro: int, ends: Ends) -> Iterator[Traffic]:
    (is_first, is_last), model, sp, element = ends, config.model, config.parallel.sp, _element_bytes(config)
    stream, mixers = _tokens(config) * model.d_model * element, len(kinds) * n_micro
    ffns, repeats = mixers if model.d_ff else 0, 1 + (config.train.recompute == "full")
    # An embedding only exits: each rank looks up its own rows. The head only enters: logits stay with their rows.
    entries = [("mixer", mixers, repeats), ("ffn", ffns, repeats), ("head", n_micro * is_last, 1)]
    exits = [*entries[:2], ("embedding", n_micro * is_first, 1)]
    for name, calls, times in entries:
        if sp:
            yield _each(f"{name} entry, forward", "tp", "all_gather", times * calls, stream)
        yield _each(f"{name} entry, backward", "tp", "reduce_scatter" if sp else "all_reduce", calls, stream)
    for name, calls, times in exits:
        yield _each(f"{name} exit, forward", "tp", "reduce_scatter" if sp else "all_reduce", times * calls, stream)
        if sp:
            yield _each(f"{name} exit, backward", "tp", "all_gather", calls, stream)
    for name in ("maximum", "target logit", "sum of exponentials"):
        yield _each(f"loss, {name}", "tp", "all_reduce", n_micro * is_last, _tokens(config) * _FLOAT32)
    if sp:
        for name, calls in (("mixer", mixers), ("ffn", ffns), ("final", n_micro * is_last)):
            yield _each(f"{name} norm gradients", "tp", "all_reduce", calls, model.d_model * element)


def _context_parallel(config: Config, kinds: Sequence[LayerKind], n_micro: int) -> Iterator[Traffic]:
    for kind in dict.fromkeys(kinds):
        calls, repeats = kinds.count(kind) * n_micro, 1 + (config.train.recompute == "full")
        for name, channels in zip(("tokens to heads", "heads to tokens"), _channels(config, kind), strict=True):
            size = _tokens(config) * channels * _element_bytes(config)
            yield _each(f"{kind} {name}, forward", "cp", "all_to_all", repeats * calls, size)
            yield _each(f"{kind} {name}, backward", "cp", "all_to_all", calls, size)


def _channels(config: Config, kind: LayerKind) -> tuple[int, int]:
    """C_in and C_out."""
    model, tp, cp = config.model, config.parallel.tp, config.parallel.cp
    if kind == "mamba2":
        inner, heads, _ = mamba2_widths(model)
        copies = cp // math.gcd(model.ssm_groups // tp, cp)
        return (inner + 2 * model.ssm_groups * copies * model.ssm_state + heads) // tp, inner // tp
    heads, width = model.n_heads // tp, head_width(model)
    return heads * (3 * width + (kind == "transmamba")), heads * width


def _pipeline_parallel(config: Config, n_rows: int, n_micro: int, ends: Ends) -> Iterator[Traffic]:
    (is_first, is_last), parallel, model = ends, config.parallel, config.model
    size = _tokens(config) // (parallel.tp if parallel.sp else 1) * model.d_model * _element_bytes(config)
    yield _each("activations to the next chunk", "pp", "send", (parallel.vpp - is_last) * n_micro, size)
    yield _each("gradients to the previous chunk", "pp", "send", (parallel.vpp - is_first) * n_micro, size)
    size = n_rows // parallel.tp * model.d_model * _FLOAT32
    yield _each("tied embedding gradients", "embedding", "all_reduce", int(model.tied and any(ends)), size)
