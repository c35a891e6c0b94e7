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
           recompute=full                     forward terms of every layer once more, those of cp too, but for the
                                              last exit: nothing behind it is kept, so repeating stops before it
           embedding (first stage), forward   all_reduce X               reduce_scatter X
           embedding, backward                -                          all_gather X
           head (last stage), forward         -                          all_gather X
           head, backward                     all_reduce X               reduce_scatter X
           loss (last stage), also z-loss     all_reduce t b e (maximum), 2 all_reduces of t b float32 (target logit,
                                              sum of exponentials)
           norms of mixer, ffn, last stage    -                          all_reduce D e per weight
cp         layer: tokens to heads             all_to_all t b C_in e forward, the same backward
           layer: heads to tokens             all_to_all t b C_out e forward, the same backward
pp         chunk but the last: output         send X                     send X / tp
           chunk but the first: gradient      send X                     send X / tp
embedding  tied, first and last stage         all_reduce (rows / tp) D float32, once
dp_cp      gradients and weights              see `_zero0` to `_zero3`, which are those of DeepSpeed 0.19.8
dp_cp,     gradient norm                      ZeRO 0: all_reduce of one float64 in tp_pp; others: of one number per
tp_pp                                         group of weights (decayed or not) in both, once
dp         weight of the step                 all_reduce of one float64, once
dp         tokens past the TransPoints        all_reduce of a float64 per layer of the model and one more, once
dp_cp, pp  loss                               all_reduce of one float64 in each, once
world      whether somebody asks to stop      all_reduce of one int64, once

With H heads of width N: C_out = (H/tp) N, C_in = (H/tp)(3N + 1) for transmamba and (H/tp) 3N for transformer layers.
mamba2: C_in = (I + 2GrS + H) / tp, C_out = I / tp with I inner width, S state width, G groups copied r =
cp / gcd(G/tp, cp) times. The gathered input is kept, so nothing is gathered again in the backward; selective
recomputation repeats the mixing core alone, which has no collective. `bytes` are those of this rank's input tensors;
for all_gather of the output. What happens between steps (validation, checkpoints, replica checks, statistics of
layers) is not counted. Sources: arXiv 1909.08053 (tp), 2205.05198 (sp), 2309.14509 (cp), 1910.02054 (ZeRO).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from transmamba.config import Config, head_width
from transmamba.costs import mamba2_widths
from transmamba.transpoint import LayerKind, effective_points, layer_kinds

Group = Literal["tp", "cp", "pp", "embedding", "dp", "dp_cp", "tp_pp", "world"]
Ends = tuple[bool, bool]  # whether a stage is the first, the last
Op = Literal["all_reduce", "reduce_scatter", "all_gather", "all_to_all", "send", "reduce"]
_FLOAT32, _FLOAT64, _INT64 = 4, 8, 8
# DeepSpeed's defaults, in numbers of a tensor (runtime/zero/config.py).
_REDUCE_BUCKET, _PREFETCH_BUCKET = 500_000_000, 50_000_000
_PERSISTENT, _REUSE = 100_000, 1_000_000_000


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter tensor of a rank: numbers in it, and whether weight decay shrinks it."""

    size: int
    decays: bool


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
    held = weights_on_rank(config, n_vocab_rows=n_vocab_rows, pipeline_rank=pipeline_rank, layers=layers)
    gradients = (_zero0, _zero1, _zero2, _zero3)[config.zero.stage]
    ends, kinds = (pipeline_rank == 0, pipeline_rank == pp - 1), _kinds(config, layers)
    entries = [
        *_tensor_parallel(config, kinds, n_micro, ends),
        *_context_parallel(config, kinds, n_micro),
        *_pipeline_parallel(config, n_vocab_rows, n_micro, ends),
        *gradients(held, _element_bytes(config), n_micro, dp * cp),
        _each("weight of the step", "dp", "all_reduce", 1, _FLOAT64),
        _each("tokens past the TransPoints", "dp", "all_reduce", 1, (config.model.n_layers + 1) * _FLOAT64),
        _each("loss over the batch", "dp_cp", "all_reduce", 1, _FLOAT64),
        _each("loss over the stages", "pp", "all_reduce", 1, _FLOAT64),
        _each("request to stop", "world", "all_reduce", 1, _INT64),
    ]
    members: dict[Group, int] = {"tp": tp, "cp": cp, "pp": pp, "embedding": pp, "dp": dp, "dp_cp": dp * cp}
    members |= {"tp_pp": tp * pp, "world": tp * cp * pp * dp}
    return [entry for entry in entries if members[entry.group] > 1 and entry.bytes > 0]


def weights_on_rank(config: Config, *, n_vocab_rows: int, pipeline_rank: int, layers: Sequence[int]) -> list[Weight]:
    """The parameter tensors of a rank, in the order of the model; arguments and errors as in `traffic`.

    The norms before mixer, feed-forward network and head are whole on every tp rank, the rest is sharded.
    """
    model, tp, pp = config.model, config.parallel.tp, config.parallel.pp
    if not 0 <= pipeline_rank < pp:
        raise ValueError(f"pipeline rank {pipeline_rank} is not one of 0 to {pp - 1}")
    is_first, is_last = pipeline_rank == 0, pipeline_rank == pp - 1
    norm, table = Weight(model.d_model, False), Weight(n_vocab_rows // tp * model.d_model, True)
    held = [table] * is_first
    starts = [0, *(change.step for change in config.transpoint.changes)]
    points = [effective_points(config, start) for start in starts]
    for layer, kind in zip(layers, _kinds(config, layers), strict=True):
        scans = any(point[layer] < config.data.seq_len for point in points)
        held += [norm, *_mixer_weights(config, kind, scans)]
        if model.d_ff:
            held += [norm, *(Weight(n * model.d_ff // tp * model.d_model, True) for n in (2, 1))]
    # A tied head is a copy of the embedding when that is on another stage.
    return [*held, *[norm] * is_last, *[table] * (is_last and not (model.tied and is_first))]


def _mixer_weights(config: Config, kind: LayerKind, scans: bool) -> Iterator[Weight]:
    """The weights of a mixer; those of z and dt decay unless no token of the layer can be scanned."""
    model, tp = config.model, config.parallel.tp
    if kind == "mamba2":
        inner, heads, conv = mamba2_widths(model)
        matrices, norm = [(inner, True), (conv, True), (heads, True)], inner
    else:
        heads, norm = model.n_heads, model.n_heads * head_width(model)
        inner, conv = norm, 3 * norm
        matrices = [(conv, True)]
        if kind == "transmamba":
            matrices += [(inner, scans), (heads, scans)]
    yield from (Weight(rows // tp * model.d_model, decays) for rows, decays in matrices)
    if kind != "transformer":
        n_vectors = 3 if kind == "mamba2" or model.d_skip else 2
        yield from (Weight(conv // tp * taps, False) for taps in (model.conv_width, 1))
        yield from [Weight(heads // tp, False)] * n_vectors
        if kind == "mamba2" or model.mixer_norm == "head":
            yield Weight(norm // tp, False)
    yield Weight(inner // tp * model.d_model, True)


def memory(config: Config, *, sizes: Sequence[int], n_shards: int) -> Memory:
    """Bytes of weights, gradients, fp32 masters and Adam's two fp32 moments between a backward and its update.

    Args:
        sizes: numbers in every parameter tensor of the rank.
        n_shards: n, the size of the dp x cp group.

    Per parameter (ZeRO, section 3.1, with fp32 gradients; s is 1 for tensors of at most 1e5 numbers, else 0):

        stage   fp32                           bf16
        0       4 + 4 + 8 (no masters)         refused (ValueError)
        1       4 + 4 + 12 / n                 2 + 4 + 12 / n
        2       4 + 4 / n + 12 / n             2 + 4 / n + 12 / n
        3       4 / n + 4 s + 4 / n + 12 / n   2 / n + 2 s + 4 / n + 12 / n

    The term s, which theory does not have, is `stage3_param_persistence_threshold`: small tensors stay whole beside
    their piece. What DeepSpeed adds for a while: in stage 3 the large tensors in use; in fp32 stage 1 another 4 / n
    of gradients in the update; in fp32 stage 2 the whole gradient of a tensor that lies across the border of two
    ranks, because the pieces are views of it; and, but for bf16 stage 1, a bucket of 5e8 numbers for the reduction,
    whatever the size of the model.

    Raises:
        ValueError: stage 0 in bf16, or a precision of null.
    """
    stage, element, n_parameters = config.zero.stage, _element_bytes(config), sum(sizes)
    if stage == 0 and element != _FLOAT32:
        raise ValueError("zero.stage=0 is fp32 only, not precision=bf16")
    shard = -(-n_parameters // n_shards)
    kept = shard + sum(size for size in sizes if size <= _PERSISTENT)
    return Memory(
        weights=element * (kept if stage == 3 and n_shards > 1 else n_parameters),
        gradients=_FLOAT32 * (shard if stage >= 2 else n_parameters),
        masters=_FLOAT32 * shard if stage else 0,
        moments=2 * _FLOAT32 * (shard if stage else n_parameters),
    )


def _zero0(weights: Sequence[Weight], _element: int, _n_micro: int, _n_ranks: int) -> Iterator[Traffic]:
    """Stage 0 is our own loop: every parameter's float32 gradient by itself, once."""
    numbers = sum(weight.size for weight in weights)
    yield Traffic("gradients", "dp_cp", "all_reduce", len(weights), numbers * _FLOAT32)
    yield _each("gradient norm, tp_pp", "tp_pp", "all_reduce", 1, _FLOAT64)


def _zero1(weights: Sequence[Weight], element: int, _n_micro: int, n_ranks: int) -> Iterator[Traffic]:
    """All gradients are reduced whole, once per step; then every rank's part of the new weights is gathered.

    bf16 is another class (bf16_optimizer.py): it rounds its float32 sums to bf16 for the reduction (engine.py,
    `allreduce_gradients`), which cuts a bucket after it is full, and has no overflow check; every rank then has all
    gradients, so the norm is summed between model parallel ranks alone.
    """
    is_bf16 = element != _FLOAT32
    sizes = [weight.size for weight in weights]
    calls = _n_buckets(sizes, _REDUCE_BUCKET, overfills=is_bf16)
    yield Traffic("ZeRO-1 gradients", "dp_cp", "all_reduce", calls, sum(sizes) * element)
    yield _new_weights("ZeRO-1 weights", weights, element, n_ranks)
    if is_bf16:
        yield _each("gradient norm, tp_pp", "tp_pp", "all_reduce", 1, _FLOAT32)
    else:
        yield from _norms(weights, _FLOAT32)


def _zero2(weights: Sequence[Weight], element: int, n_micro: int, n_ranks: int) -> Iterator[Traffic]:
    """No rank keeps all gradients, so every micro-batch reduces them, in the weights' precision.

    It is an all-reduce of everything: the default `use_multi_rank_bucket_allreduce` has it so, instead of one reduce
    per owner (stage_1_and_2.py, `average_tensor`). bf16 adds a check for overflow, one byte.
    """
    sizes = [weight.size for weight in reversed(weights)]
    calls = _n_buckets(sizes, _REDUCE_BUCKET, overfills=False)
    yield Traffic("ZeRO-2 gradients", "dp_cp", "all_reduce", n_micro * calls, n_micro * sum(sizes) * element)
    yield _new_weights("ZeRO-2 weights", weights, element, n_ranks)
    yield from _norms(weights, _FLOAT32)
    if element != _FLOAT32:
        for group in ("dp_cp", "tp_pp"):
            yield _each(f"overflow, {group}", group, "all_reduce", 1, 1)


def _zero3(weights: Sequence[Weight], element: int, n_micro: int, n_ranks: int) -> Iterator[Traffic]:
    """Gradients are scattered per micro-batch; small weights are gathered after the update, large ones when used.

    Every tensor is cut into n pieces of which the last is padded. A weight of at most 1e5 numbers
    (`stage3_param_persistence_threshold`) stays whole on every rank, so it is gathered once per step, each by itself.
    The others are gathered for a forward and given up after its backward, as many together as reach 5e7 numbers
    (`stage3_prefetch_bucket_size`), and a second time for the backward if 1e9 numbers are used between both
    (`stage3_max_reuse_distance`). Models of several buckets, or gathered twice, are derived and not measured.
    """
    pieces = [(weight.size, -(-weight.size // n_ranks) * n_ranks) for weight in weights]
    calls = _n_buckets([size for size, _ in reversed(pieces)], _REDUCE_BUCKET, overfills=False)
    total = sum(padded for _, padded in pieces) * element
    yield Traffic("ZeRO-3 gradients", "dp_cp", "reduce_scatter", n_micro * calls, n_micro * total)
    small = [padded for size, padded in pieces if size <= _PERSISTENT]
    yield Traffic("ZeRO-3 small weights", "dp_cp", "all_gather", len(small), sum(small) * element)
    used_after = [2 * rest for rest in accumulate(size for size, _ in reversed(pieces))][::-1]
    large = [
        (size, padded, after >= _REUSE)
        for (size, padded), after in zip(pieces, used_after, strict=True)
        if size > _PERSISTENT
    ]
    yield from _large_weights(large, element, n_micro)
    yield from _norms(weights, _FLOAT64)


def _new_weights(name: str, weights: Sequence[Weight], element: int, n_ranks: int) -> Traffic:
    """All gathers of the updated weights: one per group, which is padded to a multiple of 2 numbers per rank."""
    groups, multiple = _groups(weights), 2 * n_ranks
    padded = sum(-(-numbers // multiple) * multiple for numbers in groups)
    return Traffic(name, "dp_cp", "all_gather", len(groups), padded * element)


def _large_weights(large: Sequence[tuple[int, int, bool]], element: int, n_micro: int) -> Iterator[Traffic]:
    """Gathers of weights that are not kept: (numbers, padded numbers, whether gathered again for the backward)."""
    again = [(size, padded) for size, padded, is_again in reversed(large) if is_again]
    for name, parts in (("forward", [part[:2] for part in large]), ("backward", again)):
        calls = _n_buckets([size for size, _ in parts], _PREFETCH_BUCKET - 1, overfills=True)
        total = sum(padded for _, padded in parts) * element
        yield Traffic(f"ZeRO-3 large weights, {name}", "dp_cp", "all_gather", n_micro * calls, n_micro * total)


def _norms(weights: Sequence[Weight], size: int) -> Iterator[Traffic]:
    """DeepSpeed takes the norm of every group by itself, over the shards and over the parts of the model."""
    for group in ("dp_cp", "tp_pp"):
        yield _each(f"gradient norm, {group}", group, "all_reduce", len(_groups(weights)), size)


def _groups(weights: Sequence[Weight]) -> list[int]:
    """Numbers in the optimiser's groups, decayed and not, without empty ones."""
    sums = [sum(weight.size for weight in weights if weight.decays is decays) for decays in (True, False)]
    return [numbers for numbers in sums if numbers]


def _n_buckets(sizes: Sequence[int], limit: int, *, overfills: bool) -> int:
    """Buckets that tensors fill in order; one is closed by the tensor that exceeds `limit`, or before it."""
    n_closed = filled = 0
    for size in sizes:
        if filled and not overfills and filled + size > limit:
            n_closed, filled = n_closed + 1, 0
        filled += size
        if overfills and filled > limit:
            n_closed, filled = n_closed + 1, 0
    return n_closed + (filled > 0)


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
    last = "ffn" if model.d_ff else "mixer"
    for name, calls, times in exits:
        times = 1 if name == last else times
        yield _each(f"{name} exit, forward", "tp", "reduce_scatter" if sp else "all_reduce", times * calls, stream)
        if sp:
            yield _each(f"{name} exit, backward", "tp", "all_gather", calls, stream)
    for name, size in (("maximum", element), ("target logit", _FLOAT32), ("sum of exponentials", _FLOAT32)):
        yield _each(f"loss, {name}", "tp", "all_reduce", n_micro * is_last, _tokens(config) * size)
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
