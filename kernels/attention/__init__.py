"""Causal attention on the prefix of every document."""

from transmamba.kernels.attention.attention import prefix_attention

__all__ = ["prefix_attention"]
