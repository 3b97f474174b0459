"""The clips of a split as samples: in order, or as an unending, seeded training sequence with augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from seqssm.data.audio.augment import (
    AugmentConfig,
    Masks,
    add_noise,
    bury,
    change_level,
    change_speed,
    draw_masks,
    draw_response,
    mix,
    only_noise,
    overlay,
    shift,
)
from seqssm.data.audio.batches import AudioBatch, SampleBatch, with_features
from seqssm.data.audio.layouts import Clip
from seqssm.data.audio.store import ClipStore
from seqssm.data.features import FeatureConfig
from seqssm.data.loading import shuffled_rounds

MAX_DRAWS = 20


class Sample(NamedTuple):
    """A clip or a mixture: samples (n,), target (classes,) or a class id, masks to apply, what it was made of, and the
    response (mel,) in dB that comes before the masks."""

    samples: np.ndarray
    target: np.ndarray
    masks: Masks | None
    sources: tuple[int, ...]
    weights: tuple[float, ...]
    response: np.ndarray | None = None


@dataclass
class SplitClips:
    """The clips of one split: `numbers` (c,) in the store, `targets` (c,classes) bool.

    `mixtures`: positions of the clips that make up each item where items are mixtures.
    """

    store: ClipStore
    numbers: np.ndarray
    clips: list[Clip]
    targets: np.ndarray
    mixtures: list[tuple[int, ...]] | None = None

    def __len__(self) -> int:
        return len(self.clips)

    @classmethod
    def of(cls, store: ClipStore, numbers: Sequence[int], labels: Sequence[str]) -> SplitClips:
        """Clips of the store by number."""
        position = {label: i for i, label in enumerate(labels)}
        clips = [store.clips[number] for number in numbers]
        targets = np.zeros((len(clips), len(labels)), bool)
        for row, clip in zip(targets, clips, strict=True):
            row[[position[label] for label in clip.labels]] = True
        return cls(store, np.array(numbers, np.int64), clips, targets)

    def with_mixtures(self, counts: tuple[int, int], seed: int) -> SplitClips:
        """As many mixtures as there are clips, clip i being the first of mixture i."""
        made = [self.draw_mixture(i, counts, np.random.default_rng([seed, i, 3])) for i in range(len(self))]
        return replace(self, mixtures=made)

    def draw_mixture(self, first: int, counts: tuple[int, int], rng: np.random.Generator) -> tuple[int, ...]:
        """The clip and others at random, of other classes as far as there are some."""
        members = [first]
        for _ in range(int(rng.integers(*counts, endpoint=True)) - 1):
            for _ in range(MAX_DRAWS):
                other = int(rng.integers(len(self)))
                if not (self.targets[members].any(0) & self.targets[other]).any():
                    members.append(other)
                    break
        return tuple(members)

    def items(self) -> list[Clip]:
        """What the ordered data set gives: the clips, or for each mixture its first clip with the labels of all."""
        if self.mixtures is None:
            return self.clips
        return [
            replace(self.clips[m[0]], labels=tuple(sorted({label for i in m for label in self.clips[i].labels})))
            for m in self.mixtures
        ]


class OrderedClips(Dataset[Sample]):
    """Every item of a split in order, whole and as it is; the mixtures are the same every time."""

    def __init__(self, split: SplitClips, several: bool, seed: int) -> None:
        self.split = split
        self.several = several
        self.seed = seed

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> Sample:
        split = self.split
        members = (index,) if split.mixtures is None else split.mixtures[index]
        samples = [split.store[int(split.numbers[i])] for i in members]
        mixed = samples[0] if split.mixtures is None else overlay(samples, np.random.default_rng([self.seed, index, 4]))
        target = _target(np.any(split.targets[list(members)], axis=0), self.several)
        return Sample(mixed, target, None, members, (1.0,) * len(members))


class TrainingClips(Dataset[Sample]):
    """An unending sequence of augmented clips, `len(self)` to an epoch; item i is a function of (seed, i) alone.

    Each clip comes once before any comes again. With `balance`, every class comes equally often where clips have one
    label; where they have several, clips are drawn in proportion to the sum of 1 / frequency of their classes.

    Args:
        split: the train clips.
        features: of which masks are drawn.
        several: clips have any number of labels: targets are vectors of zeros and ones, or of shares; with mixup, and
            where some clips are empty, they are vectors in any case.
        clips_per_epoch: items to an epoch.
        seed: of everything.
        crop_s: a random stretch of longer clips.
        balance: see above.
        mix_clips: least and greatest number of clips that sound at once; no mixup then.
        augment: None for none.
        noise: recordings (n,) of noise to add, at the store's rate.

    Attributes:
        chance: (c,) of each clip to be drawn at random, as the second of two that are mixed.
        order: :meth:`draw`, the last epochs being kept.
    """

    def __init__(
        self,
        split: SplitClips,
        features: FeatureConfig,
        *,
        several: bool,
        clips_per_epoch: int,
        seed: int,
        crop_s: float | None = None,
        balance: bool = False,
        mix_clips: tuple[int, int] | None = None,
        augment: AugmentConfig | None = None,
        noise: Sequence[np.ndarray] = (),
    ) -> None:
        self.split = split
        self.features = features
        soft = augment is not None and (augment.empty > 0 or (augment.mixup > 0 and mix_clips is None))
        self.multi_label, self.several = several, several or soft
        self.clips_per_epoch = clips_per_epoch
        self.seed = seed
        self.crop = None if crop_s is None else max(1, round(crop_s * features.sample_rate))
        self.balance = balance
        self.mix_clips = mix_clips
        self.augment = augment
        self.noise = list(noise)
        weight = np.ones(len(split))
        if balance:
            rarity = 1 / np.maximum(split.targets.sum(0), 1)
            weight = np.array([rarity[row].sum() for row in split.targets])
        self.chance = weight / weight.sum() if weight.any() else np.full(len(split), 1 / len(split))
        self.order = lru_cache(maxsize=2)(self.draw)

    def __len__(self) -> int:
        return self.clips_per_epoch

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "order"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self.order = lru_cache(maxsize=2)(self.draw)

    def draw(self, epoch: int) -> np.ndarray:
        """Positions in the split of the epoch's items, before mixing."""
        rng = np.random.default_rng([self.seed, epoch, 0])
        per_clip = self.split.targets.sum(1)
        if self.balance and (per_clip != 1).any():
            return rng.choice(len(self.split), self.clips_per_epoch, p=self.chance)
        label = self.split.targets.argmax(1) if self.balance else np.zeros(len(self.split), np.int64)
        pools = [np.flatnonzero(label == one) for one in np.unique(label)]
        pool_of_item = rng.permutation(np.arange(self.clips_per_epoch) % len(pools))
        chosen = np.empty(self.clips_per_epoch, np.int64)
        for number, pool in enumerate(pools):
            items = np.flatnonzero(pool_of_item == number)
            if len(items):
                chosen[items] = shuffled_rounds(pool, epoch * len(items), len(items), (self.seed, number))
        return chosen

    def __getitem__(self, item: int) -> Sample:
        epoch, at = divmod(item, self.clips_per_epoch)
        first = int(self.order(epoch)[at])
        rng = np.random.default_rng([self.seed, item, 2])
        augment = self.augment
        members: tuple[int, ...]
        weights: tuple[float, ...]
        if augment is not None and augment.empty and rng.random() < augment.empty:
            members, weights = (first,), (0.0,)
            samples = only_noise(len(self._read(first, rng)), self._some_noise(rng), rng)
            classes = self.split.targets.shape[1]
            shares = np.full(classes, 0.0 if self.multi_label else 1 / classes, np.float32)
        elif self.mix_clips is not None:
            members = self.split.draw_mixture(first, self.mix_clips, rng)
            samples = overlay([self._read(i, rng) for i in members], rng)
            shares, weights = np.any(self.split.targets[list(members)], axis=0), (1.0,) * len(members)
        elif augment is not None and rng.random() < augment.mixup:
            members = (first, int(rng.choice(len(self.split), p=self.chance)))
            share = float(rng.beta(augment.mixup_alpha, augment.mixup_alpha))
            samples = mix(self._read(members[0], rng), self._read(members[1], rng), share, rng)
            weights = (share, 1 - share)
            shares = np.array(weights, np.float32) @ self.split.targets[list(members)]
        else:
            members, weights = (first,), (1.0,)
            samples, shares = self._read(first, rng), self.split.targets[first]
        masks = response = None
        if augment is not None:
            samples = change_level(samples, augment, rng)
            if rng.random() < augment.noise:
                samples = add_noise(samples, self._some_noise(rng), augment, rng)
            if augment.buried and weights != (0.0,) and rng.random() < augment.buried:
                samples = bury(samples, self._some_noise(rng), rng)
            masks = draw_masks(augment, self.features, self.features.frames(len(samples)), rng)
            if augment.equalizer_db:
                response = draw_response(augment, self.features, rng)
        return Sample(samples, _target(shares, self.several), masks, members, weights, response)

    def _some_noise(self, rng: np.random.Generator) -> np.ndarray | None:
        return self.noise[int(rng.integers(len(self.noise)))] if self.noise else None

    def _read(self, position: int, rng: np.random.Generator) -> np.ndarray:
        store, number = self.split.store, int(self.split.numbers[position])
        available = store.scans[number].samples
        if self.crop is not None and available > self.crop:
            samples = store.read(number, int(rng.integers(0, available - self.crop, endpoint=True)), self.crop)
        else:
            samples = store[number]
        if self.augment is None:
            return samples
        if self.augment.speed:
            samples = change_speed(samples, self.augment, rng)
        return shift(samples, self.augment, store.sample_rate, rng)


def _target(shares: np.ndarray, several: bool) -> np.ndarray:
    return shares.astype(np.float32) if several else np.asarray(shares.argmax())


def collate(samples: Sequence[Sample]) -> SampleBatch:
    """Pad on the right with zeros."""
    counts = torch.tensor([len(sample.samples) for sample in samples])
    padded = pad_sequence([torch.from_numpy(np.array(sample.samples, np.float32)) for sample in samples], True)
    labels = torch.from_numpy(np.stack([sample.target for sample in samples]))
    width = max(len(sample.sources) for sample in samples)
    sources = torch.tensor([[*sample.sources, *(-1,) * (width - len(sample.sources))] for sample in samples])
    weights = torch.tensor([[*sample.weights, *(0.0,) * (width - len(sample.weights))] for sample in samples])
    responses = [sample.response for sample in samples if sample.response is not None]
    return SampleBatch(
        padded,
        counts,
        labels,
        sources,
        weights,
        *_stacked_masks(samples),
        torch.from_numpy(np.stack(responses)) if len(responses) == len(samples) else None,
    )


class Collate:
    """Samples to a batch of features, or of samples where the features are made later."""

    def __init__(self, features: FeatureConfig | None) -> None:
        self.features = features

    def __call__(self, samples: Sequence[Sample]) -> AudioBatch | SampleBatch:
        batch = collate(samples)
        return batch if self.features is None else with_features(batch, self.features)


def _stacked_masks(samples: Sequence[Sample]) -> tuple[Tensor | None, Tensor | None]:
    masks = [sample.masks for sample in samples if sample.masks is not None]
    if len(masks) != len(samples):
        return None, None
    return (
        torch.from_numpy(np.stack([one.time for one in masks])),
        torch.from_numpy(np.stack([one.mel for one in masks])),
    )
