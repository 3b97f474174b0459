"""RMS norm with the residual addition before it."""

from seqssm.kernels.rms_norm.op import add_rms_norm

__all__ = ["add_rms_norm"]
