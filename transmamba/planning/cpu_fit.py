"""Fit the CPU's profile to steps measured here, and check it on other configurations.

`python -m transmamba.planning.cpu_fit` times a matrix product and attention, measures training steps of `FITTED`, finds
the other constants of `cpu_time` by least squares of the relative error, none below zero, and writes
`hardware/cpu.yaml`. With `--check` it measures `HELD_OUT`, which no fit has seen, and compares. `--record FILE` keeps
the figures as JSON, `--clock wall` is for a quiet machine.
"""

import argparse
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transmamba.config import Config
from transmamba.errors import ConfigError
from transmamba.planning.cpu_time import TERMS, step_seconds, work

PROFILE = Path(__file__).parent / "hardware" / "cpu.yaml"
COMMON = ["model.vocab_size=2048", "data.document_mask=false", "precision=fp32", "zero.stage=1"]
_SUMMARY = "Fit the CPU's profile of `transmamba plan` to steps measured here, or check it."
LIMIT = 0.2  # of the relative error of a held-out configuration
_SWEEPS = 20_000
_CLOCKS = {"cpu": "CPU time of the thread that runs the step", "wall": "wall time"}


def _named(*rows: str) -> dict[str, list[str]]:
    """Configurations from rows "kind d_model n_layers seq_len micro_batch [override ...]"."""
    found = {}
    for row in rows:
        kind, d, n_layers, T, B, *others = row.split()
        sizes = {"model.kind": kind, "model.d_model": d, "model.n_layers": n_layers, "data.seq_len": T}
        sizes |= {"train.micro_batch": B, "train.global_batch": B, "model.d_ff": str(int(d) * 11 // 4)}
        sizes |= dict(other.split("=", 1) for other in others)
        found[row] = [f"{key}={value}" for key, value in sizes.items()]
    return found


FITTED = _named(
    "transmamba 64 4 128 8",
    "transmamba 128 8 256 4",
    "transmamba 128 2 1024 2",
    "transmamba 256 4 512 2 model.n_heads=4",
    "transmamba 256 12 128 2",
    "transmamba 512 2 256 2",
    "transmamba 512 6 128 2 transpoint.schedule=uniform",
    "transmamba 128 4 1024 1 transpoint.schedule=attention_only",
    "transmamba 128 4 1024 1 transpoint.schedule=mamba_only",
    "transmamba 256 3 256 4 transpoint.schedule=mamba_only model.n_heads=4",
    "transmamba 64 4 512 4 transpoint.points=[256]",
    "transmamba 128 4 256 2 train.global_batch=8",
    "transmamba 256 2 128 2 train.global_batch=8",
    "transformer 64 4 256 8",
    "transformer 128 8 512 2",
    "transformer 128 2 1024 4 model.n_heads=2",
    "transformer 256 6 1024 1",
    "transformer 512 4 128 4",
    "transformer 512 12 128 1",
    "transformer 256 4 256 1 train.global_batch=4",
    "mamba2 64 4 256 4",
    "mamba2 128 4 512 2",
    "mamba2 256 6 128 2",
    "mamba2 512 2 512 1",
    "mamba2 256 2 1024 1 model.ssm_state=64 model.ssm_groups=4",
    "hybrid 128 7 256 4",
    "hybrid 256 7 256 1",
)
HELD_OUT = _named(
    "transmamba 192 6 384 4",
    "transmamba 96 3 1536 1 transpoint.schedule=log",
    "transmamba 640 3 192 2 transpoint.schedule=uniform",
    "transformer 192 10 640 2",
    "mamba2 320 5 256 2",
    "hybrid 384 7 320 1 model.ssm_groups=2",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Fit or check; returns 1 when a held-out configuration is farther off than `LIMIT`."""
    parser = argparse.ArgumentParser(prog="python -m transmamba.planning.cpu_fit", description=_SUMMARY)
    parser.add_argument("--check", action="store_true", help="predict and measure configurations that no fit has seen")
    parser.add_argument("--clock", choices=tuple(_CLOCKS), default="cpu", help="CPU time of a step's thread, or wall")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads (1 2)")
    parser.add_argument("--profile", type=Path, default=PROFILE, help="the profile to write or to check")
    parser.add_argument("--record", type=Path, help="add the figures to this JSON file")
    options = parser.parse_args(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as training does; read when torch is loaded
    from transmamba import plain_yaml

    try:  # what would fail after minutes of measuring
        record = json.loads(options.record.read_text()) if options.record and options.record.exists() else {}
        known = {int(n) for n in plain_yaml.read(options.profile)["threads"]} if options.check else set()
    except (OSError, ValueError, KeyError, ConfigError) as error:
        parser.error(f"{error}")
    lacking = set(options.threads) - known if options.check else {n for n in options.threads if n < 1}
    if lacking:
        parser.error(f"--threads {min(lacking)}: fix: choose {', '.join(map(str, sorted(known))) or '1 or more'}")
    rows = _run(options)
    _show(rows)
    if options.record:
        _write_record(options.record, record, "held_out" if options.check else "fitted", options.clock, rows)
    return int(options.check and any(abs(row["error"]) > LIMIT for row in rows))


def _run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure, write the profile unless it is to be checked, and compare."""
    from transmamba import plain_yaml
    from transmamba.bench.profile import kernel_constants, measure

    named = {name: config_of(name, 1) for name in (HELD_OUT if options.check else FITTED)}
    measured = measure(named, options.threads, clock=options.clock)
    if not options.check:
        found = {}
        for n in options.threads:
            kernels = kernel_constants(n, options.clock)
            found[n] = fit({name: seconds[n] for name, seconds in measured.items()}, kernels)
        write_profile(options.profile, found, options.clock)
    return compare(measured, plain_yaml.read(options.profile))


def fit(measured: Mapping[str, float], known: Mapping[str, float]) -> dict[str, float]:
    """Nanoseconds of one unit of every term.

    Args:
        measured: seconds per step by the names of `FITTED`.
        known: terms that were measured by themselves.
    """
    import numpy as np

    amounts = np.array([work(config_of(name, 1)).amounts() for name in measured])
    share = amounts * 1e-9 / np.array(list(measured.values()))[:, None]
    is_known = np.array([term in known for term in TERMS])
    rest = 1.0 - share[:, is_known] @ np.array([known[term] for term in TERMS if term in known])
    columns = share[:, ~is_known]
    scale = np.linalg.norm(columns, axis=0).clip(min=1e-300)
    columns = columns / scale
    gram, wanted = columns.T @ columns, columns.T @ rest
    found = np.zeros(len(wanted))
    for _ in range(_SWEEPS):  # coordinate descent: convex, so it ends at the best
        for term in np.flatnonzero(gram.diagonal()):
            found[term] = max(0.0, found[term] + (wanted[term] - gram[term] @ found) / gram[term, term])
    unknown = [term for term in TERMS if term not in known]
    values = dict(known) | dict(zip(unknown, (found / scale).tolist(), strict=True))
    return {term: float(f"{values[term]:.4g}") for term in TERMS}


def compare(measured: Mapping[str, Mapping[int, float]], profile: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Predicted against measured, one row per configuration and number of threads; errors relative to the measured."""
    rows = []
    for name, found in measured.items():
        for threads, seconds in found.items():
            predicted = step_seconds(config_of(name, threads), profile)
            row = {"name": name, "threads": threads, "predicted_s": predicted, "measured_s": seconds}
            rows.append(row | {"error": predicted / seconds - 1})
    return rows


def write_profile(path: Path, threads: Mapping[int, Mapping[str, float]], clock: str) -> None:
    """Write the constants, with what they are and where they come from."""
    import torch

    from transmamba.machine import describe_device

    lines = [
        "# Written by python -m transmamba.planning.cpu_fit: nanoseconds per unit of work, by number of threads.",
        "# Units of work: transmamba/planning/cpu_time.py. Products and attention are timed alone, the other constants",
        f"# fitted to training steps, all on this machine; least of several, {_CLOCKS[clock]}.",
        "chip: cpu",
        f"name: {describe_device(torch.device('cpu'))}",
        f"date: {datetime.now(UTC):%Y-%m-%d}",
        "threads:",
    ]
    for n, constants in threads.items():
        lines += [f"  {n}:", *(f"    {term}: {value:.8f}" for term, value in constants.items())]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def config_of(name: str, threads: int) -> Config:
    """The configuration of a row of `FITTED` or `HELD_OUT`."""
    from transmamba.compose import load

    return load([*COMMON, "train.steps=100", *(FITTED | HELD_OUT)[name], f"train.threads={threads}"])


def _show(rows: Sequence[Mapping[str, Any]]) -> None:
    print(f"{'configuration':<64} threads  predicted   measured   error")
    for row in rows:
        seconds = f"{row['predicted_s'] * 1e3:8.1f} ms {row['measured_s'] * 1e3:8.1f} ms {row['error']:+7.1%}"
        print(f"{row['name']:<64} {row['threads']:7} {seconds}")
    for threads in sorted({row["threads"] for row in rows}):
        errors = [abs(row["error"]) for row in rows if row["threads"] == threads]
        print(f"{threads} threads: median error {statistics.median(errors):.1%}, largest {max(errors):.1%}")


def _write_record(path: Path, record: dict[str, Any], name: str, clock: str, rows: Sequence[Mapping[str, Any]]) -> None:
    import torch

    from transmamba.machine import describe_device, versions

    record |= {"hardware": describe_device(torch.device("cpu")), "versions": versions(), "limit": LIMIT}
    record[name] = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "clock": _CLOCKS[clock], "rows": list(rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
