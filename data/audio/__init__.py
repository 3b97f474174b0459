"""Audio for tagging: recordings in any layout and format to batches of features."""

from typing import TYPE_CHECKING

from seqssm.data.audio.batches import AudioBatch
from seqssm.data.audio.reading import blocks, read_audio
from seqssm.data.audio.sources import Clip

if TYPE_CHECKING:
    from seqssm.data.audio.datamodule import AudioTaggingDataModule

__all__ = ["AudioBatch", "AudioTaggingDataModule", "Clip", "blocks", "read_audio"]


def __getattr__(name: str) -> object:
    """Import Lightning only for those who ask for a DataModule."""
    if name == "AudioTaggingDataModule":
        from seqssm.data.audio.datamodule import AudioTaggingDataModule

        return AudioTaggingDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
