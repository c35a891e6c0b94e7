"""The language model, whole or one pipeline stage of it: embedding, layers, head and loss."""
# B batch, T tokens, D model width, E vocabulary entries.

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transmamba.config import ModelConfig
from transmamba.kernels.documents import Documents
from transmamba.model.init import initialise
from transmamba.model.layer import Layer
from transmamba.model.norm import RMSNorm
from transmamba.model.recompute import run_or_recompute
from transmamba.parallel.loss import TokenLosses, vocab_cross_entropy
from transmamba.parallel.shards import WHOLE, Shards


class LossSums(NamedTuple):
    """Sums over this rank's tokens of a micro-batch; the caller divides by the step's weight."""

    loss: Tensor  # weighted negative log-likelihood in nats, plus the z-loss
    nll: Tensor  # weighted negative log-likelihood in nats


class Head(nn.Module):
    """This rank's rows of the output vocabulary; the loss is computed here, as ZeRO-3 lends a weight to its module."""

    weight: Tensor

    def __init__(self, n_in: int, n_rows: int, n_known_local: int, shards: Shards):
        """`n_rows` counts those of all ranks; of the local ones the first `n_known_local` are no padding."""
        super().__init__()
        self.shards, self.n_known_local = shards, n_known_local
        self.weight = nn.Parameter(torch.empty(shards.local(n_rows), n_in))
        shards.split(self)

    def forward(self, x_TBD: Tensor, targets_TB: Tensor | None = None) -> Tensor | TokenLosses:
        """Loss of every token; without targets the logits, -inf for padding."""
        if targets_TB is not None:
            return vocab_cross_entropy(x_TBD, self.weight, targets_TB, self.shards, n_known=self.n_known_local)
        logits_TBE = F.linear(x_TBD, self.weight)
        if self.n_known_local < logits_TBE.shape[-1]:  # the write costs a copy of the gradient, even of nothing
            logits_TBE[..., self.n_known_local :] = -torch.inf
        return logits_TBE


class Model(nn.Module):
    """Token ids to logits. `layer_kinds` names each layer's kind; TransPoints arrive with every call.

    A stage holds the layers numbered `layers`; the first stage embeds, the last one ends in the loss. Parameters bear
    the names they have in the whole model. Sizes are global, `shards` says which part of them is here.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer_kinds: Sequence[str],
        *,
        n_tokens_known: int,
        n_rows: int,
        seed: int | None,
        recompute: Literal["none", "selective", "full"] = "none",
        shards: Shards = WHOLE,
        layers: range | None = None,
    ):
        """Build and initialise.

        Args:
            config: sizes and switches.
            layer_kinds: "transmamba", "transformer" or "mamba2" per layer of the whole model.
            n_tokens_known: vocabulary of the tokenizer; logits of the padding rows beyond it are -inf.
            n_rows: embedding rows, at least `n_tokens_known`.
            seed: of the initial weights; None leaves them as they are (meta tensors, or values to be loaded).
            recompute: compute again in the backward instead of keeping activations: of the mixing (selective) or
                of the whole layer (full).
            shards: how layers are cut over ranks.
            layers: the stage's layers; None for all.
        """
        super().__init__()
        layers = range(len(layer_kinds)) if layers is None else layers
        self.shards, self.recompute_layers = shards, recompute == "full"
        self.n_known_local = min(max(n_tokens_known - shards.tp_rank * shards.local(n_rows), 0), shards.local(n_rows))
        self.is_first, self.is_last = layers.start == 0, layers.stop == len(layer_kinds)
        if self.is_first:
            self.embedding = shards.split(nn.Embedding(shards.local(n_rows), config.d_model))
        self.layers = nn.ModuleDict(
            {str(index): Layer(config, layer_kinds[index], shards, recompute == "selective") for index in layers}
        )
        if self.is_last:
            self.final_norm = RMSNorm(config.d_model, config.norm_eps, shards)
            self.head = Head(config.d_model, n_rows, self.n_known_local, shards)
            if config.tied and self.is_first:
                self.head.weight = self.embedding.weight
        if seed is not None:
            initialise(self, config, seed, shards=shards, tied=config.tied)

    def forward(
        self,
        ids_BT: Tensor,
        targets_BT: Tensor,
        weight_BT: Tensor,
        transpoints: Sequence[int | float],
        documents: Documents,
        z_loss: float = 0.0,
        x_TBD: Tensor | None = None,
    ) -> LossSums | Tensor:
        """Run the stage over a micro-batch.

        Args:
            ids_BT, targets_BT, weight_BT: this context-parallel rank's tokens.
            transpoints: of all layers of the whole model.
            documents: boundaries in the whole window.
            z_loss: weight of the squared log-partition (PaLM, section 5).
            x_TBD: what the stage before sends; None on the first.

        Returns:
            The hidden states for the next stage, or on the last one the sums of the loss.
        """
        x_TBD = self.hidden(ids_BT, transpoints, documents, x_TBD)
        if not self.is_last:
            return x_TBD
        nll_TB, log_partition_TB = self.head(self.final(x_TBD), targets_BT.T)
        nll = (nll_TB * weight_BT.T).sum()
        if z_loss == 0:
            return LossSums(nll, nll.detach())
        return LossSums(nll + z_loss * (log_partition_TB.square() * weight_BT.T).sum(), nll.detach())

    def predict(self, ids_BT: Tensor, transpoints: Sequence[int | float], documents: Documents) -> Tensor:
        """Logits [T, B, E] of every token's successor, of a model that is one stage."""
        return self.logits(self.hidden(ids_BT, transpoints, documents))

    def hidden(
        self,
        ids_BT: Tensor,
        transpoints: Sequence[int | float],
        documents: Documents,
        x_TBD: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the stage's layers."""
        if x_TBD is None:
            x_TBD = self.embed(ids_BT)
        for index, layer in self.layers.items():
            x_TBD = run_or_recompute(self.recompute_layers, layer, x_TBD, transpoints[int(index)], documents)
        return x_TBD

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Embeddings of tokens, sequence first; every tp rank looks up the rows it holds."""
        ids_TB = ids_BT.T
        if self.shards.tp == 1:
            return self.embedding(ids_TB)
        rows_TB = ids_TB - self.shards.tp_rank * self.embedding.num_embeddings
        is_here_TB = (rows_TB >= 0) & (rows_TB < self.embedding.num_embeddings)
        part_TBD = F.embedding(rows_TB.where(is_here_TB, 0), self.embedding.weight) * is_here_TB[..., None]
        return self.shards.sum_partial(part_TBD)

    def logits(self, x_TBD: Tensor) -> Tensor:
        """Logits after the last layer, this rank's entries; those that no token has are -inf."""
        return self.head(self.final(x_TBD))

    def final(self, x_TBD: Tensor) -> Tensor:
        """What the head reads: the normalised hidden states of all tokens of this cp rank."""
        return self.shards.gather_tokens(self.final_norm(x_TBD))
