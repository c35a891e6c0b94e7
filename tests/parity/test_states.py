"""The training state in and out of layouts, and copies of it that drift."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity import rig
from tests.parity.forkserver import run
from tests.parity.job import drifting_job, saving_job
from tests.parity.jobs_states import trip_job
from tests.parity.matrix import row
from tests.parity.test_layouts import LOSS_TOLERANCE, relative
from transmamba.checkpoint import directory_of, read

pytestmark = pytest.mark.xdist_group("ranks")
AT, LAST = 3, 7  # four steps after the resumption: lost moments do not show in the first

LAYOUTS = {
    line.name: line
    for line in (
        row(1, "one", zero__stage=1),
        row(2, "dp2 zero0", zero__stage=0),
        row(2, "dp2 zero1", zero__stage=1),
        row(2, "dp2 zero2", zero__stage=2),
        row(2, "dp2 zero3", zero__stage=3),
        row(2, "tp2", tp=2),
        row(2, "pp2 vpp2", pp=2, vpp=2),
        row(4, "tp2 pp2", tp=2, pp=2),
        row(4, "cp2 dp2 zero2", cp=2, zero__stage=2),
        row(4, "tp2 dp2 zero1", tp=2, zero__stage=1),
        row(2, "bf16 dp2 zero1", precision="bf16", zero__stage=1),
        row(2, "bf16 dp2 zero3", precision="bf16", zero__stage=3),
    )
}
DAILY = {("tp2", "tp2"), ("tp2", "dp2-zero3"), ("dp2-zero3", "pp2-vpp2"), ("pp2-vpp2", "one")}
PAIRS = [
    pytest.param(
        saved, resumed, id=f"{saved}-to-{resumed}", marks=() if (saved, resumed) in DAILY else pytest.mark.long
    )
    for saved, resumed in itertools.product(LAYOUTS, LAYOUTS)
    if saved.startswith("bf16") == resumed.startswith("bf16")
]
Whole = Callable[[str], tuple[Path, Any]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The uninterrupted job of a layout and where it saved, trained once."""
    done: dict[str, tuple[Path, Any]] = {}

    def of(name: str) -> tuple[Path, Any]:
        if name not in done:
            layout, folder = LAYOUTS[name], tmp_path_factory.mktemp(name)
            trained = rig.merge(run(layout.ranks, saving_job, layout.options, folder, 0, LAST, AT))
            done[name] = folder, trained
        return done[name]

    return of


@pytest.mark.parametrize(("saved", "resumed"), PAIRS)
def test_the_state_of_any_layout_goes_on_in_any_other(saved: str, resumed: str, whole: Whole, tmp_path: Path) -> None:
    layout, (folder, reference) = LAYOUTS[resumed], whole(saved)
    after = rig.merge(run(layout.ranks, trip_job, layout.options, folder, tmp_path, AT, LAST))
    before, again = (read(directory_of(place, AT)) for place in (folder, tmp_path))
    assert before.tensors.keys() == again.tensors.keys()
    assert [key for key, values in before.tensors.items() if not torch.equal(values, again.tensors[key])] == []
    if saved == resumed:
        assert (after.losses, after.norms) == (reference.losses[AT:], reference.norms[AT:])
        masters = after.whole("master")
        assert all(torch.equal(master, masters[name]) for name, master in reference.whole("master").items())
    elif saved.startswith("bf16"):  # another ZeRO class rounds elsewhere
        assert relative(after.losses, reference.losses[AT:]) <= 5e-4
    else:
        assert relative(after.losses, reference.losses[AT:]) <= LOSS_TOLERANCE
        assert relative(after.norms, reference.norms[AT:]) <= layout.norm_tolerance


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
