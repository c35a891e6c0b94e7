"""The language model: embedding, layers, head and loss."""
# B batch, T tokens, D model width, E vocabulary entries.

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from transmamba.config import ModelConfig
from transmamba.kernels.documents import Documents
from transmamba.model.init import initialise
from transmamba.model.layer import Layer
from transmamba.model.norm import RMSNorm


class LossSums(NamedTuple):
    """Sums over the tokens of a micro-batch; the caller divides by the step's weight."""

    loss: Tensor  # weighted negative log-likelihood in nats, plus the z-loss
    nll: Tensor  # weighted negative log-likelihood in nats


class Model(nn.Module):
    """Token ids to logits. `layer_kinds` names each layer's kind; TransPoints arrive with every call."""

    def __init__(
        self,
        config: ModelConfig,
        layer_kinds: Sequence[str],
        *,
        n_tokens_known: int,
        n_rows: int,
        seed: int | None,
        recompute: bool = False,
    ):
        """Build and initialise.

        Args:
            config: sizes and switches.
            layer_kinds: "transmamba", "transformer" or "mamba2" per layer.
            n_tokens_known: vocabulary of the tokenizer; logits of the padding rows beyond it are -inf.
            n_rows: embedding rows, at least `n_tokens_known`.
            seed: of the initial weights; None leaves them as they are (meta tensors, or values to be loaded).
            recompute: run every layer's forward again in the backward pass instead of keeping its activations.
        """
        super().__init__()
        self.n_tokens_known, self.recompute = n_tokens_known, recompute
        self.embedding = nn.Embedding(n_rows, config.d_model)
        self.layers = nn.ModuleList(Layer(config, kind) for kind in layer_kinds)
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = nn.Linear(config.d_model, n_rows, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        if seed is not None:
            initialise(self, config, seed)

    def forward(
        self,
        ids_BT: Tensor,
        targets_BT: Tensor,
        weight_BT: Tensor,
        transpoints: Sequence[int | float],
        documents: Documents,
        z_loss: float = 0.0,
    ) -> LossSums:
        """Weighted sums of the negative log-likelihood and of the z-loss (PaLM, section 5) over a micro-batch."""
        logits_TBE = self.predict(ids_BT, transpoints, documents)
        logits_TBE = logits_TBE.to(torch.promote_types(logits_TBE.dtype, torch.float32))
        nll_T = F.cross_entropy(logits_TBE.flatten(0, 1), targets_BT.T.flatten(), reduction="none")
        weight_T = weight_BT.T.flatten()
        nll = (nll_T * weight_T).sum()
        if z_loss == 0:
            return LossSums(nll, nll.detach())
        log_partition_T = logits_TBE.flatten(0, 1).logsumexp(-1)
        return LossSums(nll + z_loss * (log_partition_T.square() * weight_T).sum(), nll.detach())

    def predict(self, ids_BT: Tensor, transpoints: Sequence[int | float], documents: Documents) -> Tensor:
        """Logits [T, B, E] of every token's successor."""
        x_TBD = self.embedding(ids_BT.T)
        for layer, transpoint in zip(self.layers, transpoints, strict=True):
            if self.recompute and torch.is_grad_enabled():
                x_TBD = checkpoint(layer, x_TBD, transpoint, documents, use_reentrant=False)
            else:
                x_TBD = layer(x_TBD, transpoint, documents)
        return self.logits(x_TBD)

    def logits(self, x_TBD: Tensor) -> Tensor:
        """Logits of the final hidden states; entries that no token has are -inf."""
        logits_TBE = self.head(self.final_norm(x_TBD))
        if self.n_tokens_known < logits_TBE.shape[-1]:  # the write costs a copy of the gradient, even of nothing
            logits_TBE[..., self.n_tokens_known :] = -torch.inf
        return logits_TBE
