"""What a run writes about itself: one JSON object per step, one per event, and a feed for wandb."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from transmamba.config import WandbConfig
from transmamba.tracking.wandb_key import settled_mode

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
_BLOCK_BYTES = 1 << 16


class Journal:
    """Append-only JSON lines of one run folder; every line is whole on disk when the call returns."""

    def __init__(self, folder: Path, first_step: int, *, is_writer: bool = True):
        """Continue the files of `folder`; metrics after `first_step` belong to steps that are done again.

        Of several ranks one is the writer; what the others say goes nowhere.
        """
        self.folder = folder
        if is_writer:
            _drop_later_steps(folder / METRICS, first_step)
        self._metrics = _append(folder / METRICS if is_writer else Path(os.devnull))
        self._events = _append(folder / EVENTS if is_writer else Path(os.devnull))

    def metrics(self, record: dict[str, Any]) -> None:
        """One optimizer step."""
        self._metrics.write(json.dumps(record) + "\n")

    def event(self, name: str, **fields: Any) -> None:
        """Something that happened, with the wall clock."""
        self._events.write(json.dumps({"time": time.time(), "event": name, **fields}) + "\n")

    def close(self) -> None:
        self._metrics.close()
        self._events.close()


class WandbFeed:
    """wandb in a process of its own that follows metrics.jsonl: no outage and no upload can hold up a step."""

    def __init__(self, folder: Path, config: WandbConfig):
        self._process: subprocess.Popen[bytes] | None = None
        mode = settled_mode(config, os.environ)
        if mode == "disabled":
            return
        log = (folder / "logs" / "wandb.log").open("ab")
        command = [sys.executable, "-m", "transmamba.tracking.wandb_feed", str(folder), mode, config.project]
        self._process = subprocess.Popen(
            [*command, config.group or ""],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            # A terminal's Ctrl-C goes to the whole foreground group; the feed ends when its standard input does.
            start_new_session=True,
        )
        log.close()

    def close(self, patience_s: float = 5.0) -> None:
        """Let the feed finish what it has; after `patience_s` it goes on alone and ends by itself."""
        if self._process is None or self._process.stdin is None:
            return
        self._process.stdin.close()
        try:
            self._process.wait(patience_s)
        except subprocess.TimeoutExpired:
            return


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All whole lines of metrics.jsonl; a last line torn by a kill is left out."""
    path = folder / METRICS
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def newest_first(path: Path) -> Iterator[bytes]:
    """The whole lines of a file from the last to the first, read from its end as far as they are asked for."""
    with path.open("rb") as file:
        begin, rest = file.seek(0, os.SEEK_END), b""
        while begin:
            n_bytes = min(begin, _BLOCK_BYTES)
            begin = file.seek(begin - n_bytes)
            first, *lines = (file.read(n_bytes) + rest).split(b"\n")
            rest = first
            yield from reversed(lines)
        yield rest


def _append(path: Path) -> TextIO:
    return path.open("a", encoding="utf-8", buffering=1)


def _drop_later_steps(path: Path, last_step: int) -> None:
    if not path.exists():
        return
    kept = [record for record in read_metrics(path.parent) if record["step"] <= last_step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(temporary, path)
