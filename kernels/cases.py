"""Every operation that has kernels for a GPU, with the flags it is checked under: data for tests and tools.

The interpreter tests run the small shapes on the CPU, `transmamba doctor --kernels` the large ones on a GPU, and
`compiled` compiles what training launches. An operation is added by one entry of `OPERATIONS`.
"""

# B batch, T tokens, H heads, G groups of B and C, N key/state width, V value width, P prefix, C channels,
# K conv taps, D model width, E vocabulary entries.

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from transmamba.kernels.attention import prefix_attention
from transmamba.kernels.attention.reference import attention_loop
from transmamba.kernels.causal_conv import causal_conv
from transmamba.kernels.causal_conv.reference import conv_loop
from transmamba.kernels.cross_entropy import cross_entropy
from transmamba.kernels.cross_entropy.reference import cross_entropy_reference
from transmamba.kernels.documents import Documents
from transmamba.kernels.gated_norm import gated_rms_norm
from transmamba.kernels.gated_norm.reference import gated_rms_norm_reference
from transmamba.kernels.rope import rope_qk
from transmamba.kernels.rope.reference import rope_qk_reference
from transmamba.kernels.ssd import ssd_scan
from transmamba.kernels.ssd.reference import scan_loop

Shape = tuple[int, ...]
Device = torch.device | str
Op = Callable[..., Tensor | tuple[Tensor, ...]]
Inputs = tuple[dict[str, Tensor], dict[str, Any]]
# The interpreter truncates where a GPU rounds to bfloat16: up to a unit in the last place.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


SCAN_KERNELS = ("scan_fwd_kernel", "state_bwd_kernel", "prefix_bwd_kernel", "chunk_bwd_kernel")


@dataclass(frozen=True)
class Limits:
    """What the compiler must make of an operation's kernels on Hopper, by kernel name.

    Attributes:
        spills: spill stores allowed; 0 for a kernel that is not named.
        wgmma: kernels whose matrix products must run on Hopper's warpgroup instructions, all of them.
    """

    spills: dict[str, int] = field(default_factory=dict)
    wgmma: tuple[str, ...] = ()


@dataclass(frozen=True)
class Operation:
    """A public operation and how to check it.

    Attributes:
        name: its folder.
        op: the public function.
        reference: its definition, for float64.
        make: (shape, dtype, device, **flags) to the tensors, which are random, and the other arguments, which are
            not; both by name.
        flags: the ways it is called, each with arguments of `make`.
        small: an odd shape for the interpreter.
        large: shapes that a GPU is checked at; the reference runs on its CPU.
        training: shapes of training, for the compiler.
        tolerance: relative RMS error allowed, by dtype of the inputs.
        limits: of its compiled kernels.
    """

    name: str
    op: Op
    reference: Op
    make: Callable[..., Inputs]
    flags: tuple[dict[str, Any], ...]
    small: Shape
    large: tuple[Shape, ...]
    training: tuple[Shape, ...]
    tolerance: dict[torch.dtype, float] = field(default_factory=lambda: dict(TOLERANCE))
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Problem:
    """Two functions of the same tensors that must agree."""

    op: Op
    reference: Op
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """An operation called in one way."""

    operation: Operation
    flags: dict[str, Any]

    @property
    def name(self) -> str:
        """For people, and for `--only`."""
        return " ".join([self.operation.name, *(f"{name}={value}" for name, value in self.flags.items())])

    def problem(self, shape: Shape, dtype: torch.dtype, device: Device) -> Problem:
        """Inputs drawn from torch's global generator, and what to call with them by name."""
        tensors, others = self.operation.make(shape, dtype, device, **self.flags)
        op, reference = (partial(function, **others) for function in (self.operation.op, self.operation.reference))
        return Problem(op, reference, tensors)


def cases(only: str = "") -> Iterator[Case]:
    """All cases whose name contains `only`."""
    for operation in OPERATIONS:
        found = (Case(operation, flags) for flags in operation.flags)
        yield from (case for case in found if only in case.name)


def _norm_inputs(shape: Shape, dtype: torch.dtype, device: Device, gate: str) -> Inputs:
    tensors = {
        "y_BTHV": torch.randn(shape, dtype=dtype, device=device),
        "weight_HV": torch.randn(shape[2:], device=device),
    }
    if gate != "none":
        tensors["z_BTHV"] = torch.randn(shape, dtype=dtype, device=device)
    if gate == "some":
        tensors["gate_BT"] = torch.rand(shape[:2], device=device) > 0.4
    return tensors, {}


def _rope_inputs(shape: Shape, dtype: torch.dtype, device: Device, time_first: bool) -> Inputs:
    n_rows, n_tokens, n_heads, width = shape
    sizes = (n_tokens, n_rows) if time_first else (n_rows, n_tokens)
    # as the layer has them: two thirds of every head's row
    qkv = torch.randn(*sizes, n_heads, 3 * width, device=device).to(dtype)
    pos = torch.randint(131_072, sizes, device=device)
    if time_first:
        qkv, pos = qkv.transpose(0, 1), pos.T
    q_BTHN, k_BTHN, _ = qkv.chunk(3, dim=-1)
    return {"q_BTHN": q_BTHN, "k_BTHN": k_BTHN, "pos_BT": pos}, {}


def _attention_inputs(shape: Shape, dtype: torch.dtype, device: Device, documents: bool, share: float) -> Inputs:
    n_rows, n_tokens, *_ = shape
    streams = {name: torch.randn(shape, device=device).to(dtype) for name in ("q_BTHN", "k_BTHN", "v_BTHV")}
    found = _documents(n_rows, n_tokens, device) if documents else Documents.whole(n_rows, n_tokens, device)
    return streams, {"documents": found, "prefix": share * n_tokens}


def _documents(n_rows: int, n_tokens: int, device: Device) -> Documents:
    """A document over several chunks, one of a single token, and a start that no chunk begins with."""
    starts = [sorted({0, 1, n_tokens // 3 + row, n_tokens - 1}) for row in range(n_rows)]
    return Documents.from_starts(starts, n_tokens, device)


def _conv_inputs(shape: Shape, dtype: torch.dtype, device: Device, documents: bool, tail: bool, act: str) -> Inputs:
    n_rows, n_tokens, n_channels, n_taps = shape
    tensors = {
        "x_BTC": torch.randn(n_rows, n_tokens, n_channels, dtype=dtype, device=device),
        "weight_CK": torch.randn(n_channels, n_taps, device=device),
        "bias_C": torch.randn(n_channels, device=device),
    }
    if tail:
        tensors["tail_BKC"] = torch.randn(n_rows, n_taps - 1, n_channels, dtype=dtype, device=device)
    return tensors, {"documents": _documents(n_rows, n_tokens, device) if documents else None, "activation": act}


def _scan_inputs(shape: Shape, dtype: torch.dtype, device: Device, given: str) -> Inputs:
    n_rows, n_tokens, n_heads, n_groups, n_keys, n_values = shape
    draw = partial(torch.randn, device=device)
    # keys of length 1 on average, as after a norm: else states grow with their width
    keys = {name: draw(n_rows, n_tokens, n_groups, n_keys) * n_keys**-0.5 for name in ("c_BTGN", "b_BTGN")}
    tensors = {name: stream.to(dtype) for name, stream in keys.items()}
    tensors["x_BTHV"] = draw(n_rows, n_tokens, n_heads, n_values).to(dtype)
    dt_BTH = draw(n_rows, n_tokens, n_heads) - 2.0
    tensors["dt_BTH"] = dt_BTH if "bias" in given else softplus(dt_BTH)
    tensors["A_H"] = -torch.exp(torch.rand(n_heads, device=device))
    if "bias" in given:
        tensors |= {"dt_bias_H": draw(n_heads), "D_H": draw(n_heads)}
    if "state" in given:
        tensors["initial_state_BHNV"] = draw(n_rows, n_heads, n_keys, n_values)
    if "before" in given:
        tensors["before_BPHV"] = draw(n_rows, n_tokens, n_heads, n_values).to(dtype)
    return tensors, {
        "documents": _documents(n_rows, n_tokens, device) if "documents" in given else None,
        "transpoint": n_tokens // 5 if "transpoint" in given else 0,
    }


def _loss_inputs(shape: Shape, dtype: torch.dtype, device: Device, padding: int) -> Inputs:
    n_tokens, width, n_entries = shape
    tensors = {
        "x_TD": torch.randn(n_tokens, width, device=device).to(dtype),
        "weight_ED": (torch.randn(n_entries, width, device=device) * width**-0.5).to(dtype),
        "entry_T": torch.randint(n_entries - padding, (n_tokens,), device=device),
    }
    return tensors, {"n_known": n_entries - padding}


_SCAN = Operation(
    name="ssd",
    op=ssd_scan,
    reference=scan_loop,
    make=_scan_inputs,
    flags=({"given": "streams"},),
    small=(2, 70, 4, 2, 16, 20),
    large=((1, 600, 4, 4, 64, 64),),
    training=((8, 8192, 32, 32, 64, 64),),
    # The gradient of A is a sum over tokens that nearly cancels.
    tolerance={torch.float32: 5e-5, torch.bfloat16: 2e-2},
    limits=Limits(wgmma=SCAN_KERNELS),
)

OPERATIONS = (
    _SCAN,
    replace(
        _SCAN,
        name="ssd",
        flags=tuple(
            {"given": given} for given in ("bias+state", "bias+transpoint+before", "bias+documents+transpoint+before")
        ),
    ),
    replace(
        _SCAN,
        name="ssd wide",
        flags=({"given": "streams"}, {"given": "bias+documents+transpoint+before"}),
        large=((1, 600, 2, 2, 128, 128), (1, 600, 4, 1, 128, 64)),
        training=((8, 8192, 16, 16, 128, 128), (8, 8192, 32, 1, 128, 64)),
        # A gradient of 64 x 128 is 64 registers a thread, and two products feed each.
        limits=Limits(spills={"chunk_bwd_kernel": 16}, wgmma=SCAN_KERNELS),
    ),
    Operation(
        name="causal_conv",
        op=causal_conv,
        reference=conv_loop,
        make=_conv_inputs,
        flags=(
            {"documents": False, "tail": False, "act": "silu"},
            {"documents": True, "tail": False, "act": "silu"},
            {"documents": False, "tail": True, "act": "none"},
        ),
        small=(2, 37, 20, 4),
        large=((2, 300, 1024, 4),),
        training=((8, 8192, 6144, 4),),
    ),
    Operation(
        name="gated_norm",
        op=gated_rms_norm,
        reference=gated_rms_norm_reference,
        make=_norm_inputs,
        flags=({"gate": "all"}, {"gate": "some"}, {"gate": "none"}),
        small=(3, 25, 3, 20),
        large=((2, 600, 16, 64), (2, 600, 8, 128)),
        training=((8, 8192, 32, 64), (8, 8192, 16, 128)),
    ),
    Operation(
        name="attention",
        op=prefix_attention,
        reference=attention_loop,
        make=_attention_inputs,
        flags=tuple({"documents": documents, "share": share} for documents in (False, True) for share in (0.2, 1.0)),
        small=(2, 37, 3, 8),
        large=((2, 300, 4, 64), (2, 300, 3, 128)),
        # Its kernels are torch's: there is nothing to compile.
        training=(),
        # Weights are rounded to bfloat16 before they meet the values.
        tolerance={torch.float32: 1e-5, torch.bfloat16: 2e-2},
    ),
    Operation(
        name="rope",
        op=rope_qk,
        reference=rope_qk_reference,
        make=_rope_inputs,
        flags=({"time_first": False}, {"time_first": True}),
        small=(3, 25, 3, 20),
        large=((2, 600, 16, 64), (2, 600, 7, 96)),
        training=((8, 8192, 32, 64), (8, 8192, 16, 128)),
    ),
    Operation(
        name="cross_entropy",
        op=cross_entropy,
        reference=cross_entropy_reference,
        make=_loss_inputs,
        flags=({"padding": 0}, {"padding": 100}),
        small=(9, 12, 140),
        large=((600, 128, 32768),),
        training=((8192, 2048, 32768),),
    ),
)
