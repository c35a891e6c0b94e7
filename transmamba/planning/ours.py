"""Our layers and layouts as the time model's, and the memory that they take. Imports no torch.

Element-wise work and kernels per token, in numbers read and written: norms and residual sums as in a Transformer; the
convolution reads and writes its channels, and once more the gradient; the gated norm reads two streams and writes
one, and the reverse with four; the scan moves what `kernels/ssd` launches touch, as estimated for 64-token chunks:
keys, queries, values, outputs, one state per chunk, and for the backward the same and a scan of state gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from transmamba.config import Config, ModelConfig, head_width
from transmamba.costs import CHUNK, PositionShares, mamba2_widths
from transmamba.planning.activations import head_saved_bytes, head_working_bytes, in_flight, layer_saved_bytes
from transmamba.planning.shape import Layer, Layout, Recompute, Shape, transformer_layer
from transmamba.transpoint import LayerKind, effective_points, layer_kinds

# CUDA's context, NCCL's buffers and what the allocator cannot use: an allowance, not measured.
RESERVED_BYTES = 3_000_000_000
_BYTES = 2


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Bytes of a rank of one pipeline stage at its peak; gradients and optimizer as `communication.memory` has it."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    logits_bytes: int
    reserved_bytes: int

    @property
    def total_bytes(self) -> int:
        """All of it."""
        state = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes
        return state + self.activations_bytes + self.logits_bytes + self.reserved_bytes


def shape_of(config: Config, n_vocab_rows: int, shares: PositionShares) -> Shape:
    """The model of a configuration at its first step; `shares` of tokens as in `costs`."""
    model, seq_len = config.model, config.data.seq_len
    layers = tuple(
        layer_of(model, kind, point, shares, seq_len)
        for kind, point in zip(layer_kinds(model), effective_points(config), strict=True)
    )
    return Shape(layers, model.d_model, n_vocab_rows, model.tied)


def layer_of(model: ModelConfig, kind: LayerKind, point: int | float, shares: PositionShares, seq_len: int) -> Layer:
    """One layer at its TransPoint."""
    if kind == "mamba2":
        return _mamba2_layer(model)
    d, h, n = model.d_model, model.n_heads, head_width(model)
    keys, past, inner = shares.attended(point), shares.past(point), h * n
    if kind == "transformer":
        plain = transformer_layer(d, h, h, n, model.d_ff, 3, keys)
        return _exchanging(plain, 4 * inner, float(seq_len))
    rotated = 4.0 * inner * (1 - past)
    forward, backward = _scan_bytes(h, h, n, n)
    ends_state = h * (_BYTES * 2 * n + _BYTES * n * n / CHUNK) if past else 0.0
    return Layer(
        columns=((d, 4 * inner + h), *_ffn_columns(model)),
        rows=((inner, d), *_ffn_rows(model)),
        attention_channels=inner,
        head_dim=n,
        keys=keys,
        window=max(1.0, min(float(point), float(seq_len))),
        stream_elements=(8.0 * d, 8.0 * d),
        inner_elements=(3 * model.d_ff + rotated, 5 * model.d_ff + rotated),
        kernel_bytes=(
            past * forward + (1 - past) * ends_state + _BYTES * (6 + 3) * inner,
            past * backward + (1 - past) * 2 * ends_state + _BYTES * (9 + 5) * inner,
        ),
        exchange_channels=4 * inner + h,
    )


def layout_of(config: Config, world_size: int) -> Layout:
    """How this framework runs a configuration: nothing hides a collective, but for ZeRO-3's gathering ahead.

    ZeRO-1 reduces with an all-reduce, which moves each gradient twice as far as a reduce-scatter.
    """
    parallel, stage = config.parallel, config.zero.stage
    element = 4 if config.precision == "fp32" else _BYTES
    return Layout(
        world_size,
        config.data.seq_len,
        config.train.global_batch,
        config.train.micro_batch,
        tp=parallel.tp,
        pp=parallel.pp,
        vpp=parallel.vpp,
        cp=parallel.cp,
        zero=stage,
        sp=parallel.sp,
        recompute=config.train.recompute,
        reduce_bytes={0: 4, 1: 2 * element}.get(stage, element),
        overlaps=stage == 3,
    )


def activation_bytes(
    config: Config, layers: Sequence[int], n_vocab_rows: int, pipeline_rank: int, n_micro: int, recompute: Recompute
) -> tuple[int, int]:
    """Peak bytes of activations of a stage on a GPU in bf16, and of the logits that are there at a time."""
    model, parallel, train = config.model, config.parallel, config.train
    sizes = {"seq_len": config.data.seq_len, "micro_batch": train.micro_batch}
    cuts = {"tp": parallel.tp, "cp": parallel.cp, "sp": parallel.sp}
    kinds, points = layer_kinds(model), effective_points(config)
    alive = in_flight(parallel.pp, parallel.vpp, n_micro, pipeline_rank)
    counts: dict[tuple[LayerKind, int | float], int] = {}
    for layer in layers:
        counts[kinds[layer], points[layer]] = counts.get((kinds[layer], points[layer]), 0) + 1
    kept, repeated = 0.0, 0
    for (kind, point), n in counts.items():
        saved = layer_saved_bytes(model, kind, point, **sizes, **cuts, bytes_per_value=2, recompute=recompute)
        kept += n * sum(saved.values())
        if recompute != "none":
            whole = layer_saved_bytes(model, kind, point, **sizes, **cuts, bytes_per_value=2, recompute="none")
            repeated = max(repeated, sum(whole.values()) - sum(saved.values()))
    is_last = pipeline_rank == parallel.pp - 1
    head = head_saved_bytes(model, n_vocab_rows, **sizes, **cuts, bytes_per_value=2) if is_last else {}
    logits = {"tp": parallel.tp, "cp": parallel.cp}
    working = head_working_bytes(model, n_vocab_rows, **sizes, **logits, bytes_per_value=2) if is_last else 0
    total = working if isinstance(working, int) else sum(working.values())
    return round(kept * alive) + repeated + sum(head.values()), total


def _mamba2_layer(model: ModelConfig) -> Layer:
    inner, heads, conv = mamba2_widths(model)
    d, n = model.d_model, model.ssm_state
    forward, backward = _scan_bytes(heads, model.ssm_groups, n, model.ssm_head_dim)
    return Layer(
        columns=((d, inner + conv + heads), *_ffn_columns(model)),
        rows=((inner, d), *_ffn_rows(model)),
        attention_channels=0,
        head_dim=model.ssm_head_dim,
        keys=0.0,
        window=1.0,
        stream_elements=(8.0 * d, 8.0 * d),
        inner_elements=(3.0 * model.d_ff, 5.0 * model.d_ff),
        kernel_bytes=(forward + _BYTES * (2 * conv + 3 * inner), backward + _BYTES * (3 * conv + 5 * inner)),
        exchange_channels=inner + 2 * model.ssm_groups * n + heads + inner,
    )


def _exchanging(layer: Layer, channels: int, window: float) -> Layer:
    from dataclasses import replace

    return replace(layer, ring_channels=0, exchange_channels=channels, window=window)


def _scan_bytes(heads: int, groups: int, n_keys: int, n_values: int) -> tuple[float, float]:
    """Per token: values and outputs of every head, keys and queries of every group, dt, and states of chunks."""
    state = heads * _BYTES * n_keys * n_values / CHUNK
    forward = heads * (2 * _BYTES * n_values + 4) + groups * 2 * _BYTES * n_keys + state
    backward = heads * (3 * _BYTES * n_values + 8) + groups * 4 * _BYTES * n_keys + state
    again = heads * _BYTES * n_values + groups * _BYTES * n_keys + 2 * state
    return forward, backward + again


def _ffn_columns(model: ModelConfig) -> tuple[tuple[int, int], ...]:
    return ((model.d_model, 2 * model.d_ff),) if model.d_ff else ()


def _ffn_rows(model: ModelConfig) -> tuple[tuple[int, int], ...]:
    return ((model.d_ff, model.d_model),) if model.d_ff else ()
