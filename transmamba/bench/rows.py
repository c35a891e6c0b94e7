"""A table of measurements that is on disk after every row, and goes on where it was stopped."""

import json
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from transmamba.bench.kernels import results_folder
from transmamba.machine import describe_device, versions

Row = dict[str, Any]
Work = tuple[str, Callable[[], Row]]  # a row's name, and what measures it


def measure_rows(name: str, work: Iterable[Work], budget_s: float, out: Path, settings: Row) -> list[Row]:
    """Measure the rows that `out`/<hardware>/`name`.json does not have yet, and write it after each.

    Args:
        name: of the file.
        work: every row of the table; a row that fails is kept with its `error` and measured again next time.
        budget_s: seconds after which no new row is begun.
        out: folder of results.
        settings: sizes and the like; rows measured with others, or with other versions, are not kept.

    Returns:
        All rows measured so far, in the order of `work`.
    """
    device = describe_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    file = results_folder(out, device) / f"{name}.json"
    head = {"hardware": device, "threads": torch.get_num_threads(), "versions": versions(), "settings": settings}
    kept = {row["row"]: row for row in _kept(file, json.loads(json.dumps(head))) if "error" not in row}
    console, started, rows = Console(), time.monotonic(), []
    for title, measure in work:
        if title in kept:
            rows.append(kept[title])
            continue
        if time.monotonic() - started > budget_s:
            console.print(f"stopped after {budget_s:g} s; the same command goes on")
            break
        try:
            found = measure()
        except (RuntimeError, ValueError) as error:  # out of memory among them: the other rows still count
            found = {"error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        rows.append({"row": title, "date": datetime.now(UTC).isoformat(timespec="seconds"), **found})
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n", encoding="utf-8")
        console.print(f"{title:<58} {line(found)}", highlight=False)
    console.print(f"written to {file}", highlight=False)
    return rows


def line(row: Row) -> str:
    """The measured numbers of a row on one line."""
    return "  ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
    )


def _kept(file: Path, head: Row) -> list[Row]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return found["rows"] if all(found.get(key) == value for key, value in head.items()) else []
