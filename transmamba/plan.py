"""What a run will be: layers, TransPoints, parameters and FLOPs, as numbers and as a picture."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from transmamba.config import Config, padded_vocab, tokens_per_step, total_steps
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
from transmamba.transpoint import LayerKind, effective_points, layer_kinds

if TYPE_CHECKING:
    from rich.console import Console

    from transmamba.corpus import Corpus

_RARE_SHARE = 0.01
# Columns that the numbers beside the bars take.
_NUMBERS_WIDTH = 46
_ATTENTION, _SCAN = "█", "·"


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
    """Numbers of a run. FLOPs are per token and follow `flop_convention`."""

    layers: tuple[LayerPlan, ...]
    seq_len: int
    vocab_rows: int
    parameters: int
    embedding_parameters: int
    forward_flops_per_token: float
    training_flops_per_token: float
    flop_convention: str
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
    model, seq_len = config.model, config.data.seq_len
    shares = whole_windows(seq_len)
    if corpus is not None and config.data.document_mask:
        shares = packed_documents(corpus.lengths(config), seq_len)
    rows = padded_vocab(model.vocab_size or (corpus.vocab_size if corpus else BUILT_IN_VOCAB))
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
    steps = total_steps(config)
    return Plan(
        layers=layers,
        seq_len=seq_len,
        vocab_rows=rows,
        parameters=sum(layer.parameters for layer in layers) + embeddings + model.d_model,
        embedding_parameters=embeddings,
        forward_flops_per_token=forward,
        training_flops_per_token=TRAINING_OVER_FORWARD * forward,
        flop_convention=FLOP_CONVENTION,
        tokens=steps * tokens_per_step(config),
        steps=steps,
        tokens_per_step=tokens_per_step(config),
        warnings=_warnings(layers, shares),
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


def run_plan(overrides: Sequence[str], as_json: bool) -> int:
    """Print the plan of a configuration; trains nothing and creates nothing. Returns the exit code."""
    import os

    from rich.console import Console

    from transmamba.compose import load
    from transmamba.errors import EXIT_CONFIG, EXIT_DONE, ConfigError
    from transmamba.validate import validate

    try:
        config = load(list(overrides))
        # Without a launcher the layout says how many ranks there are.
        parallel = config.parallel
        ranks = {"WORLD_SIZE": str(parallel.tp * parallel.pp * parallel.cp), "RANK": "0"}
        environ = os.environ if "WORLD_SIZE" in os.environ else {**os.environ, **ranks}
        validate(config, environ)
    except ConfigError as error:
        print("\n".join(error.lines()), file=sys.stderr)
        return EXIT_CONFIG
    corpus = None
    if config.data.path is not None or config.data.sources:
        from transmamba.corpus import open_corpus

        corpus = open_corpus(config)
    plan = make_plan(config, corpus, int(environ["WORLD_SIZE"]))
    if as_json:
        print(json.dumps(plan.as_dict(), indent=1))
    else:
        print_plan(plan, Console())
    return EXIT_DONE


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
