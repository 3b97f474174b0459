"""The utterances of a split as batches of a bounded number of seconds: in order, or as an unending, seeded training
sequence with augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset

from seqssm.data.audio.store import ClipStore
from seqssm.data.features import FeatureConfig
from seqssm.data.speech.augment import SpeechAugmentConfig, add_noise, change_level, change_speed, draw_masks, join
from seqssm.data.speech.batches import SpeechSample
from seqssm.data.speech.manifests import Utterance

LENGTH_JITTER = 0.1  # neighbours by length change from epoch to epoch
PLAIN = SpeechAugmentConfig(
    speeds=(1.0,), join=0.0, gain_db=0.0, noise=0.0, mel_masks=0, mel_mask_bands=0, time_masks=0
)


@dataclass
class SplitUtterances:
    """The utterances of one split: `numbers` (c,) in the store, `tokens` of each, and what its texts are joined by."""

    store: ClipStore
    numbers: np.ndarray
    utterances: list[Utterance]
    tokens: list[np.ndarray]
    space: np.ndarray

    def __len__(self) -> int:
        return len(self.utterances)

    @property
    def seconds(self) -> np.ndarray:
        """Durations (c,)."""
        return self.store.seconds[self.numbers]

    def samples(self, position: int) -> np.ndarray:
        """Samples (n,) float32; not to be written to."""
        return self.store[int(self.numbers[position])]


def cut(seconds: np.ndarray, order: Sequence[int], batch_seconds: float, batch_size: int | None) -> list[list[int]]:
    """Consecutive batches of items in an order, as large as they may be: padded to the longest, at most so many
    seconds, and at most so many items. A longer item is a batch of its own."""
    batches: list[list[int]] = []
    longest = 0.0
    for item in order:
        longest = max(longest, float(seconds[item]))
        full = batches and (
            longest * (len(batches[-1]) + 1) > batch_seconds or len(batches[-1]) + 1 > (batch_size or len(order))
        )
        if not batches or full:
            batches.append([])
            longest = float(seconds[item])
        batches[-1].append(int(item))
    return batches


class OrderedBatches(Dataset[list[SpeechSample]]):
    """Every utterance of a split in order, whole and as it is; item i is the i-th batch."""

    def __init__(self, split: SplitUtterances, batch_seconds: float, batch_size: int | None) -> None:
        self.split = split
        self.batches = cut(split.seconds, range(len(split)), batch_seconds, batch_size)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> list[SpeechSample]:
        return [SpeechSample(self.split.samples(i), self.split.tokens[i]) for i in self.batches[index]]


class Item(NamedTuple):
    """What one row of a training batch is made of: positions in the split, their speed, the gaps around them (none for
    a single utterance), its seconds, and its number, which seeds the rest."""

    members: tuple[int, ...]
    speed: float
    gaps_s: tuple[float, ...]
    seconds: float
    number: int


class TrainingBatches(Dataset[list[SpeechSample]]):
    """An unending sequence of batches of augmented utterances of like length, `len(self)` to an epoch; batch i is a
    function of (seed, i) alone.

    An epoch shows every utterance once, in as many batches as the first epoch needs: where one needs more, the last
    of its batches in random order are left out, where it needs fewer, some utterances come a second time.

    Args:
        split: the train utterances.
        features: of which masks are drawn.
        batch_seconds: of a batch, padding included.
        batch_size: the most utterances of a batch.
        seed: of everything.
        augment: None for none.
        noise: recordings (n,) of noise to add, at the store's rate.
    """

    def __init__(
        self,
        split: SplitUtterances,
        features: FeatureConfig,
        *,
        batch_seconds: float,
        batch_size: int | None,
        seed: int,
        augment: SpeechAugmentConfig | None = None,
        noise: Sequence[np.ndarray] = (),
    ) -> None:
        self.split = split
        self.features = features
        self.batch_seconds = batch_seconds
        self.batch_size = batch_size
        self.seed = seed
        self.augment = augment or PLAIN
        self.noise = list(noise)
        self._seconds = split.seconds
        self._plan = lru_cache(maxsize=2)(self.plan)
        self._size = len(self._batches(0, 0))

    def __len__(self) -> int:
        return self._size

    def __getstate__(self) -> dict[str, object]:
        return {key: value for key, value in self.__dict__.items() if key != "_plan"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._plan = lru_cache(maxsize=2)(self.plan)

    def plan(self, epoch: int) -> list[list[Item]]:
        """The batches of an epoch."""
        batches, draw = self._batches(epoch, 0), 1
        while len(batches) < self._size:
            batches += self._batches(epoch, draw)
            draw += 1
        return batches[: self._size]

    def _batches(self, epoch: int, draw: int) -> list[list[Item]]:
        rng = np.random.default_rng([self.seed, epoch, draw, 0])
        items = self._items(rng, draw)
        seconds = np.array([item.seconds for item in items])
        order = np.argsort(seconds * rng.uniform(1 - LENGTH_JITTER, 1 + LENGTH_JITTER, len(items)), kind="stable")
        batches = cut(seconds, order.tolist(), self.batch_seconds, self.batch_size)
        return [[items[i] for i in batches[b]] for b in rng.permutation(len(batches))]

    def _items(self, rng: np.random.Generator, draw: int) -> list[Item]:
        augment, order = self.augment, rng.permutation(len(self.split)).tolist()
        speeds = rng.choice(augment.speeds, len(order)).tolist()
        joined = (rng.random(len(order)) < augment.join).tolist()
        longest_s = min(augment.join_s, self.batch_seconds)
        items: list[Item] = []
        while order:
            speed = speeds[len(items)]
            members = [order.pop()]
            gaps: list[float] = []
            seconds = self._seconds[members[0]] / speed
            if joined[len(items)]:
                gaps = [float(rng.uniform(*augment.gap_s)) for _ in range(2)]
                seconds += sum(gaps)
                while order:
                    gap_s = float(rng.uniform(*augment.gap_s))
                    more = gap_s + self._seconds[order[-1]] / speed
                    if seconds + more > longest_s:
                        break
                    members.append(order.pop())
                    gaps.append(gap_s)
                    seconds += more
                if seconds > longest_s:  # one utterance that leaves no room for gaps
                    gaps, seconds = [], self._seconds[members[0]] / speed
            number = draw << 40 | len(items)
            items.append(Item(tuple(members), speed, tuple(gaps), float(seconds), number))
        return items

    def __getitem__(self, index: int) -> list[SpeechSample]:
        epoch, at = divmod(index, self._size)
        return [self._sample(item, epoch) for item in self._plan(epoch)[at]]

    def _sample(self, item: Item, epoch: int) -> SpeechSample:
        split, augment, rate = self.split, self.augment, self.split.store.sample_rate
        rng = np.random.default_rng([self.seed, epoch, item.number, 1])
        parts = [change_speed(split.samples(i), item.speed, rate) for i in item.members]
        samples = join(parts, item.gaps_s, rate, augment.gap_level_db, rng) if item.gaps_s else parts[0]
        if augment.gain_db:
            samples = change_level(samples, augment.gain_db, rng)
        if rng.random() < augment.noise:
            samples = add_noise(samples, self.noise, augment.noise_snr_db, rng)
        masks = draw_masks(augment, self.features, self.features.frames(len(samples)), rng)
        return SpeechSample(samples, self._joined(item.members), masks)

    def _joined(self, members: Sequence[int]) -> np.ndarray:
        texts = [self.split.tokens[i] for i in members if len(self.split.tokens[i])]
        parts = [part for text in texts for part in (self.split.space, text)][1:]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)
