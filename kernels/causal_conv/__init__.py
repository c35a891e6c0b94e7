"""Depthwise causal convolution over tokens."""

from transmamba.kernels.causal_conv.conv import causal_conv, conv_step

__all__ = ["causal_conv", "conv_step"]
