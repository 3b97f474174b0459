"""seqssm: Mamba state-space models for genomics and audio."""

__version__ = "0.1.0"
