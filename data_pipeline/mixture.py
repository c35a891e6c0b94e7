"""The training stream: windows of one source or of several in a blend, a pure function of the position.

B windows, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from transmamba.data_pipeline.blend import Blend, Stage
from transmamba.data_pipeline.errors import DataError
from transmamba.data_pipeline.stream import Stream, Windows
from transmamba.data_pipeline.tokens import Places

# Positions that are looked up at once, at least and at most: a permutation costs about as much for one as for
# hundreds, but every epoch needs one of its own, so a chunk passes over no source more than about so many times.
_LEAST_CHUNK, _MOST_CHUNK, _MOST_EPOCHS = 16, 16384, 16


class Length(NamedTuple):
    """Windows have `seq_len` tokens from sample `first` on."""

    first: int
    seq_len: int


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

    Attributes:
        first: the sample that windows of this length begin with.

    Raises:
        DataError: the blend is unusable.
    """

    def __init__(self, streams: Mapping[str, Stream], stages: Sequence[Stage] = ()) -> None:
        self.blend = Blend(sorted(streams), stages or [Stage(0, dict.fromkeys(streams, 1.0))])
        self._read_from(streams, 0, [0] * len(streams))

    def _read_from(self, streams: Mapping[str, Stream], first: int, positions: Sequence[int]) -> None:
        """Begin with sample `first`, and in every source at a position of its order."""
        self.first = first
        self.streams = dict(sorted(streams.items()))
        self._list = list(self.streams.values())
        self.seq_len = self._list[0].seq_len
        self.eod_id = self._list[0].store.eod_id
        fewest = min(stream.n_windows for stream in self._list)
        self._chunk = min(max(_MOST_EPOCHS * fewest, _LEAST_CHUNK), _MOST_CHUNK)
        self._lookups: dict[int, _Lookup] = {}
        self._dtype = np.result_type(*(stream.store.dtype for stream in self._list))
        # What the blend counts from sample 0 on lies so much further in a source's order.
        self._ahead = np.array(positions, dtype=np.int64) - self._counts(first)

    def following(self, lengths: Sequence[Length]) -> Mixture:
        """The same data in windows of the last length, for a run whose windows had these lengths one after the other.

        Sources and their shares stay what they are for every sample; each source goes on in its order of the new
        windows where `Stream.position_after` says. Samples before the last length's first are out of reach.

        Args:
            lengths: the first begins at sample 0, the others later and later.

        Raises:
            DataError: a source was shorter than one of these windows.
        """
        streams, positions = self._in_windows_of(lengths[0].seq_len), [0] * len(self.streams)
        for before, now in pairwise(lengths):
            read = self._counts(now.first) - self._counts(before.first)
            streams = self._in_windows_of(now.seq_len)
            positions = [
                stream.position_after(position + n_windows, before.seq_len)
                for stream, position, n_windows in zip(streams.values(), positions, read.tolist(), strict=True)
            ]
        other = copy(self)
        other._read_from(streams, lengths[-1].first, positions)
        return other

    def _in_windows_of(self, seq_len: int) -> dict[str, Stream]:
        return {name: stream.in_windows_of(seq_len) for name, stream in self.streams.items()}

    def _counts(self, n_samples: int) -> np.ndarray:
        return np.array(list(self.blend.counts(n_samples).values()), dtype=np.int64)

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
            index, i = divmod(position - self.first, self._chunk)
            lookup = self._lookup(index)
            source, number = int(lookup.sources[i]), int(lookup.numbers[i])
            stream = self._list[source]
            shard = int(lookup.places.shards[i])
            token = number * stream.seq_len - int(stream.store.shard_first_tokens[shard])
            name, epoch = stream.store.split.shards[shard].name, int(lookup.ranks[i]) // stream.n_windows
            found.append(Sample(position, self.blend.sources[source], epoch, number, name, token))
        return found

    def at(self, positions_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of the sample at each position, and its position in that source's own order: int64 [B] each."""
        if len(self._list) == 1:
            return np.zeros_like(positions_B), positions_B + self._ahead[0]
        sources_B, ranks_B = self.blend.at(positions_B)
        return sources_B, ranks_B + self._ahead[sources_B]

    def epochs(self, n_samples: int) -> dict[str, float]:
        """How often each source is passed over by the first `n_samples`, which is `first` or more."""
        positions = (self._counts(n_samples) + self._ahead).tolist()
        named = zip(self.streams.items(), positions, strict=True)
        return {name: position / max(stream.n_windows, 1) for (name, stream), position in named}

    def _narrow(self, first: int, count: int) -> np.ndarray:
        """The tokens of these windows in the stored dtype; of the widest source, if there are several."""
        parts = []
        while count:
            index, inside = divmod(first - self.first, self._chunk)
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
            raise ValueError(f"a position may not be negative, nor before sample {self.first}")
        if index not in self._lookups:
            positions = self.first + np.arange(index * self._chunk, (index + 1) * self._chunk)
            sources, ranks = self.at(positions)
            is_alone = len(self._list) == 1
            numbers, places = self._locate(0, ranks) if is_alone else self._locate_all(sources, ranks)
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
