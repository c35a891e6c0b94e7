"""The training stream: windows of one source or of several in a blend, a pure function of the position.

B windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from transmamba.data_pipeline.blend import Blend, Stage
from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.stream import Stream, Windows
from transmamba.data_pipeline.tokens import Places

# Positions that are looked up at once, at least and at most: a permutation costs about as much for one as for
# hundreds, but an epoch of few windows needs one of its own.
_LEAST_CHUNK, _MOST_CHUNK = 16, 16384


@dataclass(frozen=True, slots=True)
class Sample:
    """Where the window at one position comes from: a line of the ledger."""

    position: int
    source: str
    epoch: int
    window: int
    shard: str
    token: int
    """Index of its first token in the shard."""


@dataclass(frozen=True, slots=True)
class _Lookup:
    """Consecutive positions: of each its source, its position in the source's order, and its window's place."""

    sources: np.ndarray
    ranks: np.ndarray
    numbers: np.ndarray
    places: Places


class Mixture:
    """Windows in training order over all sources.

    Args:
        streams: by name, all of the same seq_len and tokenizer.
        stages: their blend; not given, the only stream.

    Raises:
        DataError: the blend is unusable.
    """

    def __init__(self, streams: Mapping[str, Stream], stages: Sequence[Stage] = ()) -> None:
        self.streams = dict(sorted(streams.items()))
        self._list = list(self.streams.values())
        self.seq_len = self._list[0].seq_len
        self.eod_id = self._list[0].store.eod_id
        self.blend = Blend(list(self.streams), stages or [Stage(0, dict.fromkeys(self.streams, 1.0))])
        n_windows = sum(stream.n_windows for stream in self._list)
        self._chunk = min(max(n_windows, _LEAST_CHUNK), _MOST_CHUNK)
        self._lookups: dict[int, _Lookup] = {}
        self._dtype = np.result_type(*(stream.store.dtype for stream in self._list))

    def rows(self, first: int, count: int) -> Windows:
        """Windows at positions `first` to `first + count`: the same for whoever asks, whenever.

        Raises:
            DataError: a source is shorter than one window.
            DamagedData: a block does not match its digest.
        """
        # The document ends are searched in the narrow tokens, which is quicker.
        return Windows.of_tokens(self._narrow(first, count), self.eod_id)

    def tokens(self, first: int, count: int) -> np.ndarray:
        """Only the tokens of these windows: int64 [B, seq_len + 1].

        Raises:
            DataError, DamagedData: as `rows`.
        """
        return self._narrow(first, count).astype(np.int64)

    def samples(self, first: int, count: int) -> list[Sample]:
        """The origin of the windows at positions `first` to `first + count`."""
        found = []
        for position in range(first, first + count):
            lookup, i = self._lookup(position // self._chunk), position % self._chunk
            source, number = int(lookup.sources[i]), int(lookup.numbers[i])
            stream = self._list[source]
            shard = int(lookup.places.shards[i])
            token = number * stream.seq_len - int(stream.store.shard_first_tokens[shard])
            name, epoch = stream.store.split.shards[shard].name, int(lookup.ranks[i]) // stream.n_windows
            found.append(Sample(position, self.blend.sources[source], epoch, number, name, token))
        return found

    def epochs(self, n_samples: int) -> dict[str, float]:
        """How often each source is passed over by the first `n_samples`."""
        counts = self.blend.counts(n_samples)
        return {name: counts[name] / max(stream.n_windows, 1) for name, stream in self.streams.items()}

    def _narrow(self, first: int, count: int) -> np.ndarray:
        """The tokens of these windows in the stored dtype; of the widest source, if there are several."""
        parts = []
        while count:
            index, inside = divmod(first, self._chunk)
            n_rows = min(self._chunk - inside, count)
            parts.append(self._gather(self._lookup(index), inside, n_rows))
            first, count = first + n_rows, count - n_rows
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _gather(self, lookup: _Lookup, first: int, count: int) -> np.ndarray:
        if len(self._list) == 1:
            self._list[0].approach(int(lookup.ranks[first]))
            return self._list[0].store.gather(lookup.places.pick(slice(first, first + count)))
        sources_B = lookup.sources[first : first + count]
        out_BT = np.empty((count, self.seq_len + 1), dtype=self._dtype)
        for source in np.unique(sources_B).tolist():
            stream, own = self._list[source], np.flatnonzero(sources_B == source)
            stream.approach(int(lookup.ranks[first + own[0]]))
            out_BT[own] = stream.store.gather(lookup.places.pick(first + own))
        return out_BT

    def _lookup(self, index: int) -> _Lookup:
        if index < 0:
            raise ValueError("a position may not be negative")
        if index not in self._lookups:
            positions = np.arange(index * self._chunk, (index + 1) * self._chunk)
            if len(self._list) == 1:
                sources, ranks = np.zeros_like(positions), positions
                numbers, places = self._locate(0, ranks)
            else:
                sources, ranks = self.blend.at(positions)
                numbers, places = self._locate_all(sources, ranks)
            self._lookups = {known: found for known, found in self._lookups.items() if abs(known - index) == 1}
            self._lookups[index] = _Lookup(sources, ranks, numbers, places)
        return self._lookups[index]

    def _locate_all(self, sources: np.ndarray, ranks: np.ndarray) -> tuple[np.ndarray, Places]:
        parts = []
        for source in np.unique(sources).tolist():
            own = np.flatnonzero(sources == source)
            parts.append((own, *self._locate(source, ranks[own])))
        orders, numbers, places = zip(*parts, strict=True)
        back = np.argsort(np.concatenate(orders), kind="stable")
        joined = Places(*(np.concatenate(columns) for columns in zip(*places, strict=True)))
        return np.concatenate(numbers)[back], joined.pick(back)

    def _locate(self, source: int, ranks: np.ndarray) -> tuple[np.ndarray, Places]:
        stream = self._list[source]
        try:
            numbers = stream.window_numbers(ranks)
        except DataError as error:
            raise DataError(f"source {self.blend.sources[source]}", error.problem, error.fix) from error
        return numbers, stream.locate(numbers)
