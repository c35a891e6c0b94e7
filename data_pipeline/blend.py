"""Which source the sample at a position comes from: a formula, exact over any prefix.

S sources, B positions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from transmamba.data_pipeline.errors import DataError

# Samples after which the pattern of a blend repeats, at most.
MAX_PERIOD = 100_000


class Apportionment:
    """A repeating pattern of sources in which every prefix holds each source's share to less than one sample.

    Among the first n samples source i has more than n w_i - 1 and less than n w_i + 1 of them, for every n. One
    period is made by Tijdeman's algorithm for the chairman assignment problem (Discrete Mathematics 32, 1980), in
    integers; its deviation is at most 1 - 1 / (2 S - 2).

    Args:
        units: whole parts of every source, their sum the period.
    """

    def __init__(self, units: Sequence[int]) -> None:
        self.units_S = np.array(units, dtype=np.int64)
        self.period = int(self.units_S.sum())
        self._source_of, self._rank_of = _one_period(units)

    def at(self, positions_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of each position, and how many samples of that source come before it: int64 [B] each."""
        turns_B, inside_B = np.divmod(positions_B, self.period)
        sources_B = self._source_of[inside_B].astype(np.int64)
        return sources_B, turns_B * self.units_S[sources_B] + self._rank_of[inside_B]

    def counts(self, n: int) -> np.ndarray:
        """Samples of every source among the first n: int64 [S]."""
        turns, rest = divmod(n, self.period)
        return turns * self.units_S + np.bincount(self._source_of[:rest], minlength=len(self.units_S))


def _one_period(units: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    period, n_sources = sum(units), len(units)
    used = [i for i in range(n_sources) if units[i]]
    source_of, rank_of = np.empty(period, dtype=np.int32), np.empty(period, dtype=np.int64)
    taken = [0] * n_sources
    spread = max(2 * len(used) - 2, 1)
    for position in range(period):
        best = -1
        best_slack = (0, 1)
        for i in used:
            # Times the period: what the source is owed once this position is given away.
            owed = units[i] * (position + 1) - taken[i] * period
            if owed * spread < period:
                continue
            # Positions until the source would be behind by 1 - 1 / spread, times units[i].
            slack = (period * (spread - 1) - owed * spread, units[i])
            if best < 0 or slack[0] * best_slack[1] < best_slack[0] * slack[1]:
                best, best_slack = i, slack
        source_of[position], rank_of[position] = best, taken[best]
        taken[best] += 1
    return source_of, rank_of


def whole_units(weights: Mapping[str, float], key: str = "data.blend") -> dict[str, int]:
    """The smallest whole numbers in the proportions of the weights, read as the decimals that they are written as.

    Raises:
        DataError: a weight is negative or none is positive, or the pattern would be longer than `MAX_PERIOD`
            samples; the line names weights that are near and fit.
    """
    shares = {
        name: Fraction(repr(weight)) if math.isfinite(weight) else Fraction(-1) for name, weight in weights.items()
    }
    total = sum(shares.values())
    if not shares or min(shares.values()) < 0 or not total:
        raise DataError(key, f"weights {dict(weights)} are negative or all zero", "give one positive weight per source")
    common = math.lcm(*(share.denominator for share in shares.values()))
    units = {name: int(share * common) for name, share in shares.items()}
    divisor = math.gcd(*units.values())
    units = {name: count // divisor for name, count in units.items()}
    if sum(units.values()) > MAX_PERIOD:
        near = {name: max(round(float(share / total), 3), 0.001) if share else 0 for name, share in shares.items()}
        problem = f"weights {dict(weights)} repeat only after {sum(units.values())} samples"
        raise DataError(key, problem, f"use weights with fewer digits, for example {near}")
    return units


@dataclass(frozen=True, slots=True)
class Stage:
    """A blend that holds from sample `first` on."""

    first: int
    weights: Mapping[str, float]


class Blend:
    """Blends one after the other; every source goes on where the stage before left it.

    Args:
        sources: names of all sources, sorted.
        stages: the first begins at sample 0, the others later and later.

    Raises:
        DataError: a stage names no known source, its weights are unusable, or the stages are not in order.
    """

    def __init__(self, sources: Sequence[str], stages: Sequence[Stage]) -> None:
        self.sources = list(sources)
        firsts = [stage.first for stage in stages]
        if not firsts or firsts[0] != 0 or any(one >= other for one, other in itertools.pairwise(firsts)):
            raise DataError("data.stages", f"they begin at samples {firsts}", "begin later from stage to stage")
        self._patterns = []
        for stage in stages:
            unknown = sorted(stage.weights.keys() - set(sources))
            if unknown:
                problem = f"weight for {unknown[0]!r}, which is no source"
                raise DataError("data.blend", problem, f"use {', '.join(self.sources)}")
            units = whole_units(stage.weights)
            self._patterns.append(Apportionment([units.get(name, 0) for name in self.sources]))
        self._firsts = np.array(firsts, dtype=np.int64)
        # Samples of every source before each stage.
        self._before = [np.zeros(len(self.sources), dtype=np.int64)]
        for pattern, (first, end) in zip(self._patterns, itertools.pairwise(firsts), strict=False):
            self._before.append(self._before[-1] + pattern.counts(end - first))

    def at(self, positions_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of each position, and the position in that source's own order: int64 [B] each."""
        stages_B = np.searchsorted(self._firsts, positions_B, side="right") - 1
        sources_B, ranks_B = np.empty_like(positions_B), np.empty_like(positions_B)
        for stage in np.unique(stages_B).tolist():
            inside = stages_B == stage
            found, ranks = self._patterns[stage].at(positions_B[inside] - self._firsts[stage])
            sources_B[inside], ranks_B[inside] = found, ranks + self._before[stage][found]
        return sources_B, ranks_B

    def counts(self, n: int) -> dict[str, int]:
        """Samples of every source among the first n."""
        stage = int(np.searchsorted(self._firsts, max(n - 1, 0), side="right")) - 1
        counts = self._before[stage] + self._patterns[stage].counts(n - int(self._firsts[stage]))
        return dict(zip(self.sources, counts.tolist(), strict=True))
