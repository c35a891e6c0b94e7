"""Initial weights: pure functions of global name, shape and seed, so that every layout starts from the same model."""

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from transmamba.config import ModelConfig
from transmamba.parallel.shards import WHOLE, Shards, global_shape, shard_dim


def generator(name: str, seed: int) -> torch.Generator:
    """A CPU random stream of its own for every tensor name."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def initial(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """Initial value (float32, CPU) of one global tensor.

    Matrices are N(0, init_std), the two output projections of a layer divided by sqrt(2 n_layers) (GPT-2, Megatron);
    A_log, dt_bias and D follow Mamba-2 (A uniform in 1..16, time steps log-uniform in dt_min..dt_max).
    """
    draw = generator(name, seed)
    leaf = name.rsplit(".", 2)[-2:]
    match leaf:
        case [_, "offset"]:
            return torch.zeros(shape)
        case ["A_log", "start"]:
            return torch.empty(shape).uniform_(1, 16, generator=draw).log()
        case ["D", "start"]:
            return torch.ones(shape)
        case ["dt_bias", "start"]:
            low, high = math.log(config.dt_min), math.log(config.dt_max)
            dt = torch.empty(shape).uniform_(low, high, generator=draw).exp().clamp(min=1e-4)
            return dt + torch.log(-torch.expm1(-dt))  # inverse of softplus
        case ["conv", _]:
            bound = config.conv_width**-0.5
            return torch.empty(shape).uniform_(-bound, bound, generator=draw)
        case ["norm" | "mixer_norm" | "ffn_norm" | "final_norm", _]:
            return torch.ones(shape)
    std = config.init_std
    if leaf[0] in ("out", "down"):
        std /= math.sqrt(2 * config.n_layers)
    return torch.empty(shape).normal_(0.0, std, generator=draw)


@torch.no_grad()
def initialise(
    module: nn.Module, config: ModelConfig, seed: int, prefix: str = "", shards: Shards = WHOLE, *, tied: bool = False
) -> None:
    """Fill every parameter and buffer of `module` in place with this rank's slices of the global tensors.

    Args:
        prefix: the global name of `module` itself.
        shards: how its tensors are cut.
        tied: the output projection is the embedding, also where a stage holds a copy of its own.
    """
    for name, tensor, dim in named_slices(module):
        whole_name = global_name(prefix + name, tied)
        whole = initial(whole_name, global_shape(tensor.shape, dim, shards.tp), config, seed)
        tensor.copy_(shards.slice_of(whole, dim))


def named_slices(module: nn.Module) -> Iterator[tuple[str, Tensor, int | None]]:
    """Parameters and buffers by name, with the dimension along which each is cut over tp."""
    dims = {name: shard_dim(parameter) for name, parameter in module.named_parameters()}
    for name, parameter in module.named_parameters():
        yield name, parameter, dims[name]
    for name, buffer in module.named_buffers():
        yield name, buffer, dims[name.removesuffix("start") + "offset"]  # all buffers are `PerHead.start`


def global_name(name: str, tied: bool) -> str:
    """Name of the tensor in the whole model: a stage's copy of the tied embedding is the embedding."""
    return "embedding.weight" if tied and name == "head.weight" else name
