"""`transmamba bench kernels`: measure the kernels against named peers and keep the numbers."""

import json
import re
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from transmamba.bench.cuda import scan_rows
from transmamba.bench.mixer import mixer_rows
from transmamba.errors import EXIT_CONFIG
from transmamba.kernels.launches import contestants
from transmamba.kernels.ssd.bench import load_peer, rows
from transmamba.machine import describe_device, versions

PEERS = ("mamba-ssm", "flash-linear-attention", "einops")


def bench_kernels(budget_s: float, *, mamba_ssm: str | None, fla: str | None, out: Path) -> int:
    """Measure every kernel row, print a table, and write `out`/<hardware>/kernels.json after each row.

    With a CUDA device the Triton scan is measured on it; otherwise the CPU's code.

    Args:
        budget_s: seconds of timing; checks and peers' imports come on top.
        mamba_ssm, fla: folders of unpacked peers that are not installed; `fla` is for CUDA only.
        out: folder of results.

    Returns:
        The exit code: 0, or 2 when `mamba_ssm` has no such peer.

    Raises:
        AssertionError: a kernel or a peer computes the wrong numbers; nothing is timed then.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hardware = describe_device(device)
    file = results_folder(out, hardware) / "kernels.json"
    report: dict[str, Any] = {
        "hardware": hardware,
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions() | _peer_versions(),
        "rows": [],
    }
    console = Console()
    table = Table("row", "ours", "best peer", "its result", "ratio", "target", title=f"{hardware}, kernels")
    try:
        load_peer(mamba_ssm)
    except ValueError as error:
        print(f"--mamba-ssm: {error}; give the folder of an unpacked mamba-ssm", file=sys.stderr)
        return EXIT_CONFIG
    started = time.monotonic()
    if device.type == "cuda":
        measured = scan_rows(contestants(mamba_ssm, fla), device)
    else:
        measured = chain(rows(budget_s * 0.8, mamba_ssm), mixer_rows(budget_s * 0.2))
    for row in measured:
        report["rows"].append(row)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(report, indent=1) + "\n")
        table.add_row(*_cells(row))
        console.print(f"[dim]{row['row']}: {_cells(row)[4]}[/dim]")
        if device.type == "cuda" and time.monotonic() - started > budget_s:
            console.print(f"stopped after {budget_s:g} s; more rows with a larger --budget-s")
            break
    console.print(table)
    console.print(f"written to {file}")
    return 0


def results_folder(out: Path, hardware: str) -> Path:
    """Where the results of one kind of machine are kept."""
    return out / re.sub(r"\W+", "-", hardware).strip("-").lower()


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    if "missing" in row:
        return row["row"], "", f"not found: {row['missing']}", "", "", ""
    amounts = (row["ours"], row["peers"][row["best_peer"]])
    own, best = (f"{a * 1e3:.1f} ms" if row["unit"] == "s" else f"{a / 2**20:.0f} MiB" for a in amounts)
    return row["row"], own, row["best_peer"], best, f"{row['ratio']:.2f}", f"{row['target']:g}"


def _peer_versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
