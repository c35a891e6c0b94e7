"""Cross entropy of hidden states against rows of a vocabulary, without the matrix of all logits."""

from transmamba.kernels.cross_entropy.loss import cross_entropy

__all__ = ["cross_entropy"]
