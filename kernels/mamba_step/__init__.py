"""One token through a whole Mamba layer: ``mamba_step``."""

from seqssm.kernels.mamba_step.op import mamba_step

__all__ = ["mamba_step"]
