"""Selective scan of Mamba: ``selective_scan`` and ``selective_scan_step``."""

from seqssm.kernels.selective_scan.op import selective_scan, selective_scan_step

__all__ = ["selective_scan", "selective_scan_step"]
