"""Clips of unequal length to one batch of features."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from seqssm.data.audio.augment import apply_masks, apply_responses
from seqssm.data.features import FeatureConfig, fbank

CLIPS_AT_ONCE = 4


class AudioBatch(NamedTuple):
    """features (b,l,mel) float32, normalised, zero where padded; lengths (b,) int64, frames; labels (b,) int64 class
    ids, or (b,classes) float32 between 0 and 1 for several labels and for mixtures.

    In training also sources (b,k) int64, positions of the clips mixed into each row in their split (-1 for none), and
    weights (b,k) float32, their shares."""

    features: Tensor
    lengths: Tensor
    labels: Tensor
    sources: Tensor | None = None
    weights: Tensor | None = None


class SampleBatch(NamedTuple):
    """Clips before their features: samples (b,n) float32, zero where padded; sample_counts (b,) int64; labels, sources
    and weights as in `AudioBatch`; what to blank, from and to: time_masks (b,k,2) frames, mel_masks (b,m,2) bands;
    gains of the bands before that: responses (b,mel) dB."""

    samples: Tensor
    sample_counts: Tensor
    labels: Tensor
    sources: Tensor | None = None
    weights: Tensor | None = None
    time_masks: Tensor | None = None
    mel_masks: Tensor | None = None
    responses: Tensor | None = None


def with_features(batch: SampleBatch, config: FeatureConfig) -> AudioBatch:
    """The features of a batch, on its device."""
    features, lengths = _features(batch.samples, batch.sample_counts, config)
    if batch.responses is not None:
        features = apply_responses(features, lengths, batch.responses, config)
    if batch.time_masks is not None and batch.mel_masks is not None:
        features = apply_masks(features, batch.time_masks, batch.mel_masks)
    return AudioBatch(features, lengths, batch.labels, batch.sources, batch.weights)


def batch_features(samples: Sequence[Tensor], config: FeatureConfig) -> tuple[Tensor, Tensor]:
    """Features (b,l,mel) and lengths (b,) in frames of recordings (n,) of any lengths.

    Normalised before padding: padding is zero, which is the training data's mean, and never sounds.
    """
    counts = torch.tensor([len(one) for one in samples], device=samples[0].device)
    return _features(pad_sequence(list(samples), batch_first=True), counts, config)


def _features(samples: Tensor, counts: Tensor, config: FeatureConfig) -> tuple[Tensor, Tensor]:
    if samples.device.type == "cpu":  # a few clips at a time stay in the processor's cache
        features = torch.cat([fbank(some, config) for some in samples.split(CLIPS_AT_ONCE)])
    else:
        features = fbank(samples, config)
    whole = (counts - config.frame_samples).div(config.hop_samples, rounding_mode="floor") + 1
    lengths = torch.where(counts < config.frame_samples, (counts > 0).long(), whole)
    frame = torch.arange(features.shape[1], device=features.device)
    return features.masked_fill_((frame >= lengths[:, None])[..., None], 0.0), lengths
