"""Run folders from outside: where they are, and how each of them is doing. Reads little, changes nothing, and takes
files as they come: half written, of a run that was killed, of another machine.
"""

import json
import os
import re
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from transmamba import heartbeat
from transmamba.errors import (
    EXIT_CHECKPOINT_MISMATCH,
    EXIT_CONFIG,
    EXIT_DATA,
    EXIT_DONE,
    EXIT_HANG,
    EXIT_INTERNAL,
    EXIT_NO_PROGRESS,
    EXIT_NO_VALID_CHECKPOINT,
    EXIT_NON_FINITE,
    EXIT_RANK_DIED,
    EXIT_STOP_FILE,
    EXIT_STOPPED,
    EXIT_STORAGE,
    ConfigError,
    Problem,
)
from transmamba.heartbeat import Phase, Word
from transmamba.launch.attempt import DIED_BY_SIGNAL
from transmamba.metrics import EVENTS, METRICS, newest_first

MEANINGS = {
    EXIT_DONE: "done",
    EXIT_INTERNAL: "internal error",
    EXIT_CONFIG: "bad configuration or input",
    EXIT_STOPPED: "stopped by a signal, saved",
    EXIT_STOP_FILE: "stopped by the stop file, saved",
    EXIT_NON_FINITE: "loss or gradient not finite",
    EXIT_NO_VALID_CHECKPOINT: "no valid checkpoint",
    EXIT_DATA: "damaged data",
    EXIT_CHECKPOINT_MISMATCH: "checkpoint and configuration disagree",
    EXIT_HANG: "a rank hung",
    EXIT_RANK_DIED: "a rank died",
    EXIT_STORAGE: "storage failed",
    EXIT_NO_PROGRESS: "no progress over several restarts",
}
State = Literal["running", "silent", "done", "stopped", "failed", "crashed", "new"]
FRESH_S = 600.0  # a run of another machine counts as running while its files change
_DEPTH, _PACE_STEPS, _TAIL_LINES = 6, 20, 20_000


@dataclass(frozen=True)
class RunState:
    """How a run is doing. Times are seconds before now; what is not known is None."""

    name: str
    folder: str
    state: State
    code: int | None  # exit code of the last attempt, once it ended
    why: str  # the state in words
    step: int
    steps: int | None
    tokens: int
    loss: float | None
    validation: float | None  # nats per token of the first validation set, when it was last measured
    tokens_per_s: float | None  # median of the last 20 steps
    age_s: float  # since the run last wrote anything
    heartbeat_s: float | None  # since rank 0's last sign of life, on this machine
    host: str | None  # where the last attempt runs, or ended without a word


def find_runs(folder: Path) -> list[Path]:
    """Every run folder under `folder`, sweeps included; `folder` itself if it is one.

    Raises:
        ConfigError: there is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError([Problem("DIR", "no such folder", folder, "name a folder that holds runs")])
    return sorted(_walk(folder, _DEPTH))


def open_run(folder: Path) -> Path:
    """`folder`, if it is one of a run.

    Raises:
        ConfigError: it is not.
    """
    if not _is_run(folder):
        fix = "name a run folder; `transmamba runs ls` lists them"
        raise ConfigError([Problem("RUN_DIR", "not a run folder", folder, fix)])
    return folder


def run_state(folder: Path, name: str | None = None) -> RunState:
    """Read a run folder's state from its last lines."""
    records = list(islice(_records(folder / METRICS), _PACE_STEPS))
    last = records[0] if records else {}
    rates = [rate for record in records if isinstance(rate := record.get("tokens_per_s"), int | float)]
    held = {} if last else _held(folder)
    state, code, why, host = _state(folder, last, held)
    last = last or held
    return RunState(
        name=name or folder.name,
        folder=str(folder),
        state=state,
        code=code,
        why=why,
        step=_whole(last.get("step")) or 0,
        steps=_steps(folder),
        tokens=_whole(last.get("tokens")) or 0,
        loss=last.get("loss"),
        validation=_validation(folder / METRICS),
        tokens_per_s=statistics.median(rates) if rates else None,
        age_s=_age_s(folder),
        heartbeat_s=_beat_s(folder)[1] if state == "running" else None,
        host=host,
    )


def read_json(path: Path) -> dict[str, Any]:
    """An object from a file; empty when the file is missing, torn or something else."""
    with suppress(OSError, ValueError):
        found = json.loads(path.read_bytes())
        return found if isinstance(found, dict) else {}
    return {}


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    if _is_run(folder):
        yield folder
    elif depth:
        with suppress(OSError), os.scandir(folder) as entries:
            below = [entry.name for entry in entries if entry.name[0] != "." and entry.is_dir(follow_symlinks=False)]
            for name in below:
                yield from _walk(folder / name, depth - 1)


def _is_run(folder: Path) -> bool:
    return (folder / "config.yaml").exists() or ((folder / "checkpoints").is_dir() and (folder / "logs").is_dir())


def _held(folder: Path) -> dict[str, Any]:
    """Step and tokens of the newest checkpoint, in a folder that was made around one; empty if there is none."""
    found = [path.parent for path in (folder / "checkpoints").glob("step-*/manifest.json")]
    numbered = [(int(path.name[5:]), path) for path in found if path.name[5:].isdecimal()]
    if not numbered:
        return {}
    step, path = max(numbered)
    return {"step": step, "tokens": read_json(path / "manifest.json").get("tokens_seen")}


def _state(folder: Path, last: dict[str, Any], held: dict[str, Any]) -> tuple[State, int | None, str, str | None]:
    """State, exit code, words and host. An exit.json from before the lock is that of a former attempt."""
    lock, ended = folder / "lock.json", folder / "exit.json"
    holder, locked_at, ended_at = read_json(lock), _changed_at(lock), _changed_at(ended)
    if locked_at and ended_at < locked_at:
        host = str(holder.get("host"))
        if host == socket.gethostname():
            is_alive, age_s, phase = _beat_s(folder)
            if not is_alive and not _lives(holder.get("pid")):
                return "crashed", None, f"ended without a word at step {last.get('step', 0)}", host
            return "running", None, phase if age_s is None else f"{phase}, heartbeat {age_s:.0f} s ago", host
        age_s = _age_s(folder)
        if age_s < FRESH_S:
            return "running", None, f"on {host}", host
        return "silent", None, f"on {host}, which has written nothing for {age_s / 60:.0f} minutes", host
    record = read_json(ended)
    code = _whole(record.get("code"))
    if code is None:
        if last:
            return "crashed", None, "no exit.json", None
        return "new", None, f"holds a checkpoint of step {held['step']}" if held else "has no step yet", None
    signal = code - DIED_BY_SIGNAL
    other = f"signal {signal} before there was anything to save" if signal > 0 else "unknown"
    words = f"{code}: {MEANINGS.get(code, other)}"
    if code == EXIT_DONE:
        return "done", code, words, None
    return ("stopped" if code in (EXIT_STOPPED, EXIT_STOP_FILE) else "failed"), code, words, None


def _beat_s(folder: Path) -> tuple[bool, float | None, str]:
    """Whether rank 0's process lives on this machine, the age of its last heartbeat, and what it is at."""
    with suppress(OSError, ValueError):
        data = heartbeat.page_path(folder, 0).read_bytes()
        page = memoryview(data).cast("q")
        state, ticks = heartbeat.process_state(page[Word.PID])
        if page[Word.BOOT] == heartbeat.boot() and ticks == page[Word.TICKS] and state not in ("Z", "X"):
            at = Phase(page[Word.PHASE])
            return at != Phase.DONE, (time.monotonic_ns() - page[Word.BEAT]) / 1e9, f"in phase {at.name.lower()}"
    return False, None, "starts"


def _lives(pid: object) -> bool:
    return isinstance(pid, int) and heartbeat.process_state(pid)[0] not in ("", "Z", "X")


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines of JSON, newest first."""
    with suppress(OSError):
        for line in newest_first(path):
            with suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict):
                    yield record


def _validation(metrics: Path) -> float | None:
    with suppress(OSError, ValueError, KeyError, AttributeError, TypeError):
        lines = (line for line in islice(newest_first(metrics), _TAIL_LINES) if b'"validation": {"' in line)
        for line in lines:
            return float(next(iter(json.loads(line)["validation"].values()))["loss"])
    return None


def _steps(folder: Path) -> int | None:
    """Steps of the whole run by its configuration, without the second that reading all of a thousand would take."""
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    steps, tokens = _number(text, "train", "steps"), _number(text, "train", "tokens")
    if steps or not tokens:
        return steps
    rows, seq_len = _number(text, "train", "global_batch"), _number(text, "data", "seq_len")
    return -(-tokens // (rows * seq_len)) if rows and seq_len else None


def _number(text: str, section: str, key: str) -> int | None:
    found = re.search(rf"^{section}:\n(?:  .*\n)*?  {key}: (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else None


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _age_s(folder: Path) -> float:
    names = (METRICS, EVENTS, "exit.json", "lock.json", "config.yaml")
    return max(0.0, time.time() - max(*(_changed_at(folder / name) for name in names), _changed_at(folder)))


def _changed_at(path: Path) -> float:
    """Zero if there is no such file."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
