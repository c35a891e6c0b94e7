"""RMS normalisation, per head with an optional gate, and plain."""

from transmamba.kernels.gated_norm.norm import gated_rms_norm, rms_norm

__all__ = ["gated_rms_norm", "rms_norm"]
