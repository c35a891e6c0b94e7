"""Threads of one process that fetch shards ahead of their reader."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence

from transmamba.data_pipeline.manifest import Shard

_N_THREADS = 8
# A reader that waits longer is told how far its shard is, and then again and again.
_PATIENT_S, _TELL_EVERY_S = 5.0, 10.0
_MB = 1e6

Fetch = Callable[[Shard, bool, Callable[[int], None]], bool]


class Crew:
    """Up to 8 threads, started when there is work, that end with the process.

    Args:
        fetch: makes a copy of a shard; gets whether it is wanted now, and where to report bytes as they come.
        source: where shards come from, for messages.
    """

    def __init__(self, fetch: Fetch, source: str) -> None:
        self._fetch, self._source = fetch, source
        self._changed = threading.Condition()
        self._queue: list[tuple[Shard, bool]] = []
        self._busy: set[str] = set()
        self._failed: dict[str, Exception] = {}
        self._came: dict[str, int] = {}
        self._n_threads = 0

    def plan(self, shards: Sequence[tuple[Shard, bool]]) -> None:
        """Fetch these shards in this order, and whether each is wanted now, instead of those planned before."""
        with self._changed:
            self._failed.clear()
            self._queue = list(shards)
            self._hire()

    def wait_for(self, shard: Shard) -> None:
        """Wait until a shard has been tried; it goes before all others.

        Raises:
            Exception: what its fetch raised.
        """
        tell_at = time.monotonic() + _PATIENT_S
        with self._changed:
            self._failed.pop(shard.name, None)
            self._queue = [entry for entry in self._queue if entry[0].name != shard.name]
            if shard.name not in self._busy:
                self._queue.insert(0, (shard, True))
                self._hire()
            while shard.name in self._busy or any(entry[0].name == shard.name for entry in self._queue):
                self._changed.wait(1.0)
                if time.monotonic() > tell_at:
                    tell_at = time.monotonic() + _TELL_EVERY_S
                    self._tell(shard)
            error = self._failed.pop(shard.name, None)
        if error is not None:
            raise error

    def _tell(self, shard: Shard) -> None:
        # Another process that fetches it tells its own reader.
        if shard.name in self._came:
            came = min(self._came[shard.name], shard.n_bytes) / _MB
            line = f"waiting for {shard.name} from {self._source}: {came:.0f} of {shard.n_bytes / _MB:.0f} MB"
            print(line, file=sys.stderr, flush=True)

    def _hire(self) -> None:
        wanted = min(_N_THREADS, len(self._queue) + len(self._busy))
        for _ in range(self._n_threads, wanted):
            # Not joined at exit: a process that ends does not wait for a transfer.
            threading.Thread(target=self._work, name="shards", daemon=True).start()
        self._n_threads = max(self._n_threads, wanted)
        self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._queue:
                    self._changed.wait()
                shard, is_urgent = self._queue.pop(0)
                if shard.name in self._busy:
                    continue
                self._busy.add(shard.name)
            error = self._try(shard, is_urgent)
            with self._changed:
                self._busy.remove(shard.name)
                self._came.pop(shard.name, None)
                if error is not None:
                    self._failed[shard.name] = error
                self._changed.notify_all()

    def _try(self, shard: Shard, is_urgent: bool) -> Exception | None:
        def on_bytes(n_bytes: int) -> None:
            self._came[shard.name] = self._came.get(shard.name, 0) + n_bytes

        try:
            self._fetch(shard, is_urgent, on_bytes)
        except Exception as error:  # it is raised where the shard is waited for
            return error
        return None
