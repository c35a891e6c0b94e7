"""How layers are cut over ranks: heads and widths by tensor parallelism, tokens by context and sequence parallelism.

A layer asks its `Shards` for sizes, marks its weights with it and calls it where tokens or partial sums change
hands. On one rank every exchange is the identity and no process group is needed. The exchanges are megatron-core's
autograd functions: one gather serves all projections of a mixer, and what it gathered is kept for the backward.
"""

# B batch, T tokens of the window, D model width, C channels.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)


@dataclass(frozen=True)
class Shards:
    """This rank's part of every layer.

    Attributes:
        tp, tp_rank, tp_group: ranks that share the heads and widths of one layer.
        cp, cp_rank, cp_group: ranks that share the tokens of one window.
        sequence: outside the mixers and feed-forward networks, the tp ranks share the tokens too.
    """

    tp: int = 1
    tp_rank: int = 0
    tp_group: Any = None
    cp: int = 1
    cp_rank: int = 0
    cp_group: Any = None
    sequence: bool = False

    def local(self, n: int) -> int:
        """This rank's share of `n` heads, groups, channels or rows.

        Raises:
            ValueError: tp does not divide `n`.
        """
        if n % self.tp:
            raise ValueError(f"{self.tp} tensor-parallel ranks do not divide {n}")
        return n // self.tp

    def split(self, module: AnyModule, dim: int = 0) -> AnyModule:
        """Mark the weights of `module` as this rank's slice of global tensors along `dim`; returns it."""
        for parameter in module.parameters():
            mark_split(parameter, dim, self.tp)
        return module

    def slice_of(self, whole: Tensor, dim: int | None) -> Tensor:
        """This rank's slice of a global tensor that is cut along `dim`; all of it where it is not cut."""
        return whole if dim is None else whole.chunk(self.tp, dim)[self.tp_rank]

    def replicated(self, module: AnyModule) -> AnyModule:
        """Weights that every tp rank holds whole; returns the module.

        Under sequence parallelism each rank applies them to its own tokens only, so their gradients are summed,
        by a hook, because ZeRO takes the gradients away during the backward.
        """
        if self.sequence and self.tp > 1:
            for parameter in module.parameters():
                parameter.register_hook(self._sum_over_tp)
        return module

    def gather_tokens(self, x_TBD: Tensor) -> Tensor:
        """Into tensor-parallel work: all tokens of this cp rank, whose gradients come back summed over tp."""
        if self.tp == 1:
            return x_TBD
        from megatron.core.tensor_parallel import mappings

        if self.sequence:
            return mappings.gather_from_sequence_parallel_region(x_TBD, group=self.tp_group)
        entered_TBD = mappings.copy_to_tensor_model_parallel_region(x_TBD, group=self.tp_group)
        if entered_TBD.requires_grad:
            # The all-reduce behind this leaves a tensor that is not contiguous as it was, without a word.
            entered_TBD.register_hook(lambda gradient: gradient.contiguous())
        return entered_TBD

    def sum_partial(self, x_TBD: Tensor) -> Tensor:
        """Out of tensor-parallel work: partial sums added up, every rank keeping the tokens it owns."""
        if self.tp == 1:
            return x_TBD
        from megatron.core.tensor_parallel import mappings

        if self.sequence:
            return mappings.reduce_scatter_to_sequence_parallel_region(x_TBD.contiguous(), group=self.tp_group)
        return mappings.reduce_from_tensor_model_parallel_region(x_TBD.contiguous(), group=self.tp_group)

    def tokens_to_heads(self, *streams_TBC: Tensor) -> list[Tensor]:
        """Trade tokens for heads: from all channels of this cp rank's tokens to this rank's channels of all tokens.

        Every stream's channels lie head by head, so that the shard of a rank is contiguous; all go in one exchange.
        """
        if self.cp == 1:
            return list(streams_TBC)
        shards = [stream.unflatten(-1, (self.cp, -1)) for stream in streams_TBC]
        received = self._exchange(torch.cat(shards, -1).permute(2, 0, 1, 3))
        return list(received.flatten(0, 1).split([shard.shape[-1] for shard in shards], dim=-1))

    def heads_to_tokens(self, y_TBC: Tensor) -> Tensor:
        """Undo `tokens_to_heads` for one stream: all channels of this cp rank's tokens."""
        if self.cp == 1:
            return y_TBC
        received = self._exchange(y_TBC.unflatten(0, (self.cp, -1)))
        return received.permute(1, 2, 0, 3).flatten(-2)

    def own_heads(self, weight: Tensor) -> Tensor:
        """The part of a per-head weight (heads or their channels first) that belongs to the heads of this cp rank.

        Every cp rank holds the whole weight; the gradients of the parts meet in the sum over dp x cp.
        """
        return weight if self.cp == 1 else weight.unflatten(0, (self.cp, -1))[self.cp_rank]

    def own_tokens(self, stream_BT: Tensor) -> Tensor:
        """This cp rank's tokens of a stream that holds the whole window along dimension 1."""
        return stream_BT.chunk(self.cp, dim=1)[self.cp_rank]

    def sum_over_tp(self, values: Tensor) -> Tensor:
        """Sum over the tp ranks, outside autograd."""
        return self._sum_over_tp(values) if self.tp > 1 else values

    def max_over_tp(self, values: Tensor) -> Tensor:
        """Maximum over the tp ranks, outside autograd."""
        if self.tp == 1:
            return values
        values = values.clone()
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self.tp_group)
        return values

    def _sum_over_tp(self, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.tp_group)
        return total

    def _exchange(self, blocks: Tensor) -> Tensor:
        """Block i of dimension 0 goes to cp rank i; the backward is the same call on the gradient."""
        from megatron.core.tensor_parallel import mappings

        received = mappings.all_to_all(self.cp_group, blocks.contiguous())
        return received.view(blocks.shape)


WHOLE = Shards()


def mark_split(parameter: nn.Parameter, dim: int, tp: int) -> None:
    """Note along which dimension a weight is cut; DeepSpeed's gradient norm reads `tensor_model_parallel`."""
    parameter.shard_dim = dim  # pyright: ignore[reportAttributeAccessIssue]
    if tp > 1:
        parameter.tensor_model_parallel = True  # pyright: ignore[reportAttributeAccessIssue]


def shard_dim(parameter: Tensor) -> int | None:
    """Dimension along which a weight is cut over tp; None where every tp rank holds it whole."""
    return getattr(parameter, "shard_dim", None)


def global_shape(shape: Sequence[int], dim: int | None, tp: int) -> torch.Size:
    """Shape of the tensor of which `shape` is one of `tp` slices along `dim`."""
    return torch.Size(size * tp if axis == dim else size for axis, size in enumerate(shape))
