import numpy as np
import pytest
import soxr

from seqssm.data.resampling import StreamingResampler, check_rate, resample, resampled_length
from seqssm.errors import UserError

RATES = [8000, 11025, 22050, 44100, 48000, 96000, 192000, 12345]


def noise(count: int, seed: int = 0) -> np.ndarray:
    return (0.2 * np.random.default_rng(seed).standard_normal(count)).astype(np.float32)


def stream(samples: np.ndarray, source: int, target: int, packets: list[int]) -> np.ndarray:
    resampler, parts, at = StreamingResampler(source, target), [], 0
    for packet in packets:
        parts.append(resampler.accept(samples[at : at + packet]))
        at += packet
    parts += [resampler.accept(samples[at:]), resampler.flush()]
    return np.concatenate(parts)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("target", [16000, 8000, 44100])
def test_the_stream_is_the_conversion_of_the_whole_for_any_packets(rate: int, target: int) -> None:
    samples = noise(round(1.3 * rate) + 7)
    whole = resample(samples, rate, target)
    assert len(whole) == resampled_length(len(samples), rate, target)
    packets = np.random.default_rng(1).integers(0, rate // 5, 12).tolist()
    streamed = stream(samples, rate, target, packets)
    assert streamed.shape == whole.shape
    assert np.abs(streamed - whole).max() < 2e-6
    for others in ([], [1] * 50, [rate]):
        assert stream(samples, rate, target, others).tobytes() == streamed.tobytes()


def test_a_tone_stays_in_place_and_is_as_long_as_before() -> None:
    at_44 = np.sin(2 * np.pi * 440 * np.arange(44100) / 44100).astype(np.float32)
    at_16 = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert np.abs(resample(at_44, 44100, 16000) - at_16)[200:-200].max() < 1e-4
    both = resample(np.stack([at_44, -at_44]), 44100, 16000)
    assert np.array_equal(both[0], -both[1])
    assert np.array_equal(both[0], soxr.resample(at_44, 44100, 16000))


@pytest.mark.parametrize("count", [1, 2, 3, 100, 441, 442, 1000])
def test_very_short_recordings(count: int) -> None:
    samples = noise(count)
    whole = resample(samples, 44100, 16000)
    assert np.abs(stream(samples, 44100, 16000, []) - whole).max(initial=0) < 2e-6


def test_snapshot_goes_on_elsewhere_and_memory_stays_flat() -> None:
    samples = noise(44100 * 3)
    expected = stream(samples, 44100, 16000, [])
    first, at = StreamingResampler(44100, 16000), 50_003
    begun = first.accept(samples[:at])
    second = StreamingResampler(44100, 16000)
    second.restore(first.snapshot())
    rest = [second.accept(samples[at:]), second.flush()]
    assert np.concatenate([begun, *rest]).tobytes() == expected.tobytes()
    sizes = []
    for _ in range(200):
        first.accept(samples[:4410])
        sizes.append(len(first.snapshot()["input"]))
    assert max(sizes) < 8820


@pytest.mark.parametrize("rate", [0, -1, 768_001, 44100.5])
def test_impossible_rates(rate: float) -> None:
    with pytest.raises(UserError, match=r"file\.wav: a sample rate of"):
        check_rate(rate, "file.wav")
