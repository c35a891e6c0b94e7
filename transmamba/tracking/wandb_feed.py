"""`python -m transmamba.tracking.wandb_feed RUN_DIR MODE PROJECT GROUP`: follow a run's metrics.jsonl into wandb.

Started by the trainer; ends when the trainer closes its standard input, whatever wandb does meanwhile. All attempts of
a run are one run of wandb, and together they log every step once: a former feed is awaited, and what it has logged is
left out. A server that cannot be reached makes it an offline run.
"""

import fcntl
import json
import os
import secrets
import select
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import yaml

from transmamba.metrics import METRICS
from transmamba.tracking.wandb_records import offline_steps

POLL_S, PATIENCE_S = 2.0, 600.0
STATE = "wandb.json"


def main(folder: Path, mode: str, project: str, group: str) -> None:
    """Follow the file until standard input closes, then once more to the end."""
    os.nice(10)
    os.environ["WANDB_SILENT"] = "true"
    with (folder / "logs" / "wandb.lock").open("w") as lock:
        _await_turn(lock)
        _follow(folder, mode, project, group)


def _await_turn(lock: TextIO) -> None:
    """Wait until the feed of a former attempt is done; not for ever, as its upload may never end."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        with suppress(BlockingIOError):
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(POLL_S / 10)


def _follow(folder: Path, mode: str, project: str, group: str) -> None:
    with (folder / METRICS).open(encoding="utf-8") as file:
        run, done = _begin(folder, mode, project, group)
        rest, last = "", 0
        while True:
            is_over = _standard_input_closed()
            rest, last = _log_lines(run, rest + file.read(), done, last)
            if not run.offline:
                _write_state(folder, {"id": run.id, "online_step": last})
            if is_over:
                break
            time.sleep(POLL_S)
    run.finish()


def run_id(folder: Path) -> str:
    """The identity of a run for wandb, drawn once and kept in the run folder: a resumed run goes on as the same one."""
    state = _state(folder)
    if "id" not in state:
        _write_state(folder, {"id": secrets.token_hex(4)})
    return str(_state(folder)["id"])


def _begin(folder: Path, mode: str, project: str, group: str) -> tuple[Any, set[int]]:
    """wandb's run, and the steps that it must not get again."""
    import wandb

    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    place = folder.absolute()
    if not group and place.parents[1].name == "trials":
        group = place.parents[2].name  # trials of a sweep belong together

    def begin(mode: str) -> Any:
        return wandb.init(
            project=project,
            group=group or None,
            dir=str(folder),
            id=run_id(folder),
            name=place.name,
            mode=mode,  # pyright: ignore[reportArgumentType]
            resume="allow",
            config=config,
        )

    if mode == "online":
        try:
            run = begin("online")
        except wandb.Error as error:
            print(f"the server cannot be reached, logging goes on offline: {error}", flush=True)
            wandb.teardown()
        else:
            return run, set(range(run.step))  # the server knows; a new run begins at 0
    done = offline_steps(folder) | set(range(int(_state(folder).get("online_step", 0)) + 1))
    return begin("offline"), done


def _log_lines(run: Any, text: str, done: set[int], last: int) -> tuple[str, int]:
    """Log every whole line of a step that is not done; returns the line still being written, and the last step."""
    *lines, rest = text.split("\n")
    for line in lines:
        record = json.loads(line)
        last = max(last, record["step"])
        if record["step"] not in done:
            run.log(record, step=record["step"])
    return rest, last


def _state(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _write_state(folder: Path, state: dict[str, Any]) -> None:
    draft = folder / "logs" / f".{STATE}"
    draft.write_text(json.dumps(state) + "\n", encoding="utf-8")
    os.replace(draft, folder / STATE)


def _standard_input_closed() -> bool:
    ready, _, _ = select.select([sys.stdin], [], [], 0)
    return bool(ready) and not os.read(sys.stdin.fileno(), 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4])
