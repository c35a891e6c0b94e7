"""What this process runs on: threads, precision, versions."""

import os
import platform
import socket
import subprocess
import sys
import time
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch.utils import deterministic

from transmamba.config import Config

Precision = Literal["fp32", "bf16"]
_PEAK_BF16_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}


def has_gpu() -> bool:
    """Whether there is a device that the Triton kernels run on."""
    return torch.cuda.is_available()


def choose_threads(wanted: int | None, n_local_ranks: int = 1) -> tuple[int, str]:
    """CPU threads and the reason: cores that others leave free, because contended threads wait for each other."""
    cores = len(os.sched_getaffinity(0))
    if wanted is not None:
        return wanted, "as set"
    if n_local_ranks > 1:
        return max(1, cores // n_local_ranks), f"{cores} cores for {n_local_ranks} ranks"
    idle = _idle_cores()
    free = max(1, min(cores, round(idle)))
    if free == cores:
        return cores, f"all {cores} cores are free"
    return free, f"{idle:.1f} of {cores} cores are idle"


def choose_precision(wanted: Precision | None, device: torch.device) -> Precision:
    """bf16 where the matrix units are made for it, fp32 elsewhere."""
    return wanted or ("bf16" if device.type == "cuda" else "fp32")


def has_slow_bf16(cpuinfo: str = "/proc/cpuinfo") -> bool:
    """Whether this CPU multiplies bf16 matrices without units for it, which takes about ten times as long as fp32.

    False where its flags cannot be read.
    """
    try:
        with open(cpuinfo, encoding="utf-8") as file:
            flags = next(line.split(":", 1)[1].split() for line in file if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return False
    return not {"amx_bf16", "avx512_bf16", "bf16"} & set(flags)  # the last one is Arm's


def sum_in_one_order() -> None:
    """Let torch choose operations that give the same bits every time, and refuse those that have none.

    Before the first product on a GPU: cuBLAS reads its part of it when it starts.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # What is read before it is written shows in the kernels' tests; here filling memory would only cost time.
    deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


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


def _idle_cores(seconds: float = 0.4) -> float:
    """Cores that nobody used just now. The load average would still show this process's own preparations."""
    before = _cpu_ticks()
    time.sleep(seconds)
    idle, total = (later - earlier for later, earlier in zip(_cpu_ticks(), before, strict=True))
    return (os.cpu_count() or 1) * idle / max(total, 1)


def _cpu_ticks() -> tuple[int, int]:
    """Idle and all ticks of all cores since the machine started."""
    with open("/proc/stat", encoding="utf-8") as file:
        user, nice, system, idle, wait, *others = (int(field) for field in file.readline().split()[1:9])
    return idle + wait, user + nice + system + idle + wait + sum(others)


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
