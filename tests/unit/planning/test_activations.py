"""Bytes kept for the backward against what autograd really saves, of every kind of layer and of the head."""
# B batch, T tokens, D model width.

import math
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tests.kernels.interpreter import repair
from tests.parity import jobs_traffic
from tests.parity.forkserver import run
from transmamba.config import ModelConfig, ParallelConfig
from transmamba.kernels import backend
from transmamba.kernels.documents import Documents
from transmamba.model import attention, mamba2, mixer, norm
from transmamba.model.layer import Layer
from transmamba.model.model import Model
from transmamba.model.recompute import run_or_recompute
from transmamba.parallel import topology as groups
from transmamba.planning.activations import head_saved_bytes, head_working_bytes, in_flight, layer_saved_bytes

SMALL = {"n_layers": 1, "d_model": 32, "n_heads": 4, "d_ff": 48, "ssm_head_dim": 16, "ssm_state": 8, "ssm_groups": 2}
WIDE = {"n_layers": 1, "d_model": 128, "n_heads": 4, "d_ff": 320, "ssm_head_dim": 64, "ssm_state": 64, "ssm_groups": 1}
SHAPES = {"small": (SMALL, 3, 100), "wide": (WIDE, 1, 333)}
CUTS = [{"tp": 2}, {"tp": 2, "sp": True}, {"cp": 2}]
BYTES = {2: torch.bfloat16, 4: torch.float32}


def storages(value: Any) -> Iterator[Tensor]:
    """Tensors in nested tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from storages(item)


def saved_bytes(forward: Callable[[], object], module: nn.Module, patch: pytest.MonkeyPatch) -> int:
    """Distinct storages that autograd saves in a forward, or that a part to be repeated holds on to; no weights."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    found: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    def repeat(again: bool, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        for tensor in storages(inputs) if again else ():
            note(tensor)
        return run_or_recompute(again, function, *inputs)

    with patch.context() as patched, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        # DeepSpeed's stage 3, once used in this process, leaves a product behind that saves other views.
        patched.setattr(nn.functional, "linear", torch._C._nn.linear)  # pyright: ignore[reportAttributeAccessIssue]
        for module_of in (attention, mamba2, mixer):
            patched.setattr(module_of, "run_or_recompute", repeat)
        kept = forward()
    del kept
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in found.items() if pointer not in weights)


def model_of(sizes: dict[str, Any]) -> ModelConfig:
    return ModelConfig.model_validate(sizes)


def layer_bytes(
    model: ModelConfig, kind: str, point: float, B: int, T: int, e: int, patch: pytest.MonkeyPatch, again: bool = False
) -> int:
    """What a real layer saves."""
    layer = Layer(model, kind, recompute_mixing=again)
    for tensor in (*layer.parameters(), *layer.buffers()):
        nn.init.normal_(tensor, std=0.1)
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(BYTES[e])
    x_TBD = torch.randn(T, B, model.d_model, dtype=BYTES[e]).requires_grad_() * 1
    return saved_bytes(lambda: layer(x_TBD, point, Documents.whole(B, T)), layer, patch)


KINDS = [
    pytest.param("transmamba", 0, {}, id="scan"),
    pytest.param("transmamba", 70, {}, id="point"),
    pytest.param("transmamba", math.inf, {}, id="attention"),
    pytest.param("transmamba", 70, {"mixer_norm": "none", "d_skip": False, "d_ff": 0}, id="no norm, skip or ffn"),
    pytest.param("transmamba", 70, {"conv_activation": "none", "rope": "none"}, id="no rope or activation"),
    pytest.param("transmamba", 70, {"rope": "both"}, id="rope both"),
    pytest.param("transformer", math.inf, {}, id="transformer"),
    pytest.param("transformer", math.inf, {"rope": "none", "d_ff": 0}, id="transformer without rope or ffn"),
    pytest.param("mamba2", 0, {}, id="mamba2"),
]


@pytest.mark.parametrize("e", [4, 2])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("kind", "point", "flags"), KINDS)
def test_a_layer_saves_what_the_table_says(
    kind: Any, point: float, flags: dict[str, Any], shape: str, e: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, B, T = SHAPES[shape]
    model = model_of(sizes | flags)
    expected = layer_saved_bytes(model, kind, point, seq_len=T, micro_batch=B, bytes_per_value=e, backend="cpu")
    found = layer_bytes(model, kind, point, B, T, e, monkeypatch)
    assert sum(expected.values()) == pytest.approx(found, rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "point", "again"),
    [("transmamba", 70, True), ("transmamba", math.inf, True), ("transformer", math.inf, True), ("mamba2", 0, True)],
)
@pytest.mark.parametrize("e", [4, 2])
def test_selective_recomputation_keeps_what_the_table_says(
    kind: Any, point: float, again: bool, e: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, B, T = SHAPES["small"]
    model = model_of(sizes)
    keys = {"seq_len": T, "micro_batch": B, "bytes_per_value": e, "backend": "cpu"}
    expected = layer_saved_bytes(model, kind, point, recompute="selective", **keys)
    assert sum(expected.values()) == pytest.approx(
        layer_bytes(model, kind, point, B, T, e, monkeypatch, again), rel=5e-3
    )
    assert sum(expected.values()) < sum(layer_saved_bytes(model, kind, point, **keys).values())


def test_full_recomputation_keeps_the_input_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, B, T = model_of(SMALL), 3, 100
    layer, x_TBD = Layer(model, "transmamba"), torch.randn(T, B, model.d_model).requires_grad_() * 1
    found = saved_bytes(lambda: run_or_recompute(True, layer, x_TBD, 70, Documents.whole(B, T)), layer, monkeypatch)
    keys: dict[str, Any] = {"seq_len": T, "micro_batch": B, "bytes_per_value": 4}
    assert sum(layer_saved_bytes(model, "transmamba", 70, recompute="full", **keys).values()) == found


class FusedNorm(torch.autograd.Function):
    """What torch's norm keeps on a GPU, where it is one kernel: input, weight and scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale * weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise AssertionError("bytes of the forward are counted, nothing else")


@pytest.fixture
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of CUDA tensors, in Triton's interpreter where there is no GPU."""
    repair(monkeypatch)
    monkeypatch.setattr(backend, "runs_triton", lambda stream: True)
    monkeypatch.setattr(norm, "rms_norm", FusedNorm.apply)


@pytest.mark.usefixtures("on_triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled for the GPU, tensors here are on the CPU")
@pytest.mark.parametrize("e", [4, 2])
@pytest.mark.parametrize(
    ("kind", "point", "flags"),
    [
        ("transmamba", 0, {}),
        ("transmamba", 30, {}),
        ("transmamba", 30, {"mixer_norm": "none", "d_skip": False}),
        ("transmamba", math.inf, {}),
        ("transformer", math.inf, {}),
        ("mamba2", 0, {}),
        ("mamba2", 0, {"ssm_groups": 1}),
    ],
)
def test_the_kernels_of_a_gpu_save_what_the_table_says(
    kind: Any, point: float, flags: dict[str, Any], e: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, B, T = model_of(SMALL | flags), 2, 70
    expected = layer_saved_bytes(model, kind, point, seq_len=T, micro_batch=B, bytes_per_value=e)
    assert sum(expected.values()) == pytest.approx(layer_bytes(model, kind, point, B, T, e, monkeypatch), rel=2e-3)


@pytest.mark.parametrize("e", [4, 2])
@pytest.mark.parametrize("on", ["cpu", "triton"])
def test_the_head_saves_what_the_table_says(on: Any, e: Any, request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if on == "triton":
        request.getfixturevalue("on_triton")
    B, T, n_rows = 2, 40, 384
    config = model_of(SMALL | {"tied": False})
    model = Model(config, ["transmamba"], n_tokens_known=n_rows - 30, n_rows=n_rows, seed=1)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(BYTES[e])
    x_TBD = torch.randn(T, B, config.d_model, dtype=BYTES[e]).requires_grad_() * 1
    targets_BT, weight_BT = torch.zeros(B, T, dtype=torch.int64), torch.rand(B, T)
    outputs = []

    def forward() -> Tensor:
        nll_TB, _ = model.head(model.final(x_TBD), targets_BT.T)
        outputs.append(nll_TB)
        return (nll_TB * weight_BT.T).sum()

    keys = {"seq_len": T, "micro_batch": B, "bytes_per_value": e}
    expected = head_saved_bytes(config, n_rows, backend=on, **keys)
    found = saved_bytes(forward, model, monkeypatch)
    kept_TE = outputs[0].grad_fn.next_functions[0][0].kept_TE  # beside what the hooks are told
    assert (kept_TE is None) == (on == "triton")
    found += 0 if kept_TE is None else kept_TE.untyped_storage().nbytes()
    assert sum(expected.values()) == pytest.approx(found, rel=0.02)


def test_many_logits_are_cut_into_chunks() -> None:
    few, many = (
        head_working_bytes(model_of(SMALL), rows, seq_len=T, micro_batch=1, bytes_per_value=2)["logits of a chunk"]
        for rows, T in ((1024, 1024), (131_072, 8192))
    )
    assert few == 1024 * 1024 * 2
    assert many == 8192 * 131_072 * 2 // 8


@pytest.mark.parametrize(("pp", "vpp"), [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 3)])
def test_more_micro_batches_are_never_fewer_in_flight(pp: int, vpp: int) -> None:
    for rank in range(pp):
        counts = [in_flight(pp, vpp, n, rank) for n in range(pp, 6 * pp)]
        assert counts == sorted(counts)
        assert counts[-1] <= pp + (pp - 1) / vpp


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(("pp", "vpp", "n_micro"), [(2, 1, 1), (2, 1, 6), (2, 2, 4), (2, 3, 2), (4, 1, 6)])
def test_micro_batches_in_flight_are_those_of_the_recorded_schedule(pp: int, vpp: int, n_micro: int) -> None:
    orders = run(pp, jobs_traffic.events, {"pp": pp, "vpp": vpp}, n_micro)
    for rank, order in enumerate(orders):
        held = accumulate(1 if kind == "F" else -1 for kind, _, _ in order)
        assert in_flight(pp, vpp, n_micro, rank) == max(held) / vpp


@pytest.mark.parametrize(("pp", "vpp", "n_micro", "rank"), [(2, 1, 4, 2), (2, 1, 4, -1), (0, 1, 4, 0), (2, 0, 4, 0)])
def test_a_stage_that_does_not_exist_is_refused(pp: int, vpp: int, n_micro: int, rank: int) -> None:
    with pytest.raises(ValueError, match="micro-batches"):
        in_flight(pp, vpp, n_micro, rank)


def local_bytes(sizes: dict[str, Any], kind: str, point: float, options: dict[str, Any], B: int, T: int) -> int:
    """On a rank of a group: what a layer cut as `options` say saves of B windows of T tokens, in float32."""
    model, shards = model_of(sizes), groups.start(ParallelConfig.model_validate(options)).shards
    layer = Layer(model, kind, shards)
    for tensor in (*layer.parameters(), *layer.buffers()):
        nn.init.normal_(tensor, std=0.1)
    n_own = T // shards.cp // (shards.tp if shards.sequence else 1)
    x_TBD = torch.randn(n_own, B, model.d_model).requires_grad_() * 1
    with pytest.MonkeyPatch.context() as patch:
        return saved_bytes(lambda: layer(x_TBD, point, Documents.whole(B, T)), layer, patch)


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(
    ("kind", "options", "groups_of_mamba2"),
    [
        *((kind, cut, 2) for kind in ("transmamba", "transformer", "mamba2") for cut in CUTS),
        pytest.param("mamba2", {"cp": 2}, 1, id="both ranks have a copy of B and C"),
    ],
)
def test_a_cut_layer_saves_what_the_table_says(kind: Any, options: dict[str, Any], groups_of_mamba2: int) -> None:
    sizes = SMALL | {"ssm_groups": groups_of_mamba2}
    B, T, point = 2, 80, {"transmamba": 30, "transformer": math.inf, "mamba2": 0}[kind]
    found = run(2, local_bytes, sizes, kind, point, options, B, T)
    expected = layer_saved_bytes(
        model_of(sizes), kind, point, seq_len=T, micro_batch=B, bytes_per_value=4, backend="cpu", **options
    )
    assert found == [pytest.approx(sum(expected.values()), rel=5e-3)] * 2
