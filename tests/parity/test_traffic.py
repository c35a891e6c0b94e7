"""The closed formulas of communication.py against what ranks really send and hold."""

from collections.abc import Sequence
from typing import Any

import pytest

from tests.parity import jobs_traffic, rig
from tests.parity.forkserver import run
from tests.parity.jobs_traffic import Counts
from tests.parity.matrix import Row, row, with_kind
from transmamba.communication import memory, traffic
from transmamba.config import Config, padded_vocab

pytestmark = pytest.mark.xdist_group("ranks")

LAYOUTS = [
    row(2, "tp2", tp=2, quick=True),
    row(2, "tp2 sp", tp=2, sp=True, quick=True),
    row(2, "cp2", cp=2, quick=True),
    row(2, "pp2", pp=2, quick=True),
    row(2, "dp2 zero1", zero__stage=1, quick=True),
    row(2, "pp2 vpp2", pp=2, vpp=2),
    *(row(2, f"dp2 zero{stage}", zero__stage=stage) for stage in (0, 2, 3)),
    row(4, "tp2 pp2", tp=2, pp=2),
    row(4, "tp2 cp2", tp=2, cp=2),
    row(4, "tp2 dp2 zero1", tp=2, zero__stage=1),
    row(4, "cp2 dp2 zero2", cp=2, zero__stage=2),
]
VARIANTS = [
    *with_kind("mamba2", [row(2, "tp2 sp", tp=2, sp=True), row(2, "cp2", cp=2)]),
    *with_kind("transformer", [row(2, "tp2", tp=2), row(2, "cp2", cp=2)]),
    row(4, "tp2 dp2 zero0", tp=2, zero__stage=0),
    row(4, "tp2 dp2 zero3", tp=2, zero__stage=3),
    row(4, "untied tp2 pp2", tp=2, pp=2, model__tied=False),
    row(4, "recompute full tp2 cp2", tp=2, cp=2, train__recompute="full"),
    row(2, "recompute full tp2 sp", tp=2, sp=True, train__recompute="full"),
    row(2, "recompute full no ffn tp2", tp=2, train__recompute="full", model__d_ff=0),
    row(2, "recompute selective tp2", tp=2, train__recompute="selective"),
    *(row(2, f"bf16 dp2 zero{stage}", precision="bf16", zero__stage=stage) for stage in (1, 2, 3)),
    row(4, "bf16 tp2 dp2 zero2", tp=2, precision="bf16", zero__stage=2),
    row(2, "bf16 tp2 sp", tp=2, sp=True, precision="bf16"),
    row(2, "bf16 pp2", pp=2, precision="bf16"),
    # Some weights, then the embedding too, are beyond the threshold under which ZeRO-3 keeps them whole.
    row(2, "large weights dp2 zero3", zero__stage=3, model__d_model=320, model__n_heads=10),
    row(2, "large embedding dp2 zero3", zero__stage=3, model__d_model=800, model__n_heads=10, model__n_layers=2),
]


def predicted(config: Config, pipeline_rank: int, layers: Sequence[int], dp: int) -> Counts:
    """The formulas' terms added up per group and operation."""
    totals: Counts = {}
    rows = padded_vocab(rig.VOCAB)
    for term in traffic(config, n_vocab_rows=rows, pipeline_rank=pipeline_rank, layers=layers, dp=dp):
        calls, size = totals.get((term.group, term.op), (0, 0))
        totals[term.group, term.op] = calls + term.calls, size + term.bytes
    return totals


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, id=row.name, marks=[] if row.is_quick else pytest.mark.long) for row in LAYOUTS + VARIANTS],
)
def test_a_step_sends_what_the_formulas_say(row: Row) -> None:
    config = rig.config_of(**row.options)
    for sent in run(row.ranks, jobs_traffic.step, row.options):
        assert sent.counts == predicted(config, sent.pipeline_rank, sent.layers, sent.dp)


@pytest.mark.long
@pytest.mark.parametrize(
    ("precision", "stage", "width"),
    # A width of 320 has weights that ZeRO-3 does not keep whole.
    [*(("fp32", stage, 128) for stage in range(4)), *(("bf16", stage, 128) for stage in (1, 2, 3)), ("bf16", 3, 320)],
)
def test_a_rank_holds_what_the_formulas_say(precision: str, stage: int, width: int) -> None:
    options: dict[str, Any] = {"precision": precision, "zero__stage": stage, "train__micro_batch": 4}
    options |= {"model__d_model": width, "model__n_heads": 8, "model__n_layers": 4, "model__d_ff": 2 * width}
    for found, sizes in run(2, jobs_traffic.held_bytes, options):
        wanted = memory(rig.config_of(**options), sizes=sizes, n_shards=2)
        # In fp32, stage 2 keeps a gradient whole where it lies across the border of two ranks.
        across = 4 * max(sizes) if (precision, stage) == ("fp32", 2) else 0
        for kind in ("weights", "gradients", "masters", "moments"):
            least = getattr(wanted, kind)
            assert 0.98 * least <= found[kind] <= 1.02 * least + across * (kind == "gradients"), kind
