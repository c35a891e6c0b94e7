"""N ranks train to the numbers of one: losses, gradient norms and every gradient by global name."""

import time
from functools import cache
from typing import Any

import pytest
import torch

from tests.parity import rig
from tests.parity.forkserver import run
from tests.parity.job import job
from tests.parity.matrix import BF16, ROWS, Row

# One worker runs all jobs of several ranks: two at once would only wait for each other.
pytestmark = pytest.mark.xdist_group("ranks")
N_STEPS = 20
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 1e-5  # relative; the second per tensor, L2
BF16_LOSS_BAND, BF16_NORM_BAND = 1e-2, 5e-2  # of the fp32 numbers of one rank
LAYOUT_KEYS = ("parallel__", "zero__", "train__")


@cache
def _golden(model: tuple[tuple[str, Any], ...]) -> rig.Trained:
    """One rank with plain AdamW, in a process of its own."""
    return rig.merge(run(1, job, {**dict(model), "zero__stage": 0}, N_STEPS))


def golden(options: dict[str, Any]) -> rig.Trained:
    """What one rank makes of the same model and data."""
    model = {key: value for key, value in options.items() if not key.startswith(LAYOUT_KEYS) and key != "precision"}
    return _golden(tuple(sorted(model.items())))


def relative(found: list[float], wanted: list[float]) -> float:
    """Largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))


def gradient_errors(found: rig.Trained, wanted: rig.Trained, options: dict[str, Any]) -> dict[str, float]:
    """Relative L2 error of every gradient; what must be exactly zero and is not counts as infinite."""
    config = rig.config_of(**options)
    ours, theirs = rig.gradients(found, config), rig.gradients(wanted, config)
    assert ours.keys() == theirs.keys()
    errors = {}
    for name, gradient in theirs.items():
        size = gradient.norm()
        error = (ours[name] - gradient).norm()
        errors[name] = float(error / size) if size > 0 else (float("inf") if error > 0 else 0.0)
    return errors


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.name, marks=[] if row.is_quick else pytest.mark.long) for row in ROWS]
)
def test_layout_equals_one_rank(row: Row, layout_report: dict[str, dict[str, Any]]) -> None:
    wanted = golden(row.options)
    started = time.monotonic()
    found = rig.merge(run(row.ranks, job, row.options, N_STEPS))
    seconds = time.monotonic() - started
    loss, norm = relative(found.losses, wanted.losses), relative(found.norms, wanted.norms)
    errors = gradient_errors(found, wanted, row.options)
    worst = max(errors, key=errors.__getitem__)
    layout_report[row.says] = {
        "ranks": row.ranks,
        "loss": loss,
        "norm": norm,
        "gradient": errors[worst],
        "worst": worst,
        "seconds": round(seconds, 1),
    }
    summary = f"loss {loss:.1e}, norm {norm:.1e}, gradient of {worst} {errors[worst]:.1e}"
    assert loss <= LOSS_TOLERANCE and norm <= row.norm_tolerance and errors[worst] <= GRADIENT_TOLERANCE, summary
    assert min(wanted.norms) > rig.config_of().optim.clip  # pyright: ignore[reportOperatorIssue]  # clipping is active


@pytest.mark.long
@pytest.mark.parametrize("row", BF16, ids=lambda row: row.name)
def test_bf16_stays_in_its_band(row: Row, layout_report: dict[str, dict[str, Any]]) -> None:
    wanted = golden(row.options)
    found = rig.merge(run(row.ranks, job, row.options, N_STEPS))
    loss, norm = relative(found.losses, wanted.losses), relative(found.norms, wanted.norms)
    layout_report[row.says] = {"ranks": row.ranks, "loss": loss, "norm": norm}
    assert loss < BF16_LOSS_BAND and norm < BF16_NORM_BAND, f"loss {loss:.1e}, norm {norm:.1e}"


def test_same_layout_same_bits() -> None:
    options = {"parallel__tp": 2, "parallel__sp": True}
    first, second = (rig.merge(run(2, job, options, 4)) for _ in range(2))
    assert (first.losses, first.norms) == (second.losses, second.norms)
    masters = second.whole("master")
    assert all(torch.equal(master, masters[name]) for name, master in first.whole("master").items())
