"""Files to batches; imports neither models nor kernels. Imported as ``seqssm.data``."""

from typing import TYPE_CHECKING

from seqssm.data.dna import alphabet
from seqssm.data.dna.sampling import DNABatch

if TYPE_CHECKING:
    from seqssm.data.audio.datamodule import AudioTaggingDataModule
    from seqssm.data.dna.datamodule import DNADataModule
    from seqssm.data.dna.unlabelled import UnlabelledDNA
    from seqssm.data.synthetic import SimulatedGenomes

__all__ = ["AudioTaggingDataModule", "DNABatch", "DNADataModule", "SimulatedGenomes", "UnlabelledDNA", "alphabet"]


def __getattr__(name: str) -> object:
    """Import Lightning only for those who ask for a DataModule."""
    if name == "AudioTaggingDataModule":
        from seqssm.data.audio.datamodule import AudioTaggingDataModule

        return AudioTaggingDataModule
    if name == "DNADataModule":
        from seqssm.data.dna.datamodule import DNADataModule

        return DNADataModule
    if name == "UnlabelledDNA":
        from seqssm.data.dna.unlabelled import UnlabelledDNA

        return UnlabelledDNA
    if name == "SimulatedGenomes":
        from seqssm.data.synthetic import SimulatedGenomes

        return SimulatedGenomes
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
