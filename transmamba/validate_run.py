"""The run folder before a run: writable, roomy, ours, unlocked, and in the state that `resume` expects."""

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from transmamba import plain_yaml
from transmamba.changes import allowance, changed_past, differing, flatten, may_change, with_defaults
from transmamba.config import Config, padded_vocab, tokens_per_step, total_steps
from transmamba.costs import BUILT_IN_VOCAB, embedding_parameters, layer_parameters
from transmamba.errors import ConfigError, Problem
from transmamba.transpoint import layer_kinds

# Weights and two moments in fp32, plus bf16 copies and headers.
BYTES_PER_PARAMETER = 14
# A lock of another machine counts as live while its job touches it.
LOCK_FRESH_S = 120
_FOREIGN = ("*.pt", "*.pth", "*.bin", "*.ckpt", "*.distcp", ".metadata", "latest", "global_step*", "iter_*")
# What a run settles itself where it is null; the record in its folder has the answer.
_SETTLED = ("precision", "data.shuffle_shards")


def run_problems(config: Config) -> Iterator[Problem]:
    """Problems of `run.dir` and `resume` that show without opening a checkpoint; creates nothing."""
    folder = Path(config.run.dir or "runs")
    try:
        ancestor = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    except OSError as error:
        yield Problem("run.dir", f"cannot be used: {error.strerror}", config.run.dir, "give another folder")
        return
    if not ancestor.is_dir():
        fix = "give a folder, or a path that does not exist yet"
        yield Problem("run.dir", f"{ancestor} is a file, not a folder", config.run.dir, fix)
        return
    if not os.access(ancestor, os.W_OK | os.X_OK):
        fix = "give a folder that you may write to"
        yield Problem("run.dir", f"no permission to write in {ancestor}", config.run.dir, fix)
        return
    yield from _space_problems(config, ancestor)
    if config.run.dir is None:
        if config.resume.mode == "must":
            fix = "name the run with run.dir=PATH, or use resume=auto"
            yield Problem("resume.mode", "must continue, but run.dir is not given", "must", fix)
        return
    if folder.is_dir():
        yield from _lock_problems(folder)
        if not _checkpoint_steps(folder):  # with checkpoints the question is theirs: exit code 23
            yield from _ownership_problems(config, folder)
    yield from _resume_problems(config, folder)


def _space_problems(config: Config, folder: Path) -> Iterator[Problem]:
    rows = padded_vocab(config.model.vocab_size or BUILT_IN_VOCAB)
    n_parameters = embedding_parameters(config.model, rows)
    n_parameters += sum(layer_parameters(config.model, kind) for kind in layer_kinds(config.model))
    need = 1.2 * (config.checkpoint.keep + 1) * n_parameters * BYTES_PER_PARAMETER
    free = shutil.disk_usage(folder).free
    if free < need:
        fix = "free space, use another run.dir or a smaller checkpoint.keep"
        what = f"checkpoints may need {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free"
        yield Problem("run.dir", what, config.run.dir or folder, fix)


def _lock_problems(folder: Path) -> Iterator[Problem]:
    lock = folder / "lock.json"
    try:
        holder = json.loads(lock.read_text(encoding="utf-8"))
        # The lock is written once, the metrics with every step.
        seen_at = max(path.stat().st_mtime for path in (lock, folder / "metrics.jsonl") if path.exists())
        age_s = time.time() - seen_at
        host, pid = str(holder["host"]), int(holder["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    if pid == os.getpid() and host == socket.gethostname():
        return
    is_live = _is_running(pid) if host == socket.gethostname() else age_s < LOCK_FRESH_S
    if is_live:
        what = f"in use by process {pid} on {host}, seen {age_s:.0f} s ago"
        yield Problem("run.dir", what, folder, "wait for it, stop it, or use another run.dir")


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return pid > 0
    return pid > 0


def _ownership_problems(config: Config, folder: Path) -> Iterator[Problem]:
    file = folder / "config.yaml"
    if not file.is_file():
        return
    # Both sides went through YAML, so that equal configurations compare equal.
    now = flatten(plain_yaml.parse(plain_yaml.write(config.model_dump()), file))
    try:
        then = with_defaults(flatten(plain_yaml.read(file)), now)
        past = changed_past(then, config, _recorded_steps(folder))
    except (ConfigError, OSError, ValueError, TypeError, KeyError):
        fix = "use another run.dir, or restore the file"
        yield Problem("run.dir", f"{file} cannot be read", config.run.dir, fix)
        return
    different = [
        key
        for key in differing(then, now)
        if not may_change(key, config, past, has_checkpoint=False) and not (key in _SETTLED and now[key] is None)
    ]
    if different:
        diff = ", ".join(f"{key} {then.get(key)} -> {now.get(key)}" for key in different[:5])
        fix = "use another run.dir, or the values of its config.yaml"
        if any(allowance(key) for key in different):
            fix += ", or name the change in resume.allow=[...]"
        yield Problem("run.dir", f"belongs to another configuration: {diff}", config.run.dir, fix)


def _recorded_steps(folder: Path) -> int:
    """Steps that a run has noted, a line each."""
    try:
        return (folder / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def _resume_problems(config: Config, folder: Path) -> Iterator[Problem]:
    mode = config.resume.mode
    steps = _checkpoint_steps(folder)
    if steps and mode == "never":
        fix = "use resume=auto to continue, or a new run.dir"
        yield Problem("resume.mode", f"never, but {folder} holds a checkpoint of step {max(steps)}", mode, fix)
    elif not steps and mode != "never" and (names := _foreign(folder)):
        fix = "import it with `transmamba checkpoint from-hf`, or use a new run.dir"
        yield Problem("run.dir", f"holds checkpoints of a foreign format ({', '.join(names)})", folder, fix)
    elif not steps and mode == "must":
        fix = "use resume=auto to start anew, or correct run.dir"
        yield Problem("resume.mode", f"must continue, but {folder} holds no checkpoint", mode, fix)
    elif (step := complete_at(config)) is not None:
        fix = f"raise it above {step} to train longer, or use a new run.dir"
        yield Problem("train.steps", f"the run is complete at step {step}", _last_step(config, folder, step), fix)


def complete_at(config: Config) -> int | None:
    """The newest step of a run folder that has all its steps; None if there is more to do, or no such folder."""
    if config.run.dir is None or not (steps := _checkpoint_steps(folder := Path(config.run.dir))):
        return None
    newest = max(steps)
    return newest if newest >= _last_step(config, folder, newest) + (0 if _is_done(folder) else 1) else None


def _last_step(config: Config, folder: Path, step: int) -> int:
    """Steps of the run, counted behind its newest checkpoint, whose windows may have had another length."""
    try:
        manifest = json.loads((folder / f"checkpoints/step-{step:08d}/manifest.json").read_text(encoding="utf-8"))
        return total_steps(config, manifest["tokens_seen"] - step * tokens_per_step(config))
    except (OSError, ValueError, KeyError, TypeError):
        return total_steps(config)


def _checkpoint_steps(folder: Path) -> list[int]:
    manifests = folder.glob("checkpoints/step-*/manifest.json")
    return [int(text) for file in manifests if (text := file.parent.name.removeprefix("step-")).isdecimal()]


def _is_done(folder: Path) -> bool:
    """Whether the run said so itself; one killed after its last save may still finish, with nothing to do."""
    try:
        return json.loads((folder / "exit.json").read_text(encoding="utf-8"))["code"] == 0
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _foreign(folder: Path) -> list[str]:
    places = (folder, folder / "checkpoints")
    return sorted({path.name for place in places for pattern in _FOREIGN for path in place.glob(pattern)})[:3]
