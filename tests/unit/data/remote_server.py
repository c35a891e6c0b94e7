"""A local HTTP server of one folder that fails as told and counts what it was asked for."""

from __future__ import annotations

import contextlib
import http.server
import socket
import struct
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

PAGE = b"<!DOCTYPE html>\n<html><title>Log in</title></html>\n" * 99


class FaultyServer(http.server.ThreadingHTTPServer):
    """Serves the files of a folder, with ranges.

    Attributes:
        faults: by file name, what happens to its next requests: "500" or another status, "reset" (in the middle of the
            body), "short" (a body shorter than announced), "cut" (a shorter file), "flip" (one wrong bit), "ignore"
            (the whole file instead of the range), "page" (a login page instead of the file), "silent" (no answer for
            `slow_s`) or "slow" (a pause of `slow_s` in the middle of the body).
        away: what happens to every request as long as it is not empty; see `faults`.
        asked: requests by file name; `wholes` those without a range.
    """

    daemon_threads = True
    slow_s = 0.3

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.away = ""
        self.faults: defaultdict[str, list[str]] = defaultdict(list)
        self.asked: Counter[str] = Counter()
        self.wholes: Counter[str] = Counter()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def shutdown_request(self, request: socket.socket | tuple[bytes, socket.socket]) -> None:
        """Close without a farewell, which would turn a reset into an end."""
        self.close_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are no news."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FaultyServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        asked_range = self.headers.get("Range")
        with self.server.lock:
            self.server.asked[name] += 1
            self.server.wholes[name] += asked_range is None
            queue = self.server.faults[name]
            fault = self.server.away or (queue.pop(0) if queue else "")
        path = self.server.folder / name
        if fault.isdigit() or not path.is_file():
            self.send_error(int(fault or "404"))
            return
        if fault == "silent":
            time.sleep(self.server.slow_s)
        body = PAGE if fault == "page" else path.read_bytes()
        status = 200
        if asked_range and fault != "ignore":
            first, last = asked_range.removeprefix("bytes=").split("-")
            body, status = body[int(first) : int(last) + 1], 206
        if fault == "cut":
            body = body[:-512]
        if fault == "flip":
            # Among the tokens of a head as well.
            at = len(body) * 7 // 8
            body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])
        if fault == "slow":
            time.sleep(self.server.slow_s)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if fault in ("short", "reset"):
            self.close_connection = True
            return
        self.wfile.write(body[len(body) // 2 :])

    def log_message(self, format: str, *args: object) -> None:
        """Tests have enough to read."""


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[FaultyServer]:
    """A server of a folder while the block runs."""
    server = FaultyServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
