"""Clips of unequal length to one batch of features."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from seqssm.data.features import FeatureConfig, fbank


class AudioBatch(NamedTuple):
    """features (b,l,mel) float32, normalised, zero where padded; lengths (b,) int64, frames; labels (b,) int64 class
    ids, or (b,classes) float32 between 0 and 1 for several labels and for mixtures. Where the loader says what it mixed:
    sources (b,k) int64, positions of the clips in their split (-1 for none), and weights (b,k) float32."""

    features: Tensor
    lengths: Tensor
    labels: Tensor
    sources: Tensor | None = None
    weights: Tensor | None = None


def batch_features(samples: Sequence[Tensor], config: FeatureConfig) -> tuple[Tensor, Tensor]:
    """Features (b,l,mel) and lengths (b,) in frames of recordings (n,) of any lengths.

    Normalised before padding: padding is zero, which is the training data's mean, and never sounds.
    """
    count = torch.tensor([len(one) for one in samples])
    padded = torch.nn.utils.rnn.pad_sequence(list(samples), batch_first=True)  # (b,n)
    features = fbank(padded, config)
    lengths = torch.tensor([config.frames(int(n)) for n in count])
    features.masked_fill_((torch.arange(features.shape[1]) >= lengths[:, None])[..., None], 0.0)
    return features, lengths
