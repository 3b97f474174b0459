"""Sequence mixers: (b, l, d) -> (b, l, d), with state in and out."""

from seqssm.mixers.base import Mixer, State
from seqssm.mixers.mamba import Mamba

__all__ = ["Mamba", "Mixer", "State"]
