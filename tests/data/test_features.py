import math

import numpy as np
import pytest
import torch
from torchaudio.compliance import kaldi

from seqssm.data.features import FeatureConfig, StreamingFbank, fbank
from seqssm.data.resampling import resample
from seqssm.errors import UserError

CONFIG = FeatureConfig(n_mels=40, mean=-6.5, std=4.0)


def noise(count: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(count)).astype(np.float32)


def stream(config: FeatureConfig, rate: int, samples: np.ndarray, packets: list[int]) -> torch.Tensor:
    streaming, frames, at = StreamingFbank(config, rate), [], 0
    for packet in packets:
        frames.append(streaming.accept(samples[..., at : at + packet]))
        at += packet
    return torch.cat([*frames, streaming.accept(samples[..., at:]), streaming.flush()])


@pytest.mark.parametrize(
    "config",
    [
        FeatureConfig(n_mels=64),
        FeatureConfig(n_mels=128, low_hz=50, high_hz=7000),
        FeatureConfig(sample_rate=8000, n_mels=23, frame_ms=32, hop_ms=16),
        FeatureConfig(sample_rate=44100, n_mels=80, hop_ms=12.5),
    ],
)
def test_the_values_are_kaldis(config: FeatureConfig) -> None:
    batch = torch.from_numpy(np.stack([noise(9000, seed) for seed in range(3)]))
    ours = fbank(batch, config)
    for row, samples in zip(ours, batch, strict=True):
        theirs = kaldi.fbank(
            samples[None],
            htk_compat=True,
            use_energy=False,
            dither=0,
            window_type="hanning",
            num_mel_bins=config.n_mels,
            sample_frequency=config.sample_rate,
            frame_length=config.frame_ms,
            frame_shift=config.hop_ms,
            low_freq=config.low_hz,
            high_freq=config.high_hz or 0.0,
        )
        assert row.shape == theirs.shape == (config.frames(9000), config.n_mels)
        # an empty band holds rounding errors alone, whose logarithm is anything
        audible = theirs > math.log(1e-6)
        difference = (row - theirs)[audible].abs()
        assert difference.max() < 1e-3  # a bin's rounding error against a small energy
        assert difference.mean() < 1e-5
        assert audible.float().mean() > 0.9


@pytest.mark.gpu
def test_a_gpu_gives_the_values_of_the_cpu() -> None:
    quiet = np.float32(10.0) ** -np.arange(6, dtype=np.float32)  # from loud to below what 16 bits can hold
    batch = torch.from_numpy(quiet[:, None] * np.stack([noise(80_000, seed) for seed in range(6)]))
    config = FeatureConfig(n_mels=128, mean=-6.5, std=4.0)
    torch.testing.assert_close(fbank(batch.cuda(), config).cpu(), fbank(batch, config), rtol=0, atol=2e-4)


def test_normalisation_and_silence() -> None:
    raw = fbank(torch.from_numpy(noise(16000)), FeatureConfig(n_mels=40))
    assert torch.allclose(fbank(torch.from_numpy(noise(16000)), CONFIG), (raw + 6.5) / 8)
    silence = fbank(torch.zeros(16000), FeatureConfig(n_mels=40))
    assert silence.unique().tolist() == pytest.approx([math.log(torch.finfo(torch.float32).eps)])


def test_a_recording_shorter_than_a_frame_is_one_frame() -> None:
    assert [CONFIG.frames(n) for n in (0, 1, 399, 400, 559, 560)] == [0, 1, 1, 1, 1, 2]
    samples = noise(100)
    filled = np.concatenate([samples, np.zeros(300, np.float32)])
    assert torch.equal(fbank(torch.from_numpy(samples), CONFIG), fbank(torch.from_numpy(filled), CONFIG))
    assert torch.equal(stream(CONFIG, 16000, samples, []), fbank(torch.from_numpy(samples), CONFIG))


@pytest.mark.parametrize("rate", [16000, 8000, 44100, 48000])
def test_streamed_frames_are_the_same_for_any_packets_and_those_of_the_whole(rate: int) -> None:
    samples = noise(round(1.7 * rate) + 3)
    whole = fbank(torch.from_numpy(resample(samples, rate, 16000)), CONFIG)
    expected = stream(CONFIG, rate, samples, [])
    assert expected.shape == whole.shape
    bands = slice(0, 25) if rate == 8000 else slice(None)  # above 4 kHz there is nothing to compare
    assert (expected - whole)[:, bands].abs().max() < 1e-4
    rng = np.random.default_rng(2)
    for packets in ([160] * 30, rng.integers(0, rate // 4, 10).tolist(), [1] * 40 + [rate]):
        assert torch.equal(stream(CONFIG, rate, samples, packets), expected)


def test_channels_are_averaged() -> None:
    left, right = noise(8000, 1), noise(8000, 2)
    both = stream(CONFIG, 16000, np.stack([left, right]), [1000] * 3)
    assert torch.equal(both, stream(CONFIG, 16000, (left + right) / 2, []))


def test_snapshot_resumes_and_refuses_other_settings() -> None:
    samples, at = noise(44100), 20_011
    expected = stream(CONFIG, 44100, samples, [])
    first = StreamingFbank(CONFIG, 44100)
    begun = first.accept(samples[:at])
    blob = first.snapshot()
    second = StreamingFbank(CONFIG, 44100)
    second.restore(blob)
    assert second.position == len(begun)
    assert torch.equal(torch.cat([begun, second.accept(samples[at:]), second.flush()]), expected)
    assert second.position == 0
    with pytest.raises(UserError, match="input_rate 44100, not 16000"):
        StreamingFbank(CONFIG, 16000).restore(blob)
    with pytest.raises(UserError, match="not a snapshot"):
        second.restore(b"something else")


def test_memory_is_flat() -> None:
    streaming, sizes = StreamingFbank(CONFIG, 22050), set()
    packet = noise(2205)
    for _ in range(60):
        streaming.accept(packet)
        sizes.add(len(streaming.snapshot()))
    assert max(sizes) < 30_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sample_rate": 0}, "sample_rate is 0"),
        ({"high_hz": 9000.0}, "half the sample rate"),
        ({"low_hz": 8000.0}, "low_hz < high_hz"),
        ({"n_mels": 1}, "n_mels is 1"),
        ({"hop_ms": 0.0}, "less than a sample"),
        ({"mean": 1.0}, "both mean and std"),
        ({"mean": 1.0, "std": 0.0}, "must be positive"),
    ],
)
def test_impossible_settings(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        FeatureConfig(**changes)


def test_settings_survive_as_plain_data() -> None:
    assert FeatureConfig(**CONFIG.to_dict()) == CONFIG
