"""The loss without logits against the loss with all of them, on the torch path and in Triton's interpreter."""
# T tokens, D model width, E vocabulary entries.

import json
import os
import re
import subprocess
import sys
import tempfile
import weakref
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from transmamba.kernels import backend
from transmamba.kernels.cross_entropy import cross_entropy, local, triton_chunks
from transmamba.kernels.cross_entropy.local import gradients, statistics
from transmamba.kernels.cross_entropy.reference import cross_entropy_reference
from transmamba.kernels.testing import assert_close, assert_matches_reference, values_and_gradients

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
FP32 = 1e-6  # relative RMS against float64
BF16 = 6e-3
WIDTH = 6


@pytest.fixture(params=["torch", "triton"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(backend, "runs_triton", lambda stream: request.param == "triton" and runs_float32(stream))
    return request.param


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """At least three chunks, of multiples of four entries."""
    for name, value in {"KEPT": 0, "N_CHUNKS": 3, "NARROWEST": 4, "ALIGNED": 4}.items():
        monkeypatch.setattr(local, name, value)


def runs_float32(stream: Tensor) -> bool:
    return stream.dtype != torch.float64


def inputs(n_tokens: int, n_entries: int, n_known: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    weight_ED = torch.randn(n_entries, WIDTH).to(dtype)
    return {
        "x_TD": torch.randn(n_tokens, WIDTH).to(dtype),
        "weight_ED": weight_ED,
        "entry_T": torch.randint(0, n_known, (n_tokens,)),
    }


def check(values: dict[str, Any], n_known: int, tol: float | None = FP32) -> dict[str, Tensor]:
    op, reference = (partial(function, n_known=n_known) for function in (cross_entropy, cross_entropy_reference))
    found = assert_matches_reference(op, reference, values, tol)
    assert found["gradient of weight_ED"][n_known:].eq(0).all()
    return found


SIZES = [(1, 1, 1), (7, 37, 37), (3, 64, 50), (2, 600, 577)]


@pytest.mark.parametrize(("n_tokens", "n_entries", "n_known"), SIZES)
def test_one_chunk_matches_the_definition(path: str, n_tokens: int, n_entries: int, n_known: int) -> None:
    check(inputs(n_tokens, n_entries, n_known), n_known)


@pytest.mark.parametrize(("n_tokens", "n_entries", "n_known"), SIZES)
def test_chunks_match_the_definition(
    path: str, small_chunks: None, n_tokens: int, n_entries: int, n_known: int
) -> None:
    check(inputs(n_tokens, n_entries, n_known), n_known)


def test_several_blocks_of_a_chunk_match_the_definition(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_chunks, "WIDEST_BLOCK", 256)
    check(inputs(3, 700, 690), 690)


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, None), (torch.bfloat16, BF16)], ids=str)
def test_other_precisions(path: str, small_chunks: None, dtype: torch.dtype, tol: float | None) -> None:
    found = check(inputs(9, 61, 50, dtype), 50, tol)
    assert found["gradient of x_TD"].dtype == found["gradient of weight_ED"].dtype == dtype
    assert found["output 0"].dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("n_known", [31, 32, 33])
def test_targets_on_the_edges_of_chunks(path: str, small_chunks: None, n_known: int) -> None:
    chunks = list(local.chunks_of(6, 40, n_known))
    edges = [column for chunk in chunks for column in (chunk.first, chunk.first + chunk.n_known - 1)]
    assert len(edges) >= 6
    values = inputs(len(edges), 40, n_known)
    check({**values, "entry_T": torch.tensor(edges)}, n_known)


def test_a_target_elsewhere_has_logit_zero_and_one_on_padding_none(path: str, small_chunks: None) -> None:
    values = inputs(6, 40, 30)
    values["entry_T"] = torch.tensor([-1, 40, 41, -40, 29, 10_000])
    check(values, 30)
    padding = {**values, "entry_T": torch.tensor([30, 31, 32, 33, 38, 39])}
    found = values_and_gradients(partial(cross_entropy, n_known=30), padding)
    assert found["output 0"].eq(torch.inf).all() and found["gradient of weight_ED"][30:].eq(0).all()


@pytest.mark.parametrize(("spread", "shift"), [(2000.0, 0.0), (0.5, 1e4), (0.5, -1e4)])
def test_logits_of_ten_thousand_lose_nothing(path: str, small_chunks: None, spread: float, shift: float) -> None:
    values = inputs(6, 40, 40)
    # multiples of 1/64 below 2^14: exact in float32, so that only the loss itself can be wrong
    values["x_TD"] = torch.randint(-1, 2, (6, WIDTH)).float()
    values["x_TD"][:, 0] = 1
    values["weight_ED"] = torch.randint(-1, 2, (40, WIDTH)) * spread
    values["weight_ED"][:, 0] = torch.randint(-64, 64, (40,)) / 64 + shift
    assert (values["x_TD"] @ values["weight_ED"].T).abs().amax() >= 6000
    check(values, 40)


@pytest.mark.parametrize("n_weighted", [0, 2])
def test_tokens_of_weight_zero_have_gradient_zero(path: str, small_chunks: None, n_weighted: int) -> None:
    values = inputs(5, 40, 37)
    leaves = [values[name].requires_grad_() for name in ("x_TD", "weight_ED")]
    weight_T = (torch.arange(5) < n_weighted).float()
    nll_T, log_partition_T = cross_entropy(**values, n_known=37)
    ((nll_T + 0.1 * log_partition_T.square()) * weight_T).sum().backward()
    dx_TD, dweight_ED = (leaf.grad for leaf in leaves)
    assert dx_TD is not None and dweight_ED is not None
    assert dx_TD[n_weighted:].eq(0).all() and dx_TD[:n_weighted].ne(0).all()
    assert dweight_ED.ne(0).any() == (n_weighted > 0)


@pytest.mark.parametrize(("n_tokens", "n_known"), [(4, 0), (0, 40)])
def test_a_rank_without_entries_or_tokens(path: str, n_tokens: int, n_known: int) -> None:
    x_TD, weight_ED, entry_T = torch.randn(n_tokens, WIDTH), torch.randn(40, WIDTH), torch.full((n_tokens,), -3)
    found = statistics(x_TD, weight_ED, entry_T, n_known)
    assert found.largest_T.eq(-torch.inf).all() and found.total_T.eq(0).all() and found.target_T.eq(0).all()
    ones_T, share_T = torch.ones(n_tokens), torch.zeros(n_tokens)
    saved = x_TD, weight_ED, entry_T, found.largest_T, share_T
    for gradient in gradients(*saved, ones_T, ones_T, n_known=n_known, kept_TE=None):
        assert gradient.eq(0).all()


def test_statistics_are_those_of_the_logits(path: str, small_chunks: None) -> None:
    values = inputs(9, 70, 66)
    found = statistics(**values, n_known=66)
    logits_TE = values["x_TD"].double() @ values["weight_ED"][:66].double().T
    largest_T = logits_TE.amax(-1)
    assert_close(found.largest_T, largest_T, FP32)
    assert_close(found.total_T, (logits_TE - largest_T[:, None]).exp().sum(-1), FP32)
    assert_close(found.target_T, logits_TE.gather(1, values["entry_T"][:, None])[:, 0], FP32)
    assert found.kept_TE is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_are_equal_bit_by_bit(path: str, small_chunks: None, dtype: torch.dtype) -> None:
    values = inputs(4, 70, 66, dtype)
    first, second = (values_and_gradients(partial(cross_entropy, n_known=66), values) for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_another_backward_computes_again_what_the_first_overwrote() -> None:
    values = inputs(9, 40, 37)
    x_TD = values["x_TD"].requires_grad_()
    nll = cross_entropy(**values, n_known=37)[0].sum()
    first, second = (torch.autograd.grad(nll, x_TD, retain_graph=True)[0] for _ in range(2))
    assert_close(second, first.double(), FP32)


class LogitBytes(TorchDispatchMode):
    """Largest number of bytes alive at once in tensors [T, several], the hidden states apart."""

    def __init__(self, n_tokens: int) -> None:
        super().__init__()
        self.n_tokens, self.peak = n_tokens, 0
        self.owners: Counter[tuple[int, int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.shape[0] == self.n_tokens:
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.shape[1] in (1, WIDTH):
            return
        key = storage._cdata, storage.nbytes()
        self.owners[key] += 1
        weakref.finalize(tensor, self.owners.subtract, [key])
        self.peak = max(self.peak, sum(n_bytes for (_, n_bytes), count in self.owners.items() if count > 0))


@pytest.mark.parametrize("n_entries", [4096, 5000])
def test_at_most_an_eighth_of_the_logits_is_there_at_once(
    path: str, monkeypatch: pytest.MonkeyPatch, n_entries: int
) -> None:
    monkeypatch.setattr(local, "KEPT", 0)
    values = inputs(5, n_entries, n_entries - 7)
    leaves = {name: value.requires_grad_() for name, value in values.items() if value.is_floating_point()}
    meter = LogitBytes(5)
    with meter:
        nll_T, log_partition_T = cross_entropy(**{**values, **leaves}, n_known=n_entries - 7)
        (nll_T + log_partition_T.square()).sum().backward()
    assert 0 < meter.peak <= 5 * n_entries * 4 / 8


def test_the_meter_sees_the_logits_of_the_definition() -> None:
    values = inputs(11, 4096, 4096)
    meter = LogitBytes(11)
    with meter:
        cross_entropy_reference(**values)
    assert meter.peak >= 11 * 4096 * 4


@given(n_tokens=st.integers(1, 10**6), n_entries=st.integers(1, 300_000), padding=st.integers(0, 200))
@settings(derandomize=True, database=None, max_examples=200, deadline=None)
def test_chunks_cover_the_known_entries_once(n_tokens: int, n_entries: int, padding: int) -> None:
    n_known = max(n_entries - padding, 1)
    chunks = list(local.chunks_of(n_tokens, n_entries, n_known))
    stops = [0, *(chunk.first + chunk.width for chunk in chunks)]
    assert [chunk.first for chunk in chunks] == stops[:-1] and stops[-1] <= n_entries
    assert sum(chunk.n_known for chunk in chunks) == n_known and min(chunk.n_known for chunk in chunks) > 0
    widest = max(chunk.width for chunk in chunks)
    assert all(chunk.width == widest for chunk in chunks[:-1])
    if n_tokens * n_entries <= local.KEPT:
        assert len(chunks) == 1
    elif n_known >= local.N_CHUNKS * local.NARROWEST:
        assert local.N_CHUNKS <= len(chunks) <= local.N_CHUNKS + 2 and widest <= n_entries / local.N_CHUNKS
    else:
        assert len(chunks) <= local.N_CHUNKS


@given(
    n_tokens=st.integers(1, 4),
    n_entries=st.integers(1, 70),
    padding=st.integers(0, 40),
    kept=st.sampled_from([0, 1 << 24]),
    narrowest=st.sampled_from([12, 20]),
)
@settings(
    derandomize=True,
    database=None,
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_size_matches_the_definition(
    path: str, n_tokens: int, n_entries: int, padding: int, kept: int, narrowest: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"KEPT": kept, "N_CHUNKS": 3, "NARROWEST": narrowest, "ALIGNED": 4}.items():
            patch.setattr(local, name, value)
        n_known = max(n_entries - padding, 1)
        values = inputs(n_tokens, n_entries, n_known)
        check({**values, "weight_ED": values["weight_ED"] * 0.3}, n_known, 2e-6)


def test_bad_arguments_are_refused() -> None:
    x_TD, weight_ED, entry_T = torch.ones(3, 4), torch.ones(5, 4), torch.zeros(3, dtype=torch.long)
    for wrong in (
        (x_TD[:, :3], weight_ED, entry_T),
        (x_TD, weight_ED, entry_T[:2]),
        (x_TD, weight_ED.double(), entry_T),
    ):
        with pytest.raises(ValueError, match="do not match"):
            cross_entropy(*wrong)
    with pytest.raises(ValueError, match="6 known entries of 5"):
        cross_entropy(x_TD, weight_ED, entry_T, n_known=6)


def test_kernels_compile_for_hopper_without_spills_and_with_wide_loads(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["kernel"] for row in rows] == ["add_chunk_kernel", "to_gradient_kernel"]
    for row in rows:
        assert row["spill_bytes"] == 0 and 0 < row["registers"] <= 64 and row["wide_loads"] == 2, row


def compile_for_hopper() -> None:
    """Both kernels on a wide bfloat16 chunk whose count of known entries is odd; a JSON line each."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {"logits_pointer": "*bf16", "entry_pointer": "*i64", "BLOCK": "constexpr"}
    for kernel in (triton_chunks.add_chunk_kernel, triton_chunks.to_gradient_kernel):
        names: list[str] = kernel.arg_names
        signature = {name: types.get(name, "*fp32" if name.endswith("_pointer") else "i32") for name in names}
        aligned = [name.endswith("_pointer") or name in ("n_columns", "stride") for name in names]
        hints = {(index,): [["tt.divisibility", 16]] for index, is_aligned in enumerate(aligned) if is_aligned}
        source = ASTSource(kernel, signature, {"BLOCK": triton_chunks.WIDEST_BLOCK}, hints)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            command = [CUOBJDUMP, "--dump-resource-usage", cubin.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack, local = (
            int(re.search(rf"{name}:(\d+)", usage)[1])  # pyright: ignore[reportOptionalSubscript]
            for name in ("REG", "STACK", "LOCAL")
        )
        wide = len(re.findall(r"ld\.global\.v4", compiled.asm["ptx"]))
        row = {"registers": registers, "spill_bytes": stack + local, "wide_loads": wide}
        print(json.dumps({"kernel": kernel.__name__, **row}))


if __name__ == "__main__":
    compile_for_hopper()
