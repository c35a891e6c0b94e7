"""`transmamba doctor`: what this machine can do, and with `--kernels` whether the GPU computes the right numbers."""

import json
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, metadata, requires
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from transmamba.doctor.finding import EXIT_CODES, GIB, Finding
from transmamba.doctor.parity import parity_finding
from transmamba.doctor.parts import installed, part_findings
from transmamba.doctor.ranks import local_finding
from transmamba.doctor.system import system_findings

if TYPE_CHECKING:
    import torch

    from transmamba.kernels.cases import Case, Shape

# Less than this, and a default run may stop in the middle: at its memory, or at its first checkpoints.
MIN_MEMORY, MIN_DISK = 2 * GIB, 5 * GIB
ENGINES = ("torch", "triton", "deepspeed", "megatron-core")
NO_DEVICE = (
    "kernels were not checked: no CUDA device here. Without one, `make test` runs them in Triton's interpreter "
    "and compiles them for sm_90."
)


def run_doctor(kernels: bool, as_json: bool, run_dir: Path, network: bool = False) -> int:
    """Look at the machine, or check the kernels on it; prints a table.

    Args:
        kernels: check every kernel on the GPU instead.
        network: as one of the ranks of a job, look only at the network between them.
        as_json: print a list of objects instead of a table.
        run_dir: where runs will be written.

    Returns:
        0 when all is well, 1 with warnings (also when there is no GPU to check kernels on), 2 when something
        would keep a run from working.
    """
    if network:
        from transmamba.doctor.ranks import main

        return main(["--json"] if as_json else [])
    if kernels:
        import torch

        from transmamba.kernels.cases import cases

        if not torch.cuda.is_available():
            print(json.dumps({"problem": NO_DEVICE}) if as_json else NO_DEVICE)
            return 1
        device = torch.device("cuda")
        found = [*kernel_findings(list(cases()), device), *far_findings(device)]
    else:
        found = list(machine_findings(run_dir))
    if as_json:
        print(json.dumps([asdict(finding) for finding in found], indent=1))
    else:
        Console(width=None if sys.stdout.isatty() else 140).print(
            _table(found, "what is wrong" if kernels else "what to do")
        )
    for finding in found:
        if kernels and finding.verdict == "fatal":
            print(f"{finding.check}: {finding.fix}", file=sys.stderr)
    return max((EXIT_CODES[finding.verdict] for finding in found), default=0)


def machine_findings(run_dir: Path) -> Iterator[Finding]:
    """What a run would meet here: versions, device, memory, storage, limits, optional parts; then two self-tests."""
    yield from version_findings()
    yield from device_findings()
    yield memory_finding()
    yield disk_finding(run_dir)
    yield from system_findings(run_dir)
    yield from part_findings()
    try:
        yield parity_finding()
    except (ImportError, OSError) as error:  # told above, with what to do
        yield Finding("self-test", f"cannot run: {error}", "fatal", "put right what is fatal above")
    else:
        yield local_finding()


def version_findings() -> Iterator[Finding]:
    """Python and the engines against the supported ranges; the other requirements in one line when all is well."""
    try:
        lines, python = requires("transmamba") or [], metadata("transmamba")["Requires-Python"]
    except PackageNotFoundError:
        yield Finding("transmamba", "not installed", "warning", "pip install -e . in the checkout")
        return
    here = platform.python_version()
    if SpecifierSet(python).contains(here):
        yield Finding("python", here)
    else:
        yield Finding("python", here, "fatal", f"use Python {python}")
    needed = [requirement for requirement in map(Requirement, lines) if _applies(requirement)]
    others = [requirement for requirement in needed if requirement.name not in ENGINES]
    yield from (version_finding(requirement) for requirement in needed if requirement.name in ENGINES)
    bad = [finding for finding in map(version_finding, others) if finding.verdict != "ok"]
    yield from bad or [Finding("other requirements", f"{len(others)} in range")]


def version_finding(requirement: Requirement) -> Finding:
    """Whether one requirement is there, in its range."""
    found, install = installed(requirement.name), f"pip install '{requirement}'"
    if found is None:
        return Finding(requirement.name, "missing", "fatal", install)
    if not requirement.specifier.contains(found, prereleases=True):
        return Finding(requirement.name, f"{found}, supported is {requirement.specifier}", "warning", install)
    return Finding(requirement.name, found)


def device_findings() -> Iterator[Finding]:
    """The GPU, what Triton needs beside it, and threads."""
    try:
        import torch
    except (ImportError, OSError) as error:
        yield Finding("import torch", str(error).splitlines()[0], "fatal", "install torch again, for this machine")
        return
    cores = len(os.sched_getaffinity(0))
    if torch.cuda.is_available():
        yield from _gpu_findings(torch)
    elif Path("/dev/nvidiactl").exists():
        fix = "install a CUDA build of torch that fits the driver"
        yield Finding("device", f"a GPU that torch {torch.__version__} cannot use", "warning", fix)
    else:
        yield Finding("device", "CPU, no CUDA device: operations take their torch path")
    threads = torch.get_num_threads()
    if threads > cores:
        fix = f"set OMP_NUM_THREADS to at most {cores}"
        yield Finding("threads", f"{threads} of torch on {cores} cores", "warning", fix)
    else:
        yield Finding("threads", f"{threads} of torch on {cores} cores")


def memory_finding() -> Finding:
    """Memory that a new process can have, within the limit of the container."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        free = min(free, limit - used)
    if free < MIN_MEMORY:
        return Finding("memory", f"{free / GIB:.1f} GiB free", "warning", "end other programs or take a larger machine")
    return Finding("memory", f"{free / GIB:.1f} GiB free")


def disk_finding(run_dir: Path) -> Finding:
    """Room for checkpoints, and the right to write them."""
    folder = next(parent for parent in (run_dir.absolute(), *run_dir.absolute().parents) if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return Finding("run folder", f"{folder} cannot be written", "fatal", "name another with --run-dir and run.dir")
    free = shutil.disk_usage(folder).free
    if free < MIN_DISK:
        fix = "make room, or name a folder on another disk with run.dir"
        return Finding("run folder", f"{free / GIB:.1f} GiB free for {run_dir}", "warning", fix)
    return Finding("run folder", f"{free / GIB:.1f} GiB free for {run_dir}")


def kernel_findings(checked: "list[Case]", device: "torch.device", is_small: bool = False) -> Iterator[Finding]:
    """Run every case on the device against float64: values, gradients, and the same bits twice.

    Args:
        checked: cases, each at its large shapes.
        device: whose kernels are checked.
        is_small: take the small shapes.

    Yields:
        A finding for every case and dtype; `fix` says what is wrong with a fatal one.
    """
    jobs = [
        (case, dtype, shape)
        for case in checked
        for dtype in case.operation.tolerance
        for shape in ((case.operation.small,) if is_small else case.operation.large)
    ]
    for case, dtype, shape in track(jobs, "checking kernels", console=Console(stderr=True), transient=True):
        name = f"{case.name} {str(dtype).removeprefix('torch.')} {'x'.join(map(str, shape))}"
        began = time.perf_counter()
        try:
            worst, problems = check_case(case, dtype, shape, device)
        except Exception as error:  # a kernel may fail in any way, and the others still need checking
            worst, problems = float("nan"), [f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"]
        value = f"error {worst:.1e} of {case.operation.tolerance[dtype]:.0e}, {time.perf_counter() - began:.1f} s"
        yield Finding(name, value, "fatal", "; ".join(problems)) if problems else Finding(name, value)


def far_findings(device: "torch.device") -> Iterator[Finding]:
    """The last tokens of streams of more than 2^31 elements against the same tokens alone, if the device has room."""
    import torch

    from transmamba.kernels import large

    free_gb = torch.cuda.mem_get_info(device)[0] / 1e9
    if free_gb < large.MEMORY_GB:
        fix = f"needs {large.MEMORY_GB} GB free on the GPU"
        yield Finding("streams beyond 2^31 elements", f"not checked, {free_gb:.0f} GB free", "warning", fix)
        return
    for name, error in large.far_errors(device):
        value = f"error {error:.1e} of {large.TOLERANCE:.0e}"
        check = f"{name} beyond 2^31 elements"
        is_right = error <= large.TOLERANCE
        yield Finding(check, value) if is_right else Finding(check, value, "fatal", "far tokens come out wrong")


def check_case(case: "Case", dtype: "torch.dtype", shape: "Shape", device: "torch.device") -> tuple[float, list[str]]:
    """The worst relative RMS error of values and gradients, and a line for everything that is wrong.

    The reference runs on the CPU. Uninitialised memory is NaN meanwhile.
    """
    import torch

    from transmamba.kernels.testing import relative_rms, values_and_gradients

    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.manual_seed(0)
    definition = case.problem(shape, dtype, "cpu")
    tensors = definition.tensors
    exact = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    op = _on(device, case.problem(shape, dtype, device).op)
    with warnings.catch_warnings(action="ignore"):
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            first, second = (values_and_gradients(op, tensors) for _ in range(2))
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        expected = values_and_gradients(definition.reference, exact)
    errors = {name: relative_rms(first[name], expected[name]) for name in first}
    limit = case.operation.tolerance[dtype]
    wrong = [f"{name} is off by {error:.1e} of {limit:.0e}" for name, error in errors.items() if not error <= limit]
    unsteady = [f"{name} differs between two runs" for name in first if not torch.equal(first[name], second[name])]
    return max(errors.values()), wrong + unsteady


def _on(device: "torch.device", op: Any) -> Any:
    """An operation of tensors on the CPU that runs on another device."""

    def moved(**tensors: Any) -> Any:
        result = op(**{name: tensor.to(device) for name, tensor in tensors.items()})
        return tuple(part.cpu() for part in result) if isinstance(result, tuple) else result.cpu()

    return moved


def _gpu_findings(torch: Any) -> Iterator[Finding]:
    one = torch.cuda.get_device_properties(0)
    value = f"{torch.cuda.device_count()} x {one.name}, {one.total_memory / GIB:.0f} GiB, sm_{one.major}{one.minor}"
    if one.major < 8:
        yield Finding("device", value, "warning", "the kernels are made for sm_80 and newer: run `--kernels`")
    else:
        yield Finding("device", value)


def _applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def _number(file: Path) -> int | None:
    """What a file of one number says; None when it is not there or says "max"."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _table(found: list[Finding], last_column: str) -> Table:
    table = Table("check", "found", "verdict", last_column)
    colours = {"ok": "green", "optional": "dim", "warning": "yellow", "fatal": "red"}
    for finding in found:
        verdict = f"[{colours[finding.verdict]}]{finding.verdict}[/]"
        table.add_row(finding.check, escape(finding.value), verdict, escape(finding.fix))
    return table
