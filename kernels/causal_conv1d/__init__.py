"""Depthwise causal convolution with SiLU: ``causal_conv1d`` and ``causal_conv1d_step``."""

from seqssm.kernels.causal_conv1d.op import causal_conv1d, causal_conv1d_step

__all__ = ["causal_conv1d", "causal_conv1d_step"]
