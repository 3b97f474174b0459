"""Scan kernels with state in and out, in torch, Numba and Triton; imported as ``seqssm.kernels``.

Each function lives in a package of its own name. Import a backend as ``from seqssm.kernels.selective_scan import
triton``: the attribute ``seqssm.kernels.selective_scan`` is the function.
"""

from seqssm.kernels.causal_conv1d import causal_conv1d, causal_conv1d_step
from seqssm.kernels.mamba_step import LayerWeights, mamba_chunk, mamba_step
from seqssm.kernels.rms_norm import add_rms_norm
from seqssm.kernels.selective_scan import selective_scan, selective_scan_step
from seqssm.kernels.ssd import ssd, ssd_step

__all__ = [
    "LayerWeights",
    "add_rms_norm",
    "causal_conv1d",
    "causal_conv1d_step",
    "mamba_chunk",
    "mamba_step",
    "selective_scan",
    "selective_scan_step",
    "ssd",
    "ssd_step",
]
