"""What this process runs on: threads, precision, versions."""

import os
import platform
import socket
import subprocess
import sys
from importlib.metadata import version
from typing import Any, Literal

import torch

from transmamba.config import Config

Precision = Literal["fp32", "bf16"]
_PEAK_BF16_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}


def choose_threads(wanted: int | None) -> tuple[int, str]:
    """CPU threads and the reason: cores that others leave free, because contended threads wait for each other."""
    cores = len(os.sched_getaffinity(0))
    if wanted is not None:
        return wanted, "as set"
    busy = min(os.getloadavg()[0], cores)
    free = max(1, min(cores, round(cores - busy)))
    if free == cores:
        return cores, f"all {cores} cores are free"
    return free, f"{cores} cores, load {busy:.1f}"


def choose_precision(wanted: Precision | None, device: torch.device) -> Precision:
    """bf16 where the matrix units are made for it, fp32 elsewhere."""
    return wanted or ("bf16" if device.type == "cuda" else "fp32")


def describe_device(device: torch.device) -> str:
    """The device's name for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({_cpu_name()})"


def environment(config: Config, device: torch.device) -> dict[str, Any]:
    """What env.json says: enough to know later which machine, code and libraries made the numbers."""
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "device": describe_device(device),
        "threads": config.train.threads,
        "precision": config.precision,
        "command": [sys.executable, *sys.argv],
        "working_directory": os.getcwd(),
        "commit": _commit(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of everything whose change could change a number."""
    libraries = ("transmamba", "torch", "deepspeed", "megatron-core", "triton", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in libraries}}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the data sheet; None where it is not known, and then no MFU is claimed."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for model, peak in _PEAK_BF16_FLOPS.items() if model in name), None)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def _commit() -> str | None:
    """The checkout's commit, marked when files differ from it; None for an installed package."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        run = subprocess.run(
            ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()
