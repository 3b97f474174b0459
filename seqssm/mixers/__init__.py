"""Sequence mixers: (b, l, d) -> (b, l, d), with state in and out."""

from seqssm.mixers.attention import Attention
from seqssm.mixers.base import Mixer, State
from seqssm.mixers.mamba import Mamba
from seqssm.mixers.mamba2 import Mamba2
from seqssm.mixers.s4d import S4D

__all__ = ["S4D", "Attention", "Mamba", "Mamba2", "Mixer", "State"]
