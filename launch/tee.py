"""What a process says, copied to the screen and into files while it runs."""

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

_PIECE = 65536
_MAX_HELD = 1 << 20


class Copier:
    """Copies the two streams of a process, each to its own screen (None for none) and both to all `files`.

    A file is written from when its folder exists, with what was said before: a run that refuses to start must not
    leave a folder behind.
    """

    def __init__(self, screens: tuple[IO[bytes] | None, IO[bytes] | None], files: Sequence[Path]):
        self._screens = list(screens)
        self._held = dict.fromkeys(files, b"")
        self._open: dict[Path, IO[bytes]] = {}
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def start(self, out: IO[bytes], error: IO[bytes]) -> None:
        """Begin to read both streams to their ends."""
        for index, stream in enumerate((out, error)):
            thread = threading.Thread(target=self._copy, args=(stream, index), name="copier", daemon=True)
            thread.start()
            self._threads.append(thread)

    def finish(self, patience_s: float) -> None:
        """Wait for the ends of the streams: whoever inherited them may go on speaking for `patience_s` each."""
        for thread in self._threads:
            thread.join(patience_s)
        self._keep(b"")
        with self._lock:
            for file in self._open.values():
                file.close()
            self._open.clear()
            self._held.clear()

    def _copy(self, stream: IO[bytes], index: int) -> None:
        rest = b""
        while piece := os.read(stream.fileno(), _PIECE):
            self._show(piece, index)
            # Whole lines, so that the two streams do not mix within one.
            lines, newline, rest = (rest + piece).rpartition(b"\n")
            self._keep(lines + newline)
        self._keep(rest)
        stream.close()

    def _keep(self, text: bytes) -> None:
        with self._lock:
            for path in self._held:
                self._write(path, text)

    def _show(self, piece: bytes, index: int) -> None:
        screen = self._screens[index]
        if screen is None:
            return
        try:
            screen.write(piece)
            screen.flush()
        except (OSError, ValueError):  # nobody reads any more; the run goes on
            self._screens[index] = None

    def _write(self, path: Path, piece: bytes) -> None:
        self._held[path] = (self._held[path] + piece)[-_MAX_HELD:]
        with suppress(OSError):  # a full disk is the run's affair
            if path not in self._open:
                if not path.parent.is_dir():
                    return
                self._open[path] = path.open("ab", buffering=0)
            self._open[path].write(self._held[path])
        self._held[path] = b""
