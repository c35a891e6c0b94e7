"""The everyday layouts notice every fault of `mutations.py`: a suite that cannot fail proves nothing."""

from pathlib import Path

import pytest

from tests.parity import rig
from tests.parity.forkserver import run
from tests.parity.matrix import ROWS
from tests.parity.mutated import mutated_job
from tests.parity.mutations import MUTATIONS, Mutation
from tests.parity.test_layouts import (
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    golden,
    gradient_errors,
    relative,
)

N_STEPS = 3
QUICK = {row.name: row for row in ROWS if row.is_quick}


def test_every_fault_has_its_place_in_the_source() -> None:
    for mutation in MUTATIONS:
        source = Path(*mutation.module.split(".")).with_suffix(".py").read_text()
        assert source.count(mutation.old) == 1, mutation.name


@pytest.mark.long
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name.replace(" ", "-"))
def test_fault_is_noticed(mutation: Mutation) -> None:
    row = QUICK[mutation.row]
    wanted = golden(row.options)
    try:
        found = rig.merge(run(row.ranks, mutated_job, mutation, row.options, N_STEPS, limit_s=60))
        errors = gradient_errors(found, wanted, row.options)
    except AssertionError as error:
        # A rank failed at its work, the ranks contradict each other, or what they hold is no whole model; not being
        # able to begin is no finding.
        assert not any(word in str(error) for word in ("LookupError", "ImportError", "a rank died")), error
        return
    assert (
        relative(found.losses, wanted.losses[:N_STEPS]) > LOSS_TOLERANCE
        or relative(found.norms, wanted.norms[:N_STEPS]) > row.norm_tolerance
        or max(errors.values()) > GRADIENT_TOLERANCE
    )


@pytest.mark.long
def test_without_a_fault_nothing_is_noticed() -> None:
    """The same way of running, with an edit that changes nothing."""
    mutation = Mutation(
        "none", "tp2", "transmamba.parallel.shards", "WHOLE = Shards()", "WHOLE = Shards()  # as it was"
    )
    row = QUICK[mutation.row]
    found = rig.merge(run(row.ranks, mutated_job, mutation, row.options, N_STEPS))
    assert relative(found.losses, golden(row.options).losses[:N_STEPS]) <= LOSS_TOLERANCE
    assert relative(found.norms, golden(row.options).norms[:N_STEPS]) <= row.norm_tolerance
