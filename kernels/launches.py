"""Count what a GPU would be asked to do: kernel launches, and the tensor bytes that each must touch, without one.

`recorded()` runs code on `meta` tensors and writes down its Triton launches and torch calls instead of running them.
`python -m transmamba.kernels.launches` prints the scan beside the same scan of mamba-ssm and of flash-linear-attention,
and the rotation of queries and keys beside the torch code of it.

The bytes count every distinct tensor of a launch once. They stand for memory traffic, blind to caches between
launches and to a kernel that reads a tensor twice.
"""

# B batch, T tokens, H heads, G groups of B and C, N key/state width, V value width.

import argparse
import importlib
import importlib.util
import inspect
import json
import math
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from transmamba.kernels import backend
from transmamba.kernels.rope import rope, rope_qk
from transmamba.kernels.ssd import ssd_scan

# Calls of torch that allocate or relabel memory; views are known by their schema.
NO_LAUNCH = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"})
NO_LAUNCH |= frozenset({"detach", "lift_fresh", "set_", "resize_"})
HOPPER = types.SimpleNamespace(multi_processor_count=132, major=9, minor=0, name="H200")

N_ROWS, N_TOKENS = 8, 8192
SHAPES = (  # H, G, N, V
    (32, 32, 64, 64),
    (16, 16, 128, 128),
    (32, 1, 128, 64),
)
ROPE_SHAPES = ((32, 64), (16, 128))  # H, N
# An operation and its inputs, for the sizes H, G, N, V.
Contestant = Callable[[int, int, int, int], tuple[Callable[..., Any], dict[str, Tensor]]]


@dataclass(frozen=True)
class Launch:
    """One kernel that would have run.

    Attributes:
        name: the Triton kernel's or the torch operation's name.
        n_bytes: size of the distinct tensors it reads or writes.
        kernel: the jitted function; None for a call of torch.
        grid: programs along each axis.
        arguments: what the kernel was given at run time, by name.
        constants: its compile-time arguments, by name.
        options: num_warps, num_stages and so on, as the caller set them.
    """

    name: str
    n_bytes: int
    kernel: Any = None
    grid: tuple[int, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect launches while the block runs; no Triton kernel runs, and operations take their Triton path.

    Tensors inside should be on `meta`: outputs of kernels stay unwritten. Of several autotuning configurations
    the first is taken. A torch call counts as one launch when a meta or CUDA tensor takes part. Who asks for the
    device is told of an H200.
    """
    launches: list[Launch] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        if not warmup:
            launches.append(_triton_launch(kernel, args, grid, kwargs))

    def tuned(tuner: Any, *args: Any, **kwargs: Any) -> Any:
        with patch.object(tuner, "configs", tuner.configs[:1]):
            return tune(tuner, *args, **kwargs)

    tune = Autotuner.run
    with (
        patch.object(JITFunction, "run", run),
        patch.object(InterpretedFunction, "run", run),
        patch.object(Autotuner, "run", tuned),
        patch.object(backend, "runs_triton", lambda _: True),
        patch.object(torch.cuda, "device", lambda _: nullcontext()),
        patch.object(torch.cuda, "get_device_properties", lambda _=None: HOPPER),
        _TorchCalls(launches),
    ):
        yield launches


def forward_backward(op: Callable[..., Any], tensors: dict[str, Tensor]) -> tuple[list[Launch], list[Launch]]:
    """Launches of `op(**tensors)` and of the gradients of all floating-point tensors, which are on `meta`."""
    leaves = {name: tensor.detach().requires_grad_(tensor.is_floating_point()) for name, tensor in tensors.items()}
    with recorded() as launches:
        outputs = [value for value in tree_leaves(op(**leaves)) if isinstance(value, Tensor) and value.requires_grad]
        n_forward = len(launches)
        wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
        torch.autograd.grad(outputs, wanted, [torch.empty_like(output) for output in outputs], allow_unused=True)
    return launches[:n_forward], launches[n_forward:]


def is_constexpr(parameter: inspect.Parameter) -> bool:
    """Whether a kernel's parameter is one of its compile-time arguments."""
    return "constexpr" in str(parameter.annotation)


def n_bytes(values: Iterable[Any]) -> int:
    """Size of the distinct tensors among `values`: what a view shows, not its base; what is repeated, once."""
    return sum(dict(_extents(value) for value in tree_leaves(list(values)) if _is_tensor(value)).values())


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or hasattr(value, "block_shape")


def _extents(value: Any) -> tuple[tuple[Any, ...], int]:
    """Which elements a tensor or a tensor descriptor shows, and their size."""
    tensor = value if isinstance(value, Tensor) else value.base
    shape, strides = tuple(value.shape), tuple(value.stride() if isinstance(value, Tensor) else value.strides)
    if not tensor.numel():
        return (), 0
    n_elements = math.prod(length for length, stride in zip(shape, strides, strict=True) if stride)
    place = tensor.untyped_storage()._cdata, tensor.storage_offset(), shape, strides
    return place, n_elements * tensor.element_size()


def _triton_launch(kernel: Any, args: tuple[Any, ...], grid: Any, kwargs: dict[str, Any]) -> Launch:
    function: Callable[..., Any] = kernel.fn
    parameters = inspect.signature(function).parameters
    bound = inspect.signature(function).bind(*args, **{name: kwargs[name] for name in kwargs if name in parameters})
    bound.apply_defaults()
    grid = grid(bound.arguments) if callable(grid) else grid
    arguments = {name: value for name, value in bound.arguments.items() if not is_constexpr(parameters[name])}
    return Launch(
        name=function.__name__,
        n_bytes=n_bytes(arguments.values()),
        kernel=kernel,
        grid=tuple(int(size) for size in grid),
        arguments=arguments,
        constants={name: value for name, value in bound.arguments.items() if name not in arguments},
        options={name: value for name, value in kwargs.items() if name not in parameters},
    )


class _TorchCalls(TorchDispatchMode):
    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        written = [value for value in tree_leaves(result) if isinstance(value, Tensor) and value.numel()]
        tensors = [*written, *(value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor))]
        name = func.overloadpacket.__name__
        on_device = any(tensor.device.type != "cpu" for tensor in tensors)
        if written and on_device and not func.is_view and name not in NO_LAUNCH:
            self.launches.append(Launch(name, n_bytes(tensors)))
        return result


def ours(n_heads: int, n_groups: int, n_keys: int, n_values: int) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    """The scan, with the step size's bias and softplus inside."""
    c_BTGN, b_BTGN = (_stream(n_groups, n_keys) for _ in range(2))
    inputs = {"c_BTGN": c_BTGN, "b_BTGN": b_BTGN, "x_BTHV": _stream(n_heads, n_values)}
    inputs["dt_BTH"] = _stream(n_heads, dtype=torch.float32)
    return ssd_scan, inputs | {name: _per_head(n_heads) for name in ("A_H", "D_H", "dt_bias_H")}


def mamba_ssm(path: str | None) -> Contestant:
    """The same operation of mamba-ssm, from an unpacked source or installed.

    Raises:
        ImportError: it is not there.
    """
    sys.modules["selective_scan_cuda"] = types.ModuleType("selective_scan_cuda")
    _skip_init("mamba_ssm", path)
    scan = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined

    def contestant(n_heads: int, n_groups: int, n_keys: int, n_values: int) -> Any:
        streams = (_stream(n_heads, n_values), _stream(n_heads, dtype=torch.float32), _per_head(n_heads))
        inputs = dict(zip(("x", "dt", "A"), streams, strict=True))
        inputs |= {"B": _stream(n_groups, n_keys), "C": _stream(n_groups, n_keys)}
        inputs |= {"D": _per_head(n_heads), "dt_bias": _per_head(n_heads)}
        return (lambda **given: scan(**given, chunk_size=256, dt_softplus=True)), inputs

    return contestant


def fla(path: str | None) -> Contestant:
    """The nearest operation of flash-linear-attention: it is given the decay and x * dt, and has no D.

    Raises:
        ImportError: it is not there.
    """
    _skip_init("fla", path)
    scan = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla

    def contestant(n_heads: int, n_groups: int, n_keys: int, n_values: int) -> Any:
        if n_groups != n_heads:
            raise ValueError("one group of keys a head only")
        inputs = {"q": _stream(n_heads, n_keys), "k": _stream(n_heads, n_keys), "v": _stream(n_heads, n_values)}
        inputs["g"] = _stream(n_heads, dtype=torch.float32)
        return (lambda **given: scan(**given, scale=1.0)), inputs

    return contestant


def contestants(mamba_ssm_path: str | None, fla_path: str | None) -> dict[str, Contestant]:
    """Our scan and the peers that are there; says which are not."""
    found: dict[str, Contestant] = {"transmamba": ours}
    for name, load, path in (("mamba-ssm", mamba_ssm, mamba_ssm_path), ("fla", fla, fla_path)):
        try:
            with warnings.catch_warnings(action="ignore"):
                found[name] = load(path)
        except ImportError as error:
            print(f"{name} is missing ({error}); --{name} PATH takes an unpacked one", file=sys.stderr)
    return found


def rows(counted: dict[str, Contestant]) -> Iterator[dict[str, Any]]:
    """Count forward and backward of everybody at every shape; who cannot do a shape says why in `missing`."""
    for sizes in SHAPES:
        for name, contestant in counted.items():
            row: dict[str, Any] = {"shape": dict(zip("HGNV", sizes, strict=True)), "contestant": name}
            try:
                op, inputs = contestant(*sizes)
            except ValueError as error:
                yield row | {"missing": str(error)}
                continue
            yield row | _parts(op, inputs, sizes[0])


def rope_rows() -> Iterator[dict[str, Any]]:
    """Count forward and backward of the rotation of queries and keys, in one launch and by torch."""

    def in_torch(q_BTHN: Tensor, k_BTHN: Tensor, pos_BT: Tensor) -> tuple[Tensor, Tensor]:
        return rope(q_BTHN, pos_BT), rope(k_BTHN, pos_BT)

    for n_heads, width in ROPE_SHAPES:
        q_BTHN, k_BTHN, _ = _stream(n_heads, 3 * width).chunk(3, dim=-1)
        inputs = {"q_BTHN": q_BTHN, "k_BTHN": k_BTHN, "pos_BT": _stream(dtype=torch.int64)}
        for name, op in (("rope of q and k", rope_qk), ("the same in torch", in_torch)):
            yield {"shape": {"H": n_heads, "N": width}, "contestant": name} | _parts(op, inputs, n_heads)


def main(argv: list[str] | None = None) -> int:
    """Print launches and bytes per token-head of the scan and of its peers, and of rotary positions."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--mamba-ssm", metavar="PATH", help="folder of an unpacked mamba-ssm, if not installed")
    parser.add_argument("--fla", metavar="PATH", help="folder of an unpacked flash-linear-attention, if not installed")
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    chosen = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    found = [*rows(contestants(chosen.mamba_ssm, chosen.fla)), *rope_rows()]
    console.print(_table(found))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _table(found: list[dict[str, Any]]) -> Table:
    title = f"{N_ROWS} rows of {N_TOKENS} tokens, bf16, forward + backward"
    table = Table("sizes", "", "launches", "sum", "bytes per token-head", "sum", title=title)
    for row in found:
        sizes = " ".join(f"{letter}{size}" for letter, size in row["shape"].items())
        if "missing" in row:
            table.add_row(sizes, row["contestant"], row["missing"])
            continue
        cells = [sizes, row["contestant"]]
        for key, form in (("launches", "{:,.0f}"), ("bytes_per_token_head", "{:,.0f}")):
            parts = [row[part][key] for part in ("forward", "backward")]
            cells += [" + ".join(form.format(part) for part in parts), form.format(sum(parts))]
        table.add_row(*cells)
    return table


def _parts(op: Callable[..., Any], inputs: dict[str, Tensor], n_heads: int) -> dict[str, dict[str, Any]]:
    """What forward and backward launch, and the bytes of that per token and head."""
    parts: dict[str, dict[str, Any]] = {}
    for part, launches in zip(("forward", "backward"), forward_backward(op, inputs), strict=True):
        size = sum(launch.n_bytes for launch in launches) / (N_ROWS * N_TOKENS * n_heads)
        names = [f"{launch.name}{'' if launch.kernel else ' (torch)'}" for launch in launches]
        parts[part] = {"launches": len(launches), "bytes_per_token_head": round(size, 1), "names": names}
    return parts


def _stream(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(N_ROWS, N_TOKENS, *sizes, dtype=dtype, device="meta")


def _per_head(n_heads: int) -> Tensor:
    return torch.empty(n_heads, device="meta")


def _skip_init(name: str, path: str | None) -> None:
    """Make a package importable without running its `__init__`, which asks for what only a GPU build has."""
    if path is None:
        spec = importlib.util.find_spec(name)
        folders = [] if spec is None else list(spec.submodule_search_locations or ())
    else:
        folders = [str(folder) for folder in (Path(path), Path(path) / name) if folder.name == name and folder.is_dir()]
    if not folders:
        raise ImportError(f"no package {name} in {path or 'the environment'}")
    package: Any = types.ModuleType(name)
    package.__path__ = folders
    package.__version__ = "0.0.0"  # modules of fla compare it
    sys.modules[name] = package


if __name__ == "__main__":
    sys.exit(main())
