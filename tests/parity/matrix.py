"""The layouts that train to the losses of one rank: the project's table of what it can do, as data.

Every row is (ranks, options of the rig). QUICK runs every day, the rest in the long suite.
"""

from typing import Any, NamedTuple

from tests.parity.rig import ROWS as ROWS_OF_A_STEP


class Row(NamedTuple):
    """One layout."""

    ranks: int
    says: str
    options: dict[str, Any]
    is_quick: bool = False
    norm_tolerance: float = 5e-6  # relative

    @property
    def name(self) -> str:
        """For the test report."""
        return self.says.replace(" ", "-")


def row(ranks: int, says: str, *, quick: bool = False, **options: Any) -> Row:
    """`says` is what people call the layout; keys without a section belong to `parallel`."""
    sections = {f"parallel__{key}" if key in ("tp", "pp", "vpp", "cp", "sp") else key: v for key, v in options.items()}
    tp, pp, cp = (options.get(key, 1) for key in ("tp", "pp", "cp"))
    # Two micro-batches a rank, or one per stage: gloo takes 2 to 6 ms for a collective, whatever its size. Interleaved
    # stages get twice as many, because only then do messages of two micro-batches meet.
    n_micro = max(2, pp) * (2 if "vpp" in options else 1)
    sections["train__micro_batch"] = ROWS_OF_A_STEP // (ranks // (tp * pp * cp)) // n_micro
    return Row(ranks, says, sections, quick)


def with_kind(kind: str, rows: list[Row]) -> list[Row]:
    """The same layouts for another kind of model."""
    return [Row(ranks, f"{kind} {says}", {**options, "model__kind": kind}) for ranks, says, options, *_ in rows]


_UNTIED = {"model__tied": False}

LAYOUTS = [
    row(2, "tp2", tp=2, quick=True),
    row(2, "tp2 zero0", tp=2, zero__stage=0, quick=True),
    row(4, "tp4", tp=4),
    row(2, "tp2 sp", tp=2, sp=True, quick=True),
    row(4, "tp4 sp", tp=4, sp=True),
    row(2, "pp2", pp=2, quick=True),
    row(2, "pp2 vpp2", pp=2, vpp=2, quick=True),
    row(4, "pp4", pp=4, quick=True),
    row(2, "cp2", cp=2, quick=True),
    row(4, "cp4", cp=4),
    *(row(2, f"dp2 zero{stage}", zero__stage=stage, quick=stage != 2) for stage in range(4)),
    row(4, "dp4 zero1", zero__stage=1),
    row(4, "tp2 pp2", tp=2, pp=2, quick=True),
    row(4, "tp2 sp pp2", tp=2, sp=True, pp=2),
    row(4, "tp2 pp2 vpp2", tp=2, pp=2, vpp=2),
    row(4, "tp2 cp2", tp=2, cp=2, quick=True),
    row(4, "tp2 sp cp2", tp=2, sp=True, cp=2),
    *(row(4, f"tp2 dp2 zero{stage}", tp=2, zero__stage=stage) for stage in (0, 1, 2, 3)),
    row(4, "tp2 sp dp2 zero2", tp=2, sp=True, zero__stage=2),
    row(4, "pp2 dp2 zero0", pp=2, zero__stage=0),
    row(4, "pp2 dp2 zero1", pp=2, zero__stage=1),
    row(4, "cp2 dp2 zero1", cp=2, zero__stage=1),
    row(4, "cp2 dp2 zero2", cp=2, zero__stage=2),
    row(4, "cp2 dp2 zero3", cp=2, zero__stage=3),
    row(4, "cp2 pp2", cp=2, pp=2, quick=True),
    row(4, "cp2 pp2 vpp2", cp=2, pp=2, vpp=2),
    row(8, "tp2 pp2 dp2", tp=2, pp=2),
]

MAIN = [
    row(2, "tp2 sp", tp=2, sp=True),
    row(2, "pp2 vpp2", pp=2, vpp=2),
    row(2, "cp2", cp=2),
    row(2, "dp2 zero3", zero__stage=3),
    row(4, "tp2 pp2", tp=2, pp=2),
    row(4, "tp2 cp2", tp=2, cp=2),
]

VARIANTS = [
    *(Row(ranks, f"untied {says}", {**options, **_UNTIED}) for ranks, says, options, *_ in MAIN),
    *(
        Row(ranks, f"whole windows {says}", {**options, "data__document_mask": False})
        for ranks, says, options, *_ in MAIN
    ),
    row(2, "recompute selective tp2 sp", tp=2, sp=True, train__recompute="selective"),
    row(2, "recompute full cp2", cp=2, train__recompute="full"),
    row(4, "recompute full tp2 pp2", tp=2, pp=2, train__recompute="full"),
    row(2, "z-loss tp2", tp=2, optim__z_loss=1e-2),
    *with_kind("mamba2", MAIN),
    *with_kind("transformer", MAIN),
    *with_kind("hybrid", MAIN),
    # One group of B and C for all heads: context-parallel ranks share it.
    row(2, "mamba2 one group cp2", cp=2, model__kind="mamba2", model__ssm_groups=1),
    # Rounding grows on this path: one rank with other micro-batches is 7e-6 from itself at step 20, 4e-8 at step 1.
    row(4, "mamba2 two groups tp2 cp2", tp=2, cp=2, model__kind="mamba2", model__ssm_groups=2)._replace(
        norm_tolerance=1e-5
    ),
]

ROWS = LAYOUTS + VARIANTS

BF16 = [
    row(2, "bf16 tp2 sp zero1", tp=2, sp=True, precision="bf16"),
    row(2, "bf16 dp2 zero1", precision="bf16"),
    row(2, "bf16 dp2 zero2", precision="bf16", zero__stage=2),
    row(2, "bf16 dp2 zero3", precision="bf16", zero__stage=3),
    row(2, "bf16 pp2", pp=2, precision="bf16"),
    row(2, "bf16 cp2", cp=2, precision="bf16"),
    row(4, "bf16 tp2 pp2", tp=2, pp=2, precision="bf16"),
]
