"""`python -m transmamba.wandb_feed RUN_DIR MODE PROJECT GROUP`: follow a run's metrics.jsonl into wandb.

Started by the trainer; ends when the trainer closes its standard input, whatever wandb does meanwhile.
"""

import json
import os
import select
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from transmamba.metrics import METRICS

POLL_S = 2.0


def main(folder: Path, mode: str, project: str, group: str) -> None:
    """Follow the file until standard input closes, then once more to the end."""
    os.nice(10)
    os.environ["WANDB_SILENT"] = "true"
    import wandb

    if mode == "auto":
        mode = "online" if wandb.api.api_key else "offline"
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    # The run folder's name is the identity: a resumed run goes on as the same wandb run.
    run = wandb.init(
        project=project,
        group=group or None,
        dir=str(folder),
        id=folder.name,
        name=folder.name,
        mode="online" if mode == "online" else "offline",
        resume="allow",
        config=config,
    )
    with (folder / METRICS).open(encoding="utf-8") as file:
        rest = ""
        while True:
            is_over = _standard_input_closed()
            rest = _log_lines(run, rest + file.read())
            if is_over:
                break
            time.sleep(POLL_S)
    run.finish()


def _log_lines(run: Any, text: str) -> str:
    """Log every whole line; returns the beginning of a line that is still being written."""
    *lines, rest = text.split("\n")
    for line in lines:
        record = json.loads(line)
        run.log(record, step=record["step"])
    return rest


def _standard_input_closed() -> bool:
    ready, _, _ = select.select([sys.stdin], [], [], 0)
    return bool(ready) and not os.read(sys.stdin.fileno(), 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4])
