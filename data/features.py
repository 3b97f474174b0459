"""Log-mel filter bank features as Kaldi's, for whole recordings, batches on any device, and streams of packets."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from seqssm.data.resampling import StreamingResampler
from seqssm.errors import UserError

PREEMPHASIS = 0.97  # Kaldi's
FLOOR = torch.finfo(torch.float32).eps  # of the mel energies, before the logarithm


@dataclass(frozen=True)
class FeatureConfig:
    """What turns samples into features; it travels with the weights.

    Args:
        sample_rate: Hz; recordings of other rates are resampled.
        n_mels: mel bands.
        frame_ms: length of a frame.
        hop_ms: distance between frames.
        low_hz: lower edge of the lowest band.
        high_hz: upper edge of the highest band; half the sample rate by default.
        mean: the mean log-mel energy of the training data; not yet known where None.
        std: its standard deviation. Features are ``(x - mean) / (2 std)``, or ``x`` where these are None.
    """

    sample_rate: int = 16_000
    n_mels: int = 128
    frame_ms: float = 25.0
    hop_ms: float = 10.0
    low_hz: float = 20.0
    high_hz: float | None = None
    mean: float | None = None
    std: float | None = None

    def __post_init__(self) -> None:
        high_hz = self.sample_rate / 2 if self.high_hz is None else self.high_hz
        if not 1000 <= self.sample_rate <= 768_000:
            raise UserError(f"features.sample_rate is {self.sample_rate}: it must lie between 1,000 and 768,000 Hz")
        if not 0 <= self.low_hz < high_hz <= self.sample_rate / 2:
            raise UserError(
                f"features: low_hz {self.low_hz} and high_hz {high_hz} must satisfy 0 <= low_hz < high_hz <= "
                f"{self.sample_rate / 2} (half the sample rate)"
            )
        if self.n_mels < 4:
            raise UserError(f"features.n_mels is {self.n_mels}: four at least")
        if self.hop_samples < 1 or self.frame_samples < 2:
            raise UserError(f"features: frame_ms {self.frame_ms} or hop_ms {self.hop_ms} is less than a sample")
        if (self.mean is None) != (self.std is None):
            raise UserError("features: give both mean and std, or neither to have them computed")
        if self.std is not None and not self.std > 0:
            raise UserError(f"features.std is {self.std}: it must be positive")

    @property
    def frame_samples(self) -> int:
        return int(self.sample_rate * self.frame_ms * 0.001)

    @property
    def hop_samples(self) -> int:
        return int(self.sample_rate * self.hop_ms * 0.001)

    def frames(self, samples: int) -> int:
        """Frames of a recording: those that fit in whole, and one for a recording shorter than a frame."""
        if samples < self.frame_samples:
            return int(samples > 0)
        return 1 + (samples - self.frame_samples) // self.hop_samples

    def to_dict(self) -> dict[str, Any]:
        """Plain data; ``FeatureConfig(**d)`` builds it again."""
        return asdict(self)


@lru_cache(maxsize=8)
def _window_and_banks(config: FeatureConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Hann window (w,) and mel filters (bins, mel)."""
    from torchaudio.compliance.kaldi import get_mel_banks

    fft = _fft_samples(config)
    high_hz = config.high_hz or 0.0  # Kaldi counts zero and less from half the rate down
    banks, _ = get_mel_banks(config.n_mels, fft, config.sample_rate, config.low_hz, high_hz, 100.0, -500.0, 1.0)
    window = torch.hann_window(config.frame_samples, periodic=False)
    return window.to(device), F.pad(banks, (0, 1)).T.contiguous().to(device)


def _fft_samples(config: FeatureConfig) -> int:
    return 1 << (config.frame_samples - 1).bit_length()


def fbank(samples: Tensor, config: FeatureConfig) -> Tensor:
    """Normalised log-mel energies (..., frames, mel) float32 of samples (..., n) between -1 and 1.

    The values of ``torchaudio.compliance.kaldi.fbank(htk_compat=True, use_energy=False, dither=0,
    window_type="hanning")``, for a batch at once, on the samples' device. Each frame depends on its own samples only.
    A recording shorter than a frame is filled up with zeros.
    """
    window, banks = _window_and_banks(config, samples.device)
    if samples.shape[-1] < config.frame_samples:
        samples = F.pad(samples, (0, config.frame_samples - samples.shape[-1]))
    frames = samples.unfold(-1, config.frame_samples, config.hop_samples)  # (..., f, w)
    frames = frames - frames.mean(-1, keepdim=True)
    previous = torch.cat([frames[..., :1], frames[..., :-1]], -1)
    shaped = torch.sub(frames, previous, alpha=PREEMPHASIS).mul_(window)
    spectrum = torch.fft.rfft(F.pad(shaped, (0, _fft_samples(config) - config.frame_samples)))
    power = spectrum.real.square() + spectrum.imag.square()
    return normalise((power @ banks).clamp_min(FLOOR).log(), config)


def normalise(log_mel: Tensor, config: FeatureConfig) -> Tensor:
    """``(x - mean) / (2 std)``; unchanged where the statistics are not known."""
    if config.mean is None or config.std is None:
        return log_mel
    return (log_mel - config.mean) / (2 * config.std)


class StreamingFbank:
    """`fbank` of packets as they come: the resampler's state and the remainder of a frame are carried.

    Frames are computed in blocks of a fixed size (matrix products of other shapes round differently), so the output is
    the same to the byte for any packet sizes; only the last block, at `flush`, may be smaller.

    Args:
        config: the features.
        input_rate: of the packets, in Hz.
        block_frames: frames computed at once, which adds up to ``block_frames - 1`` hops of delay.

    Attributes:
        position: frames given out.
    """

    def __init__(self, config: FeatureConfig, input_rate: int, block_frames: int = 8) -> None:
        if block_frames < 1:
            raise ValueError(f"block_frames must be positive, got {block_frames}")
        self.config = config
        self.block_frames = block_frames
        self._resampler = StreamingResampler(input_rate, config.sample_rate)
        self.reset()

    def reset(self) -> None:
        """Start a new recording."""
        self._resampler.reset()
        self._samples = np.zeros(0, np.float32)  # those from the next frame's first on
        self.position = 0

    def accept(self, samples: np.ndarray | Tensor) -> Tensor:
        """New frames (f, mel), possibly none, for the next samples (n,) or (channels, n), which are averaged."""
        self._samples = np.concatenate([self._samples, self._resampler.accept(_mono(samples))])
        hop, frame = self.config.hop_samples, self.config.frame_samples
        step, span = self.block_frames * hop, (self.block_frames - 1) * hop + frame
        made, at = [], 0
        while at + span <= len(self._samples):
            made.append(self._frames(self._samples[at : at + span]))
            at += step
        self._samples = self._samples[at:].copy()
        return self._given(made)

    def flush(self) -> Tensor:
        """The remaining frames, the recording having ended; a new one may begin."""
        made = [self.accept(np.zeros(0, np.float32))]
        position = self.position
        rest = np.concatenate([self._samples, self._resampler.flush()])
        hop, frame = self.config.hop_samples, self.config.frame_samples
        step, span = self.block_frames * hop, (self.block_frames - 1) * hop + frame
        while len(rest) >= span:
            made.append(self._frames(rest[:span]))
            rest = rest[step:]
        if len(rest) >= frame or (len(rest) and not position and len(made) == 1):
            made.append(self._frames(rest))
        self.reset()
        return torch.cat(made)

    def _frames(self, samples: np.ndarray) -> Tensor:
        return fbank(torch.from_numpy(samples), self.config)

    def _given(self, made: list[Tensor]) -> Tensor:
        frames = torch.cat(made) if made else torch.zeros(0, self.config.n_mels)
        self.position += len(frames)
        return frames

    def snapshot(self) -> bytes:
        """The state as one safetensors blob, for `restore` in another process."""
        from safetensors.torch import save

        resampler = self._resampler.snapshot()
        tensors = {"samples": torch.from_numpy(self._samples.copy()), "input": torch.from_numpy(resampler["input"])}
        counts = {"position": self.position, "first": resampler["first"], "done": resampler["done"]}
        return save(tensors, metadata={**self._settings(), **{key: str(value) for key, value in counts.items()}})

    def restore(self, blob: bytes) -> None:
        """Go on from what `snapshot` gave; raises UserError for other settings or a blob of something else."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            tensors = load(blob)
            about = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")]).get("__metadata__", {})
        except (SafetensorError, ValueError) as error:
            raise UserError("this is not a snapshot of streaming features, or it is damaged") from error
        for key, value in self._settings().items():
            if about.get(key) != value:
                raise UserError(f"the snapshot is of streaming features with {key} {about.get(key)}, not {value}")
        self._samples, self.position = tensors["samples"].numpy().copy(), int(about["position"])
        state = {"input": tensors["input"].numpy(), "first": about["first"], "done": about["done"]}
        self._resampler.restore(state)

    def _settings(self) -> dict[str, str]:
        return {
            "format": "seqssm-features-1",
            "input_rate": str(self._resampler.source_rate),
            "block_frames": str(self.block_frames),
            "features": json.dumps(self.config.to_dict(), sort_keys=True),
        }


def _mono(samples: np.ndarray | Tensor) -> np.ndarray:
    array = samples.numpy() if isinstance(samples, Tensor) else np.asarray(samples)
    return array if array.ndim == 1 else array.mean(0, dtype=np.float32)
