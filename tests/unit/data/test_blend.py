"""Every prefix of a blend holds each source's share to within one sample; stages go on where the last one ended."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transmamba.data_pipeline.blend import MAX_PERIOD, Apportionment, Blend, Stage, whole_units
from transmamba.data_pipeline.errors import DataError


@settings(max_examples=200, derandomize=True, deadline=None)
@given(units=st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(any), first=st.integers(0, 10**12))
def test_every_prefix_is_within_one_sample_of_every_share(units: list[int], first: int) -> None:
    pattern = Apportionment(units)
    n = 2 * pattern.period + 7
    sources, ranks = pattern.at(np.arange(n))
    counts = np.cumsum(np.eye(len(units), dtype=np.int64)[sources], axis=0)
    for i, unit in enumerate(units):
        owed = [Fraction(unit * k, pattern.period) for k in range(1, n + 1)]
        assert all(abs(count - share) < 1 for count, share in zip(counts[:, i].tolist(), owed, strict=True))
        assert np.array_equal(ranks[sources == i], np.arange(counts[-1, i]))
        assert pattern.counts(n)[i] == counts[-1, i]
    # Far out, the formula is the pattern moved by whole periods.
    turns, inside = divmod(first, pattern.period)
    far_sources, far_ranks = pattern.at(np.array([first]))
    assert far_sources[0] == sources[inside]
    assert far_ranks[0] == ranks[inside] + turns * units[far_sources[0]]


@pytest.mark.parametrize(
    ("weights", "units"),
    [
        ({"a": 0.5, "b": 0.3, "c": 0.2}, {"a": 5, "b": 3, "c": 2}),
        ({"a": 1.0}, {"a": 1}),
        ({"a": 2.0, "b": 0.0}, {"a": 1, "b": 0}),
        ({"a": 0.1, "b": 0.2}, {"a": 1, "b": 2}),
        ({"a": 70.0, "b": 12.5, "c": 17.5}, {"a": 28, "b": 5, "c": 7}),
        ({"a": 1e-05, "b": 0.99999}, {"a": 1, "b": 99_999}),
    ],
)
def test_weights_are_read_as_the_decimals_they_are_written_as(weights: dict[str, float], units: dict[str, int]) -> None:
    assert whole_units(weights) == units


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"a": -0.1, "b": 1.0}, "negative or all zero"),
        ({"a": 0.0}, "negative or all zero"),
        ({}, "negative or all zero"),
        ({"a": float("nan")}, "negative or all zero"),
        ({"a": float("inf")}, "negative or all zero"),
        ({"a": 0.12345678, "b": 0.5}, "repeat only after"),
        ({"a": 0.12345678, "b": 0.0, "c": 1e-9}, "repeat only after"),
    ],
)
def test_unusable_weights_are_refused_with_a_remedy(weights: dict[str, float], words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        whole_units(weights)
    if "repeat" in words:
        near = eval_dict(caught.value.fix)
        assert sum(whole_units(near).values()) <= MAX_PERIOD
        assert [near[name] > 0 for name in weights] == [weight > 0 for weight in weights.values()]


def eval_dict(fix: str) -> dict[str, float]:
    """The weights that a refusal proposes."""
    inner = fix.split("{")[1].split("}")[0]
    return {part.split(":")[0].strip(" '"): float(part.split(":")[1]) for part in inner.split(",")}


@settings(max_examples=100, derandomize=True, deadline=None)
@given(data=st.data())
def test_a_source_goes_on_where_the_stage_before_left_it(data: st.DataObject) -> None:
    names = ["a", "b", "c"]
    firsts = [0, *sorted(data.draw(st.sets(st.integers(1, 300), max_size=3)))]
    weights = st.fixed_dictionaries({name: st.integers(0, 9).map(float) for name in names}).filter(
        lambda found: any(found.values())
    )
    stages = [Stage(first, data.draw(weights)) for first in firsts]
    blend = Blend(names, stages)
    sources, ranks = blend.at(np.arange(500))
    for i in range(3):
        assert np.array_equal(ranks[sources == i], np.arange(np.count_nonzero(sources == i)))
    for n in (0, 1, 17, *firsts, 499):
        assert blend.counts(n) == {name: np.count_nonzero(sources[:n] == i) for i, name in enumerate(names)}
    for stage, end in zip(stages, [*firsts[1:], 500], strict=True):
        total = sum(stage.weights.values())
        found = np.bincount(sources[stage.first : end], minlength=3)
        for i, name in enumerate(names):
            assert abs(found[i] - (end - stage.first) * stage.weights[name] / total) < 1
    # Any part asked for alone is the same part.
    low, high = sorted(data.draw(st.tuples(st.integers(0, 499), st.integers(0, 499))))
    assert np.array_equal(blend.at(np.arange(low, high))[0], sources[low:high])


@pytest.mark.parametrize("firsts", [[1], [0, 5, 5], [0, 9, 4], []])
def test_stages_out_of_order_are_refused(firsts: list[int]) -> None:
    with pytest.raises(DataError, match=r"data\.stages"):
        Blend(["a"], [Stage(first, {"a": 1.0}) for first in firsts])


def test_a_weight_for_an_unknown_source_is_refused() -> None:
    with pytest.raises(DataError, match="weight for 'b', which is no source; use a"):
        Blend(["a"], [Stage(0, {"a": 1.0, "b": 1.0})])
