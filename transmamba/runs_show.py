"""One run in full: configuration, plan, how it ended and who was blamed, restarts, checkpoints, slow ranks."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transmamba import plain_yaml
from transmamba.errors import ConfigError
from transmamba.metrics import EVENTS, METRICS, newest_first
from transmamba.runs import open_run, read_json, run_state
from transmamba.stragglers import read_paces, straggler_lines, stragglers

_HIGHLIGHTS = {
    "model": ("kind", "n_layers", "d_model", "n_heads", "d_ff", "tied"),
    "transpoint": ("schedule", "points", "changes"),
    "data": ("path", "sources", "blend", "seq_len"),
    "train": ("steps", "tokens", "global_batch", "micro_batch", "recompute"),
    "optim": ("lr", "schedule", "warmup"),
    "parallel": ("tp", "pp", "vpp", "cp", "sp"),
    "zero": ("stage",),
}
_SHOWN = {f"{section}.{name}" for section, names in _HIGHLIGHTS.items() for name in names} | {"precision", "seed"}
_TROUBLE = ("verdict", "save.failed", "checkpoint.rejected", "replica.mismatch", "stop", "resume", "exit")


def describe_run(folder: Path) -> dict[str, Any]:
    """Everything that `runs show` shows, as plain data.

    Raises:
        ConfigError: `folder` is not a run folder.
    """
    state = run_state(open_run(folder))
    values, events, paces = _configuration(folder), read_events(folder), read_paces(folder)
    checkpoints = _checkpoints(folder)
    verdict = next((event for event in reversed(events) if event.get("event") == "verdict"), None)
    return {
        **asdict(state),
        "config": {key: value for key, value in values.items() if key in _SHOWN and value not in (None, [], {})},
        "plan": _plan(folder, checkpoints),
        "environment": read_json(folder / "env.json"),
        "resume": read_json(folder / "exit.json").get("resume"),
        "cause": read_json(folder / "exit.json").get("cause"),
        "verdict": verdict,
        "restarts": [event.get("step") for event in events if event.get("event") == "resume"],
        "requeued": read_json(folder / "restarts.json").get("restarts", 0),
        "events": [event for event in events if event.get("event") in _TROUBLE][-20:],
        "checkpoints": checkpoints,
        "last": next(iter(_lines(folder / METRICS, 1)), {}),
        "paces": [asdict(pace) for pace in paces],
        "stragglers": [pace.rank for pace in stragglers(paces)],
        "straggler_lines": straggler_lines(paces) if paces else [],
    }


def show_rows(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What `describe_run` found, as name and value; a name is empty where the last one goes on."""
    config, plan, last, place = about["config"], about["plan"], about["last"], about["environment"]
    rows = [("run", about["folder"]), ("state", f"{about['state']} ({about['why']})")]
    if about["state"] == "failed" and about["cause"]:
        rows.append(("", str(about["cause"]).strip().splitlines()[-1]))
    for section, names in _HIGHLIGHTS.items():
        given = [f"{name} {_short(config[f'{section}.{name}'])}" for name in names if f"{section}.{name}" in config]
        rows += [(section, " · ".join(given))] if given else []
    rows.append(("numbers", f"{config.get('precision')}, seed {config.get('seed')}"))
    if plan:
        rows.append(("plan", f"{plan['parameters']:,} parameters, {plan['training_flops_per_token'] / 1e6:,.1f} MFLOPs "
                             f"per token to train in whole windows, {plan['tokens']:,} tokens"))  # fmt: skip
    rows.append(("machine", " · ".join(str(place[key]) for key in ("host", "device", "commit") if place.get(key))))
    rows.append(("step", f"{about['step']} of {about['steps'] or '?'}, {about['tokens']:,} tokens"))
    rows.append(("last", " · ".join(f"{key} {_short(last[key])}" for key in _shown(last))))
    rows += [
        ("validation", f"{name}: {result['loss']:.4f} nats per token, {result['bits_per_byte']:.4f} bits per byte")
        for name, result in (last.get("validation") or {}).items()
    ]
    resumed = "".join(f", from step {step}" for step in about["restarts"])
    queued = f"; Slurm queued it again {about['requeued']} times" if about["requeued"] else ""
    rows.append(("restarts", f"{len(about['restarts'])}{resumed}{queued}"))
    kept = [f"step {found['step']} ({found['bytes'] / 2**20:.1f} MiB)" for found in about["checkpoints"]]
    rows.append(("checkpoints", ", ".join(kept) or "none"))
    rows += _verdict_rows(about["verdict"])
    for pace in about["paces"]:
        rows.append((f"rank {pace['rank']}", f"{pace['step_s']:.3f} s a step, {pace['own_s']:.3f} s of it own work"))
    rows += [("slow ranks" if number == 0 else "", line) for number, line in enumerate(about["straggler_lines"])]
    if about["resume"] and about["state"] in ("stopped", "failed", "crashed"):
        rows.append(("go on", about["resume"]))
    return [row for row in rows if row[1]]


def read_events(folder: Path) -> list[dict[str, Any]]:
    """All whole lines of events.jsonl, oldest first; none when there is no such file."""
    return _lines(folder / EVENTS, None)[::-1]


def differing_keys(folders: Sequence[Path]) -> dict[str, list[Any]]:
    """Configuration keys whose values differ between runs, with the value of each; `run.dir` is left out."""
    found = [_configuration(folder) for folder in folders]
    keys = sorted({key for values in found for key in values} - {"run.dir"})
    rows = {key: [values.get(key) for values in found] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def _verdict_rows(verdict: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if verdict is None:
        return []
    stacks = [str(path) for path in verdict.get("stacks", [])]
    own = [path for path in stacks if path.endswith(f"rank{verdict.get('rank', -1):05d}.txt")] or stacks
    return [("watchdog", f"{verdict.get('code')}: {verdict.get('cause')}"), *(("stacks", path) for path in own)]


def _configuration(folder: Path) -> dict[str, Any]:
    """Dotted keys and values; empty when there is none that can be read."""
    try:
        values = plain_yaml.read(folder / "config.yaml")
    except (ConfigError, OSError):
        return {}
    return {f"{name}.{key}" if isinstance(value, dict) else name: inner
            for name, value in values.items()
            for key, inner in (value.items() if isinstance(value, dict) else [("", value)])}  # fmt: skip


def _plan(folder: Path, checkpoints: list[dict[str, Any]]) -> dict[str, Any]:
    """Parameters, FLOPs and tokens; empty while no checkpoint says how large the vocabulary is."""
    from transmamba.compose import load
    from transmamba.plan import make_plan

    with suppress(ConfigError, KeyError, IndexError, TypeError, ValueError):
        config = load(["--config", str(folder / "config.yaml")])
        if config.model.vocab_size is None:
            record = read_json(folder / "checkpoints" / checkpoints[0]["name"] / "manifest.json")
            config.model.vocab_size = int(record["data"]["vocab_size"])
        plan = make_plan(config)
        names = ("parameters", "training_flops_per_token", "tokens", "flop_convention")
        return {name: getattr(plan, name) for name in names}
    return {}


def _checkpoints(folder: Path) -> list[dict[str, Any]]:
    """Published ones, newest first."""
    found = []
    for path in (folder / "checkpoints").glob("step-*"):
        number = path.name.removeprefix("step-")
        with suppress(OSError):
            if number.isdecimal() and (path / "manifest.json").exists():
                n_bytes = sum(file.stat().st_size for file in path.iterdir())
                found.append({"name": path.name, "step": int(number), "bytes": n_bytes})
    return sorted(found, key=lambda row: -row["step"])


def _lines(path: Path, n_lines: int | None) -> list[dict[str, Any]]:
    """The last whole lines of JSON, newest first."""
    found: list[dict[str, Any]] = []
    with suppress(OSError):
        for line in newest_first(path):
            with suppress(ValueError):
                record = json.loads(line)
                found += [record] if isinstance(record, dict) else []
            if len(found) == n_lines:
                break
    return found


def _shown(last: Mapping[str, Any]) -> list[str]:
    names = ("loss", "grad_norm", "lr", "tokens_per_s", "step_s", "mfu")
    return [name for name in names if last.get(name) is not None]


def _short(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
