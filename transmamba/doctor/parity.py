"""A self-test of a few seconds: attention, scan and their junction against float64 on this machine's CPU."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from transmamba.doctor.finding import Finding

if TYPE_CHECKING:
    import torch

    Mix = Callable[[int | float], torch.Tensor]

TOLERANCE = 1e-5
_ROWS, _TOKENS, _HEADS, _WIDTH = 2, 96, 2, 16
_STARTS = ((0, 40, 41), (0, 7))  # documents of many and of one token


def parity_finding() -> Finding:
    """Mix random tokens in float32 for several TransPoints; compare values and gradients with float64.

    The reference takes attention before the TransPoint and the full scan from it on, and has no junction.
    """
    from transmamba.kernels.testing import relative_rms

    worst, name = 0.0, ""
    for point in (0, 1, 17, 40, _TOKENS):
        for found, expected in zip(_mixed(point), _expected(point), strict=True):
            error = relative_rms(found, expected)
            worst, name = max((worst, name), (error, f"TransPoint {point}"))
    value = f"scan, attention and their junction are off float64 by {worst:.1e} of {TOLERANCE:.0e}"
    if not worst <= TOLERANCE:
        fix = f"{name} is wrong: install the versions of requirements.lock, and run `make test`"
        return Finding("self-test", value, "fatal", fix)
    return Finding("self-test", value)


def _mixed(point: int) -> "list[torch.Tensor]":
    """The layer's output in float32, and the gradients of its streams."""
    import torch

    return _run(torch.float32, lambda mix, _: mix(point))


def _expected(point: int) -> "list[torch.Tensor]":
    import torch

    def choose(mix: "Mix", pos_BT: torch.Tensor) -> torch.Tensor:
        is_attention_BTHV = (pos_BT < point)[..., None, None]
        return torch.where(is_attention_BTHV, mix(torch.inf), mix(0))

    return _run(torch.float64, choose)


def _run(dtype: "torch.dtype", choose: "Callable[[Mix, torch.Tensor], torch.Tensor]") -> "list[torch.Tensor]":
    """Output and gradients of what `choose` makes of the mixing, from the same draws for every dtype."""
    import torch

    from transmamba.kernels.documents import Documents
    from transmamba.model.mixing import HeadWeights, MixOptions, TokenStreams, mix_tokens

    draw = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype)

    n_channels = 3 * _HEADS * _WIDTH
    qkv_BTC, dt_BTH = random(_ROWS, _TOKENS, n_channels), random(_ROWS, _TOKENS, _HEADS)
    heads = HeadWeights(random(n_channels, 4), random(n_channels), 0.3 * random(_HEADS), random(_HEADS), random(_HEADS))
    weight_BTHV = random(_ROWS, _TOKENS, _HEADS, _WIDTH)
    documents = Documents.from_starts(_STARTS, _TOKENS)
    streams = TokenStreams(qkv_BTC.requires_grad_(), dt_BTH.requires_grad_())
    options = MixOptions(_WIDTH, "silu", "attention", 10000.0)
    y_BTHV = choose(lambda point: mix_tokens(streams, heads, point, documents, options), documents.pos_BT)
    (y_BTHV * weight_BTHV).sum().backward()
    gradients = [stream.grad for stream in streams if stream.grad is not None]
    return [y_BTHV.detach(), *gradients]
