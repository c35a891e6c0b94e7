"""Rotary positions, of one stream of heads or of queries and keys together."""

from transmamba.kernels.rope.rotate import rope, rope_qk

__all__ = ["rope", "rope_qk"]
