"""What training does to utterances: speed, joining, level, noise and SpecAugment; drawn from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from seqssm.data.audio.augment import Masks, coloured_noise, rms, stretch
from seqssm.data.features import FeatureConfig
from seqssm.data.resampling import resample
from seqssm.errors import UserError


@dataclass(frozen=True)
class SpeechAugmentConfig:
    """Augmentation of training utterances; a value of 0 (a single speed of 1) turns its part off.

    Args:
        speeds: each utterance is played at one of these, pitch and all (Ko et al., 2015).
        join: share of the items that are several utterances after one another with gaps between them, as in a long
            recording; their texts are joined by spaces.
        join_s: the longest such item.
        gap_s: least and greatest gap between them, and before the first and behind the last.
        gap_level_db: least and greatest level of the noise in gaps, against the speech; one gap in four is digital
            silence.
        gain_db: samples are made louder or softer by up to so much.
        noise: share of the items that get noise: of `noise_path` where that is set, else white to brown.
        noise_snr_db: least and greatest signal-to-noise ratio of it.
        mel_masks: ranges of mel bands set to the mean (SpecAugment; Park et al., 2019).
        mel_mask_bands: their greatest width.
        time_masks: stretches of frames set to the mean.
        time_mask_fraction: their greatest length each, as a share of the item's frames.
    """

    speeds: tuple[float, ...] = (0.9, 1.0, 1.1)
    join: float = 0.3
    join_s: float = 15.0
    gap_s: tuple[float, float] = (0.1, 1.5)
    gap_level_db: tuple[float, float] = (-60.0, -25.0)
    gain_db: float = 6.0
    noise: float = 0.3
    noise_snr_db: tuple[float, float] = (10.0, 40.0)
    mel_masks: int = 2
    mel_mask_bands: int = 27
    time_masks: int = 10
    time_mask_fraction: float = 0.05

    def __post_init__(self) -> None:
        for name in ("join", "noise", "time_mask_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"augment.{name} is {getattr(self, name)}: it must lie between 0 and 1")
        for name in ("join_s", "gain_db", "mel_masks", "mel_mask_bands", "time_masks"):
            if getattr(self, name) < 0:
                raise UserError(f"augment.{name} is {getattr(self, name)}: it must not be negative")
        for name in ("gap_s", "gap_level_db", "noise_snr_db"):
            if getattr(self, name)[0] > getattr(self, name)[1]:
                raise UserError(f"augment.{name} is {getattr(self, name)}: give the lower value first")
        if self.gap_s[0] < 0:
            raise UserError(f"augment.gap_s is {self.gap_s}: a gap must not be negative")
        if not self.speeds or not all(0.5 <= speed <= 2 for speed in self.speeds):
            raise UserError(f"augment.speeds is {self.speeds}: give one or more between 0.5 and 2")


def change_speed(samples: np.ndarray, speed: float, sample_rate: int) -> np.ndarray:
    """Samples (n,) played `speed` times as fast: about n / speed of them."""
    return resample(samples, round(sample_rate * speed), sample_rate)


def join(
    utterances: Sequence[np.ndarray],
    gaps_s: Sequence[float],
    sample_rate: int,
    level_db: tuple[float, float],
    rng: np.random.Generator,
) -> np.ndarray:
    """Utterances after one another, with gaps before, between and behind them (one gap more than utterances)."""
    level = max(map(rms, utterances))
    parts = []
    for number, gap_s in enumerate(gaps_s):
        parts.append(_gap(round(gap_s * sample_rate), level, level_db, rng))
        parts += utterances[number : number + 1]
    return np.concatenate(parts)


def _gap(count: int, level: float, level_db: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    if not count or rng.random() < 0.25:
        return np.zeros(count, np.float32)
    noise = coloured_noise(count, rng)
    loudness = rms(noise)
    return noise * np.float32(level / loudness * 10 ** (rng.uniform(*level_db) / 20)) if loudness else noise


def change_level(samples: np.ndarray, gain_db: float, rng: np.random.Generator) -> np.ndarray:
    """Samples (n,) with a random gain of up to so much either way."""
    return samples * np.float32(10 ** (rng.uniform(-gain_db, gain_db) / 20))


def add_noise(
    samples: np.ndarray, noise: Sequence[np.ndarray], snr_db: tuple[float, float], rng: np.random.Generator
) -> np.ndarray:
    """Samples (n,) with noise at a random ratio: a random stretch of one of the recordings, or made where there are
    none. Silence gets none: there is no ratio to keep."""
    recording = noise[int(rng.integers(len(noise)))] if noise else None
    made = coloured_noise(len(samples), rng) if recording is None else stretch(recording, len(samples), rng)
    level, noise_level = rms(samples), rms(made)
    if level == 0 or noise_level == 0:
        return samples
    return samples + made * np.float32(level / noise_level * 10 ** (-rng.uniform(*snr_db) / 20))


def draw_masks(config: SpeechAugmentConfig, features: FeatureConfig, frames: int, rng: np.random.Generator) -> Masks:
    """SpecAugment's masks for an item of so many frames."""
    bands = min(config.mel_mask_bands, features.n_mels)
    return Masks(
        _stretches(rng, config.time_masks, int(config.time_mask_fraction * frames), frames),
        _stretches(rng, config.mel_masks, bands, features.n_mels),
    )


def _stretches(rng: np.random.Generator, count: int, longest: int, size: int) -> np.ndarray:
    length = rng.integers(0, longest, count, endpoint=True)
    begin = rng.integers(0, size - length, endpoint=True)
    return np.stack([begin, begin + length], 1)
