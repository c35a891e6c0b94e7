"""Run by the tests in its own process: compile the Triton norm for sm_90 without a GPU, JSON lines."""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from transmamba.kernels.gated_norm import triton_norm

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
CONSTANTS = {
    "H": 16,
    "V": 64,
    "ROWS": triton_norm.VALUES_PER_PROGRAM // 64,
    "COLUMNS": 64,
    "HAS_Z": True,
    "HAS_GATE": True,
}
TYPES = {
    "weight_pointer": "*fp32",
    "scale_pointer": "*fp32",
    "dweight_pointer": "*fp32",
    "gate_pointer": "*i1",
    "eps": "fp32",
}


def argument_type(name: str) -> str:
    if name in CONSTANTS:
        return "constexpr"
    return TYPES.get(name, "*bf16" if name.endswith("_pointer") else "i32")


def main() -> None:
    for kernel in (triton_norm.norm_fwd_kernel, triton_norm.norm_bwd_kernel):
        signature = {name: argument_type(name) for name in kernel.arg_names}
        aligned = {
            (index,): [["tt.divisibility", 16]] for index, kind in enumerate(signature.values()) if kind.startswith("*")
        }
        source = ASTSource(fn=kernel, signature=signature, constexprs=CONSTANTS, attrs=aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            usage = subprocess.run(
                [CUOBJDUMP, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
            ).stdout
        registers, stack, shared, local = (
            int(re.search(rf"{name}:(\d+)", usage)[1])  # pyright: ignore[reportOptionalSubscript]
            for name in ("REG", "STACK", "SHARED", "LOCAL")
        )
        row = {"registers": registers, "spill_bytes": stack + local, "shared_bytes": shared}
        print(json.dumps({"kernel": kernel.__name__, **row}))


if __name__ == "__main__":
    main()
