"""Transcribed speech: recordings and texts in any layout to batches of features and tokens."""

from typing import TYPE_CHECKING

from seqssm.data.speech.augment import SpeechAugmentConfig
from seqssm.data.speech.batches import SpeechBatch
from seqssm.data.speech.manifests import Utterance
from seqssm.data.speech.text import TextConfig
from seqssm.data.speech.tokenizers import Tokenizer, TokenizerConfig, tokenizer_from_dict

if TYPE_CHECKING:
    from seqssm.data.speech.datamodule import SpeechDataModule

__all__ = [
    "SpeechAugmentConfig",
    "SpeechBatch",
    "SpeechDataModule",
    "TextConfig",
    "Tokenizer",
    "TokenizerConfig",
    "Utterance",
    "tokenizer_from_dict",
]


def __getattr__(name: str) -> object:
    """Import Lightning only for those who ask for a DataModule."""
    if name == "SpeechDataModule":
        from seqssm.data.speech.datamodule import SpeechDataModule

        return SpeechDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
