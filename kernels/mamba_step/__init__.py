"""One token, or a few, through a whole Mamba layer: ``mamba_step`` and ``mamba_chunk``."""

from seqssm.kernels.mamba_step.layer import LayerWeights
from seqssm.kernels.mamba_step.op import mamba_chunk, mamba_step

__all__ = ["LayerWeights", "mamba_chunk", "mamba_step"]
