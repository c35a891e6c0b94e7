"""Threads of one process that fetch shards ahead of their reader."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Sequence

from transmamba.data_pipeline.manifest import Shard
from transmamba.data_pipeline.remote import Unreachable

_N_THREADS = 8
# A reader that waits longer is told how far its shard is, and then again and again.
_PATIENT_S, _TELL_EVERY_S = 5.0, 30.0
# A fetch that gives no sign for longer waits for something else than the store. What opens S3 tries a silent server
# for many minutes before it says so.
_SILENT_S = 900.0
_MB = 1e6


class Transfer:
    """How far a fetch is: `came` counts bytes, None while another process has the shard; `at` is its last sign."""

    def __init__(self) -> None:
        self.came: int | None = None
        self.at = time.monotonic()

    def add(self, n_bytes: int) -> None:
        """So many more bytes came; 0 when an attempt begins."""
        self.came = (self.came or 0) + n_bytes
        self.at = time.monotonic()

    def stir(self) -> None:
        """It still goes on."""
        self.at = time.monotonic()


Fetch = Callable[[Shard, bool, Transfer], bool]


class Crew:
    """Up to 8 threads, started when there is work, that end with the process.

    Args:
        fetch: makes a copy of a shard; gets whether it is wanted now, and where to report how far it is.
        source: where shards come from, for messages.
    """

    def __init__(self, fetch: Fetch, source: str) -> None:
        self._fetch, self._source = fetch, source
        self._changed = threading.Condition()
        self._queue: list[tuple[Shard, bool]] = []
        self._busy: set[str] = set()
        self._failed: dict[str, Exception] = {}
        # Those that the store was away for; asked again once it gives anything.
        self._missed: dict[str, tuple[Shard, bool]] = {}
        self._transfers: dict[str, Transfer] = {}
        self._n_threads = 0

    def plan(self, shards: Sequence[tuple[Shard, bool]]) -> None:
        """Fetch these shards in this order, and whether each is wanted now, instead of those planned before."""
        with self._changed:
            self._failed.clear()
            self._missed.clear()
            self._queue = list(shards)
            self._hire()

    def wait_for(self, shard: Shard, on_wait: Callable[[], None]) -> None:
        """Wait until a shard has been tried; it goes before all others.

        Args:
            shard: to wait for.
            on_wait: called about once a second while its transfer goes on or is tried.

        Raises:
            Exception: what its fetch raised.
        """
        tell_at = time.monotonic() + _PATIENT_S
        with self._changed:
            self._failed.pop(shard.name, None)
            self._missed.pop(shard.name, None)
            self._queue = [entry for entry in self._queue if entry[0].name != shard.name]
            if shard.name not in self._busy:
                self._queue.insert(0, (shard, True))
                self._hire()
            while shard.name in self._busy or any(entry[0].name == shard.name for entry in self._queue):
                self._changed.wait(1.0)
                if self._is_tried(shard):
                    on_wait()
                if time.monotonic() > tell_at:
                    tell_at = time.monotonic() + _TELL_EVERY_S
                    self._tell(shard)
            error = self._failed.pop(shard.name, None)
        if error is not None:
            raise error

    def rest(self) -> None:
        """Fetch nothing more, and wait for the end of what is on its way."""
        with self._changed:
            while self._busy or self._queue:
                self._queue.clear()
                self._missed.clear()
                self._changed.wait(1.0)

    def _is_tried(self, shard: Shard) -> bool:
        """Whether a shard, or before it others, are on their way as far as anybody can tell."""
        own = self._transfers.get(shard.name)
        return any(time.monotonic() - each.at < _SILENT_S for each in ([own] if own else self._transfers.values()))

    def _tell(self, shard: Shard) -> None:
        transfer = self._transfers.get(shard.name)
        if transfer is not None:
            how = "another process fetches it"
            if transfer.came is not None:
                how = f"{min(transfer.came, shard.n_bytes) / _MB:.0f} of {shard.n_bytes / _MB:.0f} MB"
            print(f"waiting for {shard.name} from {self._source}: {how}", file=sys.stderr, flush=True)

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
                transfer = self._transfers[shard.name] = Transfer()
            error = self._try(shard, is_urgent, transfer)
            with self._changed:
                self._busy.remove(shard.name)
                del self._transfers[shard.name]
                if error is None:
                    self._ask_again()
                else:
                    self._failed[shard.name] = error
                    if isinstance(error, Unreachable):
                        self._missed[shard.name] = (shard, is_urgent)
                self._changed.notify_all()

    def _ask_again(self) -> None:
        queued = {shard.name for shard, _ in self._queue} | self._busy
        again = {name: entry for name, entry in self._missed.items() if name not in queued}
        self._queue += again.values()
        for name in again:
            self._failed.pop(name, None)
        self._missed.clear()
        self._hire()

    def _try(self, shard: Shard, is_urgent: bool, transfer: Transfer) -> Exception | None:
        try:
            self._fetch(shard, is_urgent, transfer)
        except Exception as error:  # it is raised where the shard is waited for
            return error
        return None
