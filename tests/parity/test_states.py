"""The training state in and out of layouts, and copies of it that drift."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity import rig
from tests.parity.forkserver import run
from tests.parity.job import drifting_job, saving_job
from tests.parity.matrix import row
from tests.parity.test_layouts import LOSS_TOLERANCE, relative

pytestmark = pytest.mark.xdist_group("ranks")
AT, LAST = 3, 7  # four steps after the resumption: lost moments do not show in the first

TP2, DP2_ZERO3 = row(2, "tp2", tp=2), row(2, "dp2 zero3", zero__stage=3)
TP2_PP2, ONE = row(4, "tp2 pp2", tp=2, pp=2), row(1, "one rank", zero__stage=1)
CP2_DP2, TP2_DP2 = row(4, "cp2 dp2 zero2", cp=2, zero__stage=2), row(4, "tp2 dp2 zero1", tp=2)
DP2_BF16 = row(2, "dp2 zero1 bf16", precision="bf16")

PAIRS = [
    pytest.param(TP2, TP2, id="tp2-itself"),
    pytest.param(TP2, DP2_ZERO3, id="tp2-dp2zero3"),
    pytest.param(TP2_PP2, TP2_PP2, id="tp2pp2-itself", marks=pytest.mark.long),
    pytest.param(TP2_PP2, ONE, id="tp2pp2-one", marks=pytest.mark.long),
    pytest.param(ONE, TP2_PP2, id="one-tp2pp2", marks=pytest.mark.long),
    pytest.param(DP2_ZERO3, CP2_DP2, id="dp2zero3-cp2dp2zero2", marks=pytest.mark.long),
    pytest.param(CP2_DP2, CP2_DP2, id="cp2dp2zero2-itself", marks=pytest.mark.long),
    pytest.param(TP2_DP2, TP2_DP2, id="tp2dp2zero1-itself", marks=pytest.mark.long),
    pytest.param(DP2_ZERO3, DP2_ZERO3, id="dp2zero3-itself", marks=pytest.mark.long),
    pytest.param(DP2_BF16, DP2_BF16, id="bf16dp2-itself", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("saved", "resumed"), PAIRS)
def test_training_goes_on_in_any_layout(saved: Any, resumed: Any, tmp_path: Path) -> None:
    whole = rig.merge(run(saved.ranks, saving_job, saved.options, tmp_path, 0, LAST, AT))
    after = rig.merge(run(resumed.ranks, saving_job, resumed.options, tmp_path, AT, LAST, -1))
    if saved == resumed:
        assert (after.losses, after.norms) == (whole.losses[AT:], whole.norms[AT:])
        masters = after.whole("master")
        assert all(torch.equal(master, masters[name]) for name, master in whole.whole("master").items())
    else:
        assert relative(after.losses, whole.losses[AT:]) <= LOSS_TOLERANCE
        assert relative(after.norms, whole.norms[AT:]) <= resumed.norm_tolerance


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (row(2, "tp2", tp=2), "layers.1.norm.weight"),
        (row(2, "dp2", zero__stage=1), "layers.2.mixer.qkv.weight"),
        (row(2, "cp2", cp=2), "layers.3.mixer.dt.weight"),
    ],
    ids=["tp", "dp", "cp"],
)
def test_one_flipped_bit_names_weight_and_ranks(layout: Any, name: str) -> None:
    for drifts in run(layout.ranks, drifting_job, layout.options, 1, name):
        assert [(drift.name, drift.ranks) for drift in drifts] == [(name, [0, 1])]  # two ranks have no majority


@pytest.mark.long
def test_of_many_replicas_the_odd_one_is_named() -> None:
    name = "layers.2.mixer.qkv.weight"
    for drifts in run(4, drifting_job, row(4, "dp4").options, 2, name):
        assert [(drift.name, drift.ranks) for drift in drifts] == [(name, [2])]
