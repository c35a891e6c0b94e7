"""What a run will be: layers, TransPoints, parameters and FLOPs, as numbers and as a picture."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from transmamba.config import Config, head_width, padded_vocab, tokens_per_step, total_steps
from transmamba.costs import (
    BUILT_IN_VOCAB,
    FLOP_CONVENTION,
    TRAINING_OVER_FORWARD,
    PositionShares,
    embedding_parameters,
    layer_flops,
    layer_parameters,
    logit_flops,
    packed_documents,
    whole_windows,
)
from transmamba.plan_parallel import ParallelPlan, parallel_plan, print_parallel
from transmamba.transpoint import LayerKind, cut_schedules, effective_points, layer_kinds

if TYPE_CHECKING:
    from rich.console import Console

    from transmamba.corpus import Corpus

_RARE_SHARE = 0.01
# Columns that the numbers beside the bars take.
_NUMBERS_WIDTH = 46
_ATTENTION, _SCAN = "█", "·"
FULL_ATTENTION = "the same, but the whole square of attention, as NVIDIA's 12 h s has it (causal half: 6 h s)"


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer; `point` is None where it never scans, `share_past` the share of tokens that it scans."""

    kind: LayerKind
    point: int | None
    parameters: int
    forward_flops_per_token: float
    share_past: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Numbers of a run. FLOPs are per token and follow `flop_convention`, unless their name says otherwise."""

    layers: tuple[LayerPlan, ...]
    seq_len: int
    vocab_rows: int
    parameters: int
    embedding_parameters: int
    forward_flops_per_token: float
    training_flops_per_token: float
    flop_convention: str
    training_flops_per_token_full_attention: float
    full_attention_convention: str
    tokens: int
    steps: int
    tokens_per_step: int
    warnings: tuple[str, ...]
    parallel: ParallelPlan | None

    def as_dict(self) -> dict[str, object]:
        """Plain data for JSON; an infinite TransPoint is null."""
        return asdict(self)


def make_plan(config: Config, corpus: "Corpus | None" = None, world_size: int = 1) -> Plan:
    """Count parameters and FLOPs of a run at its first step.

    Args:
        config: a composed configuration.
        corpus: the training data; its vocabulary counts and, with `data.document_mask`, its document
            lengths. Without one a window is one document, of the built-in corpus.
        world_size: ranks, for what they hold and send; a multiple of tp x pp x cp, or 1 to leave that out.

    Raises:
        ValueError: the layer pattern or the schedule cannot be read (see `transpoint`).
    """
    model, shares, rows = config.model, token_shares(config, corpus), vocab_rows(config, corpus)
    layers = tuple(
        LayerPlan(
            kind=kind,
            point=None if point == math.inf else int(point),
            parameters=layer_parameters(model, kind),
            forward_flops_per_token=layer_flops(model, kind, point, shares),
            share_past=shares.past(point),
        )
        for kind, point in zip(layer_kinds(model), effective_points(config), strict=True)
    )
    embeddings = embedding_parameters(model, rows)
    costs, head_cost = [layer.forward_flops_per_token for layer in layers], logit_flops(model, rows)
    forward = math.fsum(costs) + head_cost
    other_half = math.fsum(_other_half_flops(config, layer, shares) for layer in layers)
    steps = total_steps(config)
    return Plan(
        layers=layers,
        seq_len=config.data.seq_len,
        vocab_rows=rows,
        parameters=sum(layer.parameters for layer in layers) + embeddings + model.d_model,
        embedding_parameters=embeddings,
        forward_flops_per_token=forward,
        training_flops_per_token=TRAINING_OVER_FORWARD * forward,
        flop_convention=FLOP_CONVENTION,
        training_flops_per_token_full_attention=TRAINING_OVER_FORWARD * (forward + other_half),
        full_attention_convention=FULL_ATTENTION,
        tokens=steps * tokens_per_step(config),
        steps=steps,
        tokens_per_step=tokens_per_step(config),
        warnings=(*cut_schedules(config), *_warnings(layers, shares)),
        parallel=parallel_plan(config, costs, head_cost, rows, world_size),
    )


def print_plan(plan: Plan, console: "Console") -> None:
    """Print the totals, then one row per layer with its attention and scan parts over the sequence."""
    from rich.table import Table
    from rich.text import Text

    totals = Table.grid(padding=(0, 2))
    for name, value in _totals(plan):
        totals.add_row(Text(name, style="dim"), value)
    console.print(totals)
    width = max(12, min(64, console.width - _NUMBERS_WIDTH))
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for name in ("layer", "kind", "point", "scan", "FLOPs"):
        table.add_column(name, justify="left" if name == "kind" else "right", no_wrap=True)
    table.add_column(f"0..{plan.seq_len - 1}", no_wrap=True)
    for number, layer in enumerate(plan.layers):
        n_attention = _bar_cells(layer.point, plan.seq_len, width)
        bar = Text(_ATTENTION * n_attention, style="cyan")
        bar.append(_SCAN * (width - n_attention), style="yellow")
        point = "inf" if layer.point is None else str(layer.point)
        share = f"{layer.share_past:.1%}"
        table.add_row(str(number), layer.kind, point, share, _short(layer.forward_flops_per_token), bar)
    console.print(table)
    console.print(f"{_ATTENTION} attention before the TransPoint   {_SCAN} scan from it on", style="dim")
    if plan.parallel is not None:
        print_parallel(plan.parallel, console)
    for warning in plan.warnings:
        console.print(f"[yellow]warning:[/yellow] {warning}", highlight=False)


def token_shares(config: Config, corpus: "Corpus | None") -> PositionShares:
    """How tokens spread over their offsets: as the corpus has it where documents are masked, else whole windows."""
    if corpus is not None and config.data.document_mask:
        return packed_documents(corpus.lengths(config), config.data.seq_len)
    return whole_windows(config.data.seq_len)


def vocab_rows(config: Config, corpus: "Corpus | None") -> int:
    """Rows of the embedding."""
    return padded_vocab(config.model.vocab_size or (corpus.vocab_size if corpus else BUILT_IN_VOCAB))


def _other_half_flops(config: Config, layer: LayerPlan, shares: PositionShares) -> float:
    """Forward FLOPs per token of the half of attention's square that causal attention leaves out."""
    if layer.kind == "mamba2":
        return 0.0
    point = math.inf if layer.point is None else layer.point
    # A token that attends to k keys belongs to a square of 2 k - 1 on average, the diagonal being there once.
    left_out = shares.attended(point) - (1 - shares.past(point))
    return 4 * config.model.n_heads * head_width(config.model) * left_out


def _warnings(layers: Sequence[LayerPlan], shares: PositionShares) -> tuple[str, ...]:
    rare = [
        f"layer {number} scans from token {layer.point}; {layer.share_past:.2%} of the tokens reach it, "
        "so its scan will hardly be trained"
        for number, layer in enumerate(layers)
        if layer.point is not None and layer.kind == "transmamba" and shares.past(layer.point) < _RARE_SHARE
    ]
    return tuple(rare)


def _totals(plan: Plan) -> list[tuple[str, str]]:
    inner = plan.parameters - plan.embedding_parameters
    return [
        ("parameters", f"{_short(plan.parameters)}  ({_short(inner)} without the embeddings)"),
        ("vocabulary", f"{plan.vocab_rows} rows"),
        ("tokens", f"{_short(plan.tokens)}  ({plan.steps} steps of {plan.tokens_per_step})"),
        ("FLOPs/token", f"{_short(plan.training_flops_per_token)} training, "
                        f"{_short(plan.forward_flops_per_token)} forward"),
        ("counted as", plan.flop_convention),
        ("", f"{_short(plan.training_flops_per_token_full_attention)} training with the whole square of attention"),
    ]  # fmt: skip


def _bar_cells(point: int | None, seq_len: int, width: int) -> int:
    """Cells of attention: every part that exists shows at least one."""
    if point is None or point >= seq_len:
        return width
    return 0 if point == 0 else min(width - 1, max(1, round(width * point / seq_len)))


def _short(number: float) -> str:
    for scale, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.3g}{letter}"
    return f"{number:.0f}"
