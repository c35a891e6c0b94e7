"""Compile the kernels for a GPU that is not there, and judge what the compiler made of them.

`python -m transmamba.kernels.compiled` compiles every launch of every case of `cases`, specialised as the launcher
would, and prints registers, spills, shared memory and matrix instructions; it fails where a limit is broken.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile, TemporaryDirectory, TemporaryFile
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Column, Table
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from transmamba.kernels.cases import Case, Limits, cases
from transmamba.kernels.launches import Launch, forward_backward
from transmamba.kernels.offsets import dots_of_transposed_sums, narrow_offsets

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# What an instruction is called in the machine code of sm_80 to sm_100.
INSTRUCTIONS = {
    "spills": r"\bSTL\b",
    "wgmma": r"\b(?:HGMMA|QGMMA|UTC\w*MMA)\b",
    "mma": r"\bHMMA\b",
    "tma": r"\bUTMA(?:LDG|STG|REDG)\b",
}
# Shared memory that a program may have.
SHARED_BYTES = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 103: 232_448, 120: 101_376}


@dataclass(frozen=True)
class Compiled:
    """One kernel as compiled for one architecture.

    Attributes:
        case: what launched it.
        kernel: its name.
        arch: compute capability, 90 for sm_90.
        faults: what is wrong with its code, and where; or why it does not compile.
        seconds: of compilation.
        registers: per thread.
        spills: instructions that store registers to memory.
        stack_bytes: of a thread.
        shared_bytes: of a program.
        wgmma: warpgroup matrix instructions (tensor-memory ones on sm_100).
        mma: matrix instructions of a single warp.
        tma: bulk tensor copies.
    """

    case: str
    kernel: str
    arch: int
    faults: tuple[str, ...]
    seconds: float = 0.0
    registers: int = 0
    spills: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    wgmma: int = 0
    mma: int = 0
    tma: int = 0

    def broken(self, limits: Limits) -> Iterator[str]:
        """What is wrong, for every limit that is not kept."""
        where = f"{self.kernel}, sm_{self.arch}"
        allowed, is_hopper = limits.spills.get(self.kernel, 0), self.arch == 90 and self.registers > 0
        if is_hopper and self.spills > allowed:
            yield f"{where}: {self.spills} spill stores, {allowed} allowed"
        room = SHARED_BYTES.get(self.arch, self.shared_bytes)
        if self.shared_bytes > room:
            yield f"{where}: {self.shared_bytes} bytes of shared memory, {room} there are"
        if is_hopper and self.kernel in limits.wgmma and (self.mma or not self.wgmma):
            yield f"{where}: {self.mma} mma.sync beside {self.wgmma} wgmma, which must do all products"
        yield from (f"{where}: {fault}" for fault in self.faults)


def specialised(launch: Launch, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
    """What the launcher would compile for these arguments on this GPU: alignment, ones and Nones as constants.

    It asks Triton's own launcher, because its rules and the spelling of types change between versions.
    """
    kernel, engine = launch.kernel, make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, engine)
    bound, specialization, _ = binder(**launch.arguments, **launch.constants, **launch.options)
    packed = kernel._pack_args(engine, launch.options, bound, specialization, launch.options)
    options, signature, constants, attributes = packed
    return ASTSource(kernel, signature, constants, attributes), options.__dict__


def compile_launch(launch: Launch, case: str, arch: int) -> Compiled:
    """Compile one launch and read the result; a kernel that the compiler refuses has that as its only fault."""
    target = GPUTarget("cuda", arch, 32)
    source, options = specialised(launch, target)
    began = time.perf_counter()
    with _complaints() as complaints:
        try:
            compiled = triton.compile(source, target=target, options=options)
        except Exception as error:  # whatever a compiler may raise; the other kernels still need judging
            compiled, complaints[:] = None, [str(error).strip().splitlines()[-1]]
    seconds = time.perf_counter() - began
    if compiled is None:
        return Compiled(case, launch.name, arch, (f"does not compile: {complaints[0].rsplit('/', 1)[-1][:300]}",))
    with NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _output("cuobjdump", "--dump-resource-usage", cubin.name)
        code = _output("nvdisasm", cubin.name)
    registers, stack = (max(map(int, re.findall(rf"{name}:(\d+)", usage))) for name in ("REG", "STACK"))
    ttir = compiled.asm["ttir"]
    return Compiled(
        case=case,
        kernel=launch.name,
        arch=arch,
        seconds=round(seconds, 2),
        registers=registers,
        stack_bytes=stack,
        shared_bytes=compiled.metadata.shared,
        faults=(*narrow_offsets(ttir), *dots_of_transposed_sums(ttir)),
        **{name: len(re.findall(pattern, code)) for name, pattern in INSTRUCTIONS.items()},
    )


def launches_of(case: Case, dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    """The Triton launches of forward and backward at every shape of training, with a name for each call."""
    for shape in case.operation.training:
        problem = case.problem(shape, dtype, "meta")
        forward, backward = forward_backward(problem.op, problem.tensors)
        for launch in (*forward, *backward):
            if launch.kernel is not None:
                yield f"{case.name} {'x'.join(map(str, shape))}", launch


def compile_all(arch: int, only: str = "", dtype: torch.dtype = torch.bfloat16) -> Iterator[tuple[Compiled, Limits]]:
    """Compile what the cases launch, each specialisation once, and pair it with its limits."""
    seen: set[str] = set()
    target = GPUTarget("cuda", arch, 32)
    for case in cases(only):
        for name, launch in launches_of(case, dtype):
            source, options = specialised(launch, target)
            key = f"{source.hash()} {options}"
            if key not in seen:
                seen.add(key)
                yield compile_launch(launch, name, arch), case.operation.limits


def main(argv: list[str] | None = None) -> int:
    """Compile, print and judge; 0 when every limit is kept, else 1."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=[90], help="compute capabilities, 90 for sm_90")
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    chosen = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 160)
    rows: list[Compiled] = []
    broken: dict[str, list[str]] = {}  # what is wrong, and in which cases
    with TemporaryDirectory() as cache, knobs.cache.scope():
        knobs.cache.dir = cache
        for arch in chosen.arch:
            for row, limits in compile_all(arch, chosen.only):
                rows.append(row)
                for complaint in row.broken(limits):
                    broken.setdefault(complaint, []).append(row.case)
    console.print(_table(rows))
    if chosen.json is not None:
        report = {"triton": triton.__version__, "rows": [asdict(row) for row in rows], "broken": broken}
        chosen.json.write_text(json.dumps(report, indent=1) + "\n")
    for complaint, where in broken.items():
        others = f" and {len(where) - 1} more" if len(where) > 1 else ""
        print(f"{complaint} ({where[0]}{others})", file=sys.stderr)
    if not rows:
        print(f"--only {chosen.only}: no case of this name launches a kernel", file=sys.stderr)
    return 1 if broken or not rows else 0


def _table(rows: list[Compiled]) -> Table:
    title = f"Triton {triton.__version__}, {sum(row.seconds for row in rows):.1f} s of compilation"
    names = ("kernel", "case", "sm", "regs", "spills", "stack", "shared", "wgmma", "mma", "tma", "s")
    table = Table(*(Column(name, no_wrap=True) for name in names), title=title)
    for row in rows:
        numbers = (row.registers, row.spills, row.stack_bytes, row.shared_bytes, row.wgmma, row.mma, row.tma)
        table.add_row(row.kernel, row.case, str(row.arch), *map(str, numbers), f"{row.seconds:.1f}")
    return table


@contextmanager
def _complaints() -> Iterator[list[str]]:
    """Catch the pages that a failing compiler writes, in Python and below it; afterwards the list has its errors."""
    found: list[str] = []
    sys.stderr.flush()
    kept = os.dup(2)
    with TemporaryFile("w+") as file, redirect_stdout(file):
        os.dup2(file.fileno(), 2)
        try:
            yield found
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            found[:0] = [re.sub(r"^\S*/", "", line.strip()) for line in file if re.search(r" error: |\bfatal\b", line)]


def _output(tool: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    if "TRITON_INTERPRET" in os.environ:
        # Interpreted kernels have no compiled form, and Triton chose when this file's imports defined them.
        rest = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        os.execve(sys.executable, [sys.executable, "-m", "transmamba.kernels.compiled", *sys.argv[1:]], rest)
    sys.exit(main())
