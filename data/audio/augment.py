"""What training does to clips so that a model learns what does not matter: drawn from a seed, applied to tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from seqssm.data.features import FeatureConfig
from seqssm.errors import UserError

EQUALIZER_POINTS = 6  # bands, evenly spaced, whose gain is drawn


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of training clips; a value of 0 turns its part off.

    Args:
        mixup: share of the clips that are mixed with a second one, labels and samples alike (Zhang et al., 2018).
        mixup_alpha: the share of the first clip is drawn from Beta(alpha, alpha).
        time_masks: stretches of frames set to the mean (SpecAugment; Park et al., 2019).
        time_mask_s: their greatest length in seconds, and at most a quarter of the clip each.
        mel_masks: ranges of mel bands set to the mean.
        mel_mask_fraction: their greatest width as a share of the bands.
        gain_db: samples are made louder or softer by up to so much.
        shift_s: samples are rolled by up to so much, the end coming in at the start.
        speed: clips are played faster or slower, pitch and all, by a factor of up to 1 + speed.
        equalizer_db: a random smooth response in frequency, as another room or microphone has, of up to so much.
        noise: share of the clips that get noise: of `noise_path` where that is set, else white to brown.
        noise_snr_db: least and greatest signal-to-noise ratio of it.
        empty: share of the clips that are such noise alone, soft or loud, with no label (where clips have exactly one:
            with equal shares of all), so that a background is no event.
        buried: share of the clips of which a random stretch is left, with such noise around it, so that a label does
            not depend on how much of a recording has the sound.
    """

    mixup: float = 0.5
    mixup_alpha: float = 10.0
    time_masks: int = 2
    time_mask_s: float = 0.5
    mel_masks: int = 2
    mel_mask_fraction: float = 0.15
    gain_db: float = 6.0
    shift_s: float = 1.0
    speed: float = 0.0
    equalizer_db: float = 0.0
    noise: float = 0.2
    noise_snr_db: tuple[float, float] = (10.0, 40.0)
    empty: float = 0.0
    buried: float = 0.0

    def __post_init__(self) -> None:
        for name in ("mixup", "noise", "mel_mask_fraction", "empty", "buried"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"augment.{name} is {getattr(self, name)}: it must lie between 0 and 1")
        for name in ("time_masks", "time_mask_s", "mel_masks", "gain_db", "shift_s", "speed", "equalizer_db"):
            if getattr(self, name) < 0:
                raise UserError(f"augment.{name} is {getattr(self, name)}: it must not be negative")
        if self.mixup_alpha <= 0:
            raise UserError(f"augment.mixup_alpha is {self.mixup_alpha}: it must be positive")
        if self.noise_snr_db[0] > self.noise_snr_db[1]:
            raise UserError(f"augment.noise_snr_db is {self.noise_snr_db}: give the lower ratio first")


class Masks(NamedTuple):
    """What SpecAugment blanks: time (k,2) int64 and mel (m,2) int64, each from and to, exclusive."""

    time: np.ndarray
    mel: np.ndarray


def draw_masks(config: AugmentConfig, features: FeatureConfig, frames: int, rng: np.random.Generator) -> Masks:
    """Masks for a clip of so many frames."""
    longest = min(round(config.time_mask_s * 1000 / features.hop_ms), frames // 4)
    return Masks(
        _stretches(rng, config.time_masks, longest, frames),
        _stretches(rng, config.mel_masks, round(config.mel_mask_fraction * features.n_mels), features.n_mels),
    )


def _stretches(rng: np.random.Generator, count: int, longest: int, size: int) -> np.ndarray:
    length = rng.integers(0, longest, count, endpoint=True)
    begin = rng.integers(0, np.maximum(size - length, 0), endpoint=True)
    return np.stack([begin, begin + length], 1)


def apply_masks(features: Tensor, time: Tensor, mel: Tensor) -> Tensor:
    """Features (b,l,mel) with zeros, which is the mean, in the stretches time (b,k,2) and mel (b,m,2)."""
    frame = torch.arange(features.shape[1], device=features.device)
    band = torch.arange(features.shape[2], device=features.device)
    in_time = ((frame >= time[..., :1]) & (frame < time[..., 1:])).any(1)  # (b,l)
    in_mel = ((band >= mel[..., :1]) & (band < mel[..., 1:])).any(1)  # (b,mel)
    return features.masked_fill(in_time[:, :, None] | in_mel[:, None, :], 0.0)


def draw_response(config: AugmentConfig, features: FeatureConfig, rng: np.random.Generator) -> np.ndarray:
    """A random smooth response (mel,) float32 in dB: gains of a few bands, straight lines between them."""
    points = rng.uniform(-config.equalizer_db, config.equalizer_db, EQUALIZER_POINTS)
    bands = np.linspace(0, EQUALIZER_POINTS - 1, features.n_mels)
    return np.interp(bands, np.arange(EQUALIZER_POINTS), points).astype(np.float32)


def apply_responses(features: Tensor, lengths: Tensor, responses: Tensor, config: FeatureConfig) -> Tensor:
    """Features (b,l,mel) of the first `lengths` (b,) frames with responses (b,mel) dB; the padding stays zero."""
    per_db = math.log(10) / 10  # energies are natural logarithms
    if config.std is not None:
        per_db /= 2 * config.std
    frame = torch.arange(features.shape[1], device=features.device)
    return features + (responses * per_db)[:, None] * (frame < lengths[:, None])[..., None]


def change_level(samples: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Samples (n,) with a random gain."""
    gain_db = rng.uniform(-config.gain_db, config.gain_db)
    return samples * np.float32(10 ** (gain_db / 20))


def shift(samples: np.ndarray, config: AugmentConfig, sample_rate: int, rng: np.random.Generator) -> np.ndarray:
    """Samples (n,) rolled by a random time."""
    longest = round(config.shift_s * sample_rate)
    return np.roll(samples, rng.integers(-longest, longest, endpoint=True))


def change_speed(samples: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Samples (n,) faster or slower by a random factor, cut or repeated from the start to be (n,) again."""
    import soxr

    factor = (1 + config.speed) ** rng.uniform(-1, 1)
    made = soxr.resample(samples, factor, 1.0, quality="LQ")
    return np.resize(made, len(samples)) if len(made) else samples


def add_noise(
    samples: np.ndarray, noise: np.ndarray | None, config: AugmentConfig, rng: np.random.Generator
) -> np.ndarray:
    """Samples (n,) with noise at a random ratio: a random stretch of a recording (m,), or made with a random slope.

    A silent clip gets none: there is no ratio to keep.
    """
    made = coloured_noise(len(samples), rng) if noise is None else stretch(noise, len(samples), rng)
    snr_db = rng.uniform(*config.noise_snr_db)
    level, noise_level = rms(samples), rms(made)
    if level == 0 or noise_level == 0:
        return samples
    return samples + made * np.float32(level / noise_level * 10 ** (-snr_db / 20))


LEAST_BURIED = 0.4  # of a clip that is left in noise
EMPTY_LEVEL_DB = (-80.0, -30.0)  # of clips that are noise alone, relative to full scale


def only_noise(count: int, noise: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """Noise (count,) at a random level: a random stretch of a recording (m,), or made with a random slope."""
    made = coloured_noise(count, rng) if noise is None else stretch(noise, count, rng)
    level = rms(made)
    return made * np.float32(10 ** (rng.uniform(*EMPTY_LEVEL_DB) / 20) / level) if level else made


def bury(samples: np.ndarray, noise: np.ndarray | None, rng: np.random.Generator) -> np.ndarray:
    """A random stretch of samples (n,), in noise as :func:`only_noise` makes it."""
    begin, end = buried_stretch(len(samples), rng)
    out = only_noise(len(samples), noise, rng)
    out[begin:end] += samples[begin:end]
    return out


def buried_stretch(count: int, rng: np.random.Generator) -> tuple[int, int]:
    """What is left of ``count`` samples that are buried: from and to, exclusive."""
    kept = int(rng.uniform(LEAST_BURIED, 1) * count)
    begin = int(rng.integers(0, count - kept, endpoint=True))
    return begin, begin + kept


def coloured_noise(count: int, rng: np.random.Generator, slope: float | None = None) -> np.ndarray:
    """Noise (count,) float32 whose power falls as 1/f^slope, 0 for white to 2 for brown; by default a random slope.

    A power of two of samples can be repeated without a seam.
    """
    size = 1 << max(count - 1, 1).bit_length()
    exponent = (rng.uniform(0, 2) if slope is None else slope) / 2
    spectrum = np.fft.rfft(rng.standard_normal(size, np.float32))
    spectrum *= np.maximum(np.arange(len(spectrum)), 1.0) ** -exponent
    return np.fft.irfft(spectrum, size)[:count].astype(np.float32)


def stretch(samples: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """A random stretch (count,) of samples (n,), repeated where they are too short."""
    if len(samples) < count:
        samples = np.tile(samples, -(-count // len(samples)) + 1)
    begin = int(rng.integers(0, len(samples) - count, endpoint=True))
    return samples[begin : begin + count]


def mix(first: np.ndarray, second: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """`share` of the first clip and the rest of the second, as long as the first; a random stretch of a longer second,
    a random place for a shorter one."""
    mixed = first * np.float32(share)
    spare = len(first) - len(second)
    if spare <= 0:
        return mixed + stretch(second, len(first), rng) * np.float32(1 - share)
    at = int(rng.integers(0, spare, endpoint=True))
    mixed[at : at + len(second)] += second * np.float32(1 - share)
    return mixed


def overlay(clips: Sequence[np.ndarray], rng: np.random.Generator, spread_db: float = 5.0) -> np.ndarray:
    """Clips that sound at once, as long as the longest: brought to equal levels, give or take `spread_db`, then summed
    and kept below full scale. Shorter ones lie at a random place."""
    length = max(map(len, clips))
    total = np.zeros(length, np.float32)
    for clip in clips:
        level = rms(clip)
        gain = 0.05 / level * 10 ** (rng.uniform(-spread_db, spread_db) / 20) if level > 0 else 0.0
        at = int(rng.integers(0, length - len(clip), endpoint=True))
        total[at : at + len(clip)] += clip * np.float32(gain)
    peak = np.abs(total).max()
    return total / np.maximum(peak, np.float32(1.0))


def rms(samples: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(samples, dtype=np.float64))))
