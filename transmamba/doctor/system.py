"""What `transmamba doctor` says of the system below: storage, clocks, limits, and programs that others rely on."""

import os
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from transmamba.doctor.finding import GIB, Finding, Verdict

MIN_FILES, MIN_SHM = 1024, GIB
SLOW_SYNC_S, SLOW_WRITE, SKEW_S = 0.1, 50e6, 2.0
_CGROUP = Path("/sys/fs/cgroup")
_WRITTEN = 16 * 2**20


def system_findings(run_dir: Path) -> Iterator[Finding]:
    """Everything of this file, for runs in `run_dir` or the nearest folder above it that exists."""
    above = (run_dir.absolute(), *run_dir.absolute().parents)
    folder = next(path for path in above if path.is_dir())
    if os.access(folder, os.W_OK):
        yield from storage_findings(folder)
    yield clock_finding()
    yield cores_finding()
    yield files_finding()
    yield shared_memory_finding()
    yield from program_findings()


def storage_findings(folder: Path) -> Iterator[Finding]:
    """How quickly the file system makes bytes durable, whether it renames at once, and its clock."""
    with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as place:
        path, block = Path(place) / "new", bytes(_WRITTEN)
        sync_s = statistics.median(_write(path, b"x" * 4096) for _ in range(5))
        rate = _WRITTEN / _write(path, block)
        value = f"fsync {sync_s * 1e3:.1f} ms, {rate / 1e6:,.0f} MB/s written durably in {folder}"
        if sync_s > SLOW_SYNC_S or rate < SLOW_WRITE:
            fix = "put run.dir on a faster file system, or raise checkpoint.every"
            yield Finding("storage speed", value, "warning", fix)
        else:
            yield Finding("storage speed", value)
        before = time.time()
        path.write_bytes(b"new")
        skew_s = path.stat().st_mtime - (before + time.time()) / 2
        value = f"{abs(skew_s):.2f} s apart from this machine's clock"
        if abs(skew_s) > SKEW_S:
            fix = "synchronise both clocks (NTP): ages of runs and locks are judged by them"
            yield Finding("storage clock", value, "warning", fix)
        else:
            yield Finding("storage clock", value)


def _write(path: Path, data: bytes) -> float:
    """Seconds to write a file, make it durable and give it its name."""
    began = time.perf_counter()
    draft = path.with_suffix(".draft")
    with draft.open("wb", buffering=0) as file:
        file.write(data)
        os.fsync(file.fileno())
    os.replace(draft, path)
    return time.perf_counter() - began


def clock_finding() -> Finding:
    """Heartbeats are judged by the monotonic clock: it must not go backwards, and must keep the pace of the wall's."""
    wall, steps = time.time(), [time.monotonic_ns() for _ in range(1000)]
    began = time.monotonic()
    time.sleep(0.05)
    apart_s = abs((time.time() - wall) - (time.monotonic() - steps[0] / 1e9))
    if steps != sorted(steps) or time.monotonic() < began + 0.04:
        return Finding("clock", "the monotonic clock goes backwards", "fatal", "choose another clock source, e.g. tsc")
    if apart_s > 0.5:
        fix = "look at the time service (`timedatectl`): the wall clock is being moved"
        return Finding("clock", f"wall and monotonic clock drift {apart_s:.1f} s apart at once", "warning", fix)
    return Finding("clock", "monotonic, in pace with the wall clock")


def cores_finding() -> Finding:
    """Cores that this process may use, within the affinity and the quota of the container."""
    allowed, there = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    quota = cpu_quota()
    value = f"{allowed} of {there} may be used" + ("" if quota is None else f", {quota:.1f} of them by quota")
    if quota is not None and quota < allowed - 0.5:
        fix = f"set train.threads={max(1, int(quota))}: threads beyond the quota wait for each other"
        return Finding("cores", value, "warning", fix)
    return Finding("cores", value)


def cpu_quota() -> float | None:
    """Cores that the control group allows; None when it sets no limit."""
    try:
        limit, period = (_CGROUP / "cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        return None


def files_finding() -> Finding:
    """Files that a process may hold open: shards, checkpoints and sockets of many ranks add up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < MIN_FILES:
        return Finding("open files", f"at most {soft} (ulimit -n)", "warning", f"ulimit -n {min(hard, 65536)}")
    return Finding("open files", f"at most {soft} (ulimit -n)")


def shared_memory_finding() -> Finding:
    """/dev/shm, which NCCL and the reading process need; containers have 64 MiB by default."""
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        return Finding("/dev/shm", "absent", "warning", "mount a tmpfs there")
    if usage.free < MIN_SHM:
        fix = "start the container with --shm-size=8g or --ipc=host"
        return Finding("/dev/shm", f"{usage.free / GIB:.2f} GiB free", "warning", fix)
    return Finding("/dev/shm", f"{usage.free / GIB:.1f} GiB free")


def program_findings() -> Iterator[Finding]:
    """Programs that some commands call."""
    compiler = next((name for name in ("gcc", "cc", "clang") if shutil.which(name)), None)
    has_gpu = Path("/dev/nvidiactl").exists()
    missing = "fatal" if has_gpu and compiler is None else "optional"
    yield program_finding("C compiler", compiler or "gcc", missing, "install gcc: Triton builds its launcher with it")
    yield program_finding("git", "git", "optional", "install it to have the commit noted in env.json")
    fix = "`transmamba launch slurm` needs sbatch and its configuration; `launch local` does not"
    yield program_finding("Slurm", "sbatch", "optional", fix)


def program_finding(check: str, program: str, missing: Verdict, fix: str) -> Finding:
    """The first line of what a program says of its version; `missing` and `fix` if it is absent or fails."""
    if shutil.which(program) is None:
        return Finding(check, "absent", missing, fix)
    try:
        told = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(check, f"{program} does not answer ({type(error).__name__})", missing, fix)
    line = (told.stdout or told.stderr).strip().partition("\n")[0][:80]
    return Finding(check, line) if told.returncode == 0 else Finding(check, line, missing, fix)
