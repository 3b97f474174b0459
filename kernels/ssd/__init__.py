"""State-space duality (Mamba-2): the scan with a scalar decay a head, as matrix products over chunks."""

from seqssm.kernels.ssd.op import ssd, ssd_step

__all__ = ["ssd", "ssd_step"]
