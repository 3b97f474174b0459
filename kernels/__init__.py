"""Scan kernels with state in and out, in torch, Numba and Triton; imported as ``seqssm.kernels``."""
