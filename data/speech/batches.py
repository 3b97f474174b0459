"""Utterances of unequal length to one batch of features and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from seqssm.data.audio.augment import Masks
from seqssm.data.audio.batches import SampleBatch, with_features
from seqssm.data.features import FeatureConfig


class SpeechBatch(NamedTuple):
    """features (b,l,mel) float32, normalised, zero where padded; lengths (b,) int64, frames; tokens (b,u) int64 from 1
    on, 0 where padded; token_lengths (b,) int64, 0 for an empty transcript."""

    features: Tensor
    lengths: Tensor
    tokens: Tensor
    token_lengths: Tensor


class SpeechSample(NamedTuple):
    """One item: samples (n,) float32, tokens (u,) int64, and what to blank of its features."""

    samples: np.ndarray
    tokens: np.ndarray
    masks: Masks | None = None


class SpokenBatch(NamedTuple):
    """Utterances before their features: samples (b,n) float32, zero where padded; sample_counts (b,); tokens and
    token_lengths as in `SpeechBatch`; what to blank, from and to: time_masks (b,k,2) frames, mel_masks (b,m,2) bands.
    """

    samples: Tensor
    sample_counts: Tensor
    tokens: Tensor
    token_lengths: Tensor
    time_masks: Tensor | None = None
    mel_masks: Tensor | None = None


def collate(items: Sequence[SpeechSample]) -> SpokenBatch:
    """Pad on the right: samples and tokens with zeros."""
    samples = [torch.from_numpy(np.array(item.samples, np.float32)) for item in items]
    tokens = [torch.from_numpy(np.array(item.tokens, np.int64)) for item in items]
    masks = [item.masks for item in items if item.masks is not None]
    masked = len(masks) == len(items)
    return SpokenBatch(
        pad_sequence(samples, True),
        torch.tensor([len(one) for one in samples]),
        pad_sequence(tokens, True),
        torch.tensor([len(one) for one in tokens]),
        torch.from_numpy(np.stack([one.time for one in masks])) if masked else None,
        torch.from_numpy(np.stack([one.mel for one in masks])) if masked else None,
    )


def with_speech_features(batch: SpokenBatch, config: FeatureConfig) -> SpeechBatch:
    """The features of a batch, on its device."""
    audio = with_features(
        SampleBatch(
            batch.samples, batch.sample_counts, batch.tokens, time_masks=batch.time_masks, mel_masks=batch.mel_masks
        ),
        config,
    )
    return SpeechBatch(audio.features, audio.lengths, batch.tokens, batch.token_lengths)


class Collate:
    """Samples to a batch of features, or of samples where the features are made later."""

    def __init__(self, features: FeatureConfig | None) -> None:
        self.features = features

    def __call__(self, items: Sequence[SpeechSample]) -> SpeechBatch | SpokenBatch:
        batch = collate(items)
        return batch if self.features is None else with_speech_features(batch, self.features)
