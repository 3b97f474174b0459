from dataclasses import replace

import numpy as np
import pytest
import torch

from seqssm.data.audio.augment import (
    AugmentConfig,
    add_noise,
    apply_masks,
    apply_responses,
    bury,
    change_level,
    change_speed,
    coloured_noise,
    draw_masks,
    draw_response,
    mix,
    overlay,
    rms,
    shift,
)
from seqssm.data.features import FeatureConfig, fbank
from seqssm.errors import UserError

FEATURES = FeatureConfig(n_mels=20)


def noise(count: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(count)).astype(np.float32)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_masks_cover_what_they_say_and_nothing_else() -> None:
    config = AugmentConfig(time_masks=2, time_mask_s=0.2, mel_masks=1, mel_mask_fraction=0.3)
    features = torch.from_numpy(rng().standard_normal((8, 100, 20), np.float32))
    drawn = [draw_masks(config, FEATURES, 100, rng(i)) for i in range(8)]
    time = torch.from_numpy(np.stack([one.time for one in drawn]))
    mel = torch.from_numpy(np.stack([one.mel for one in drawn]))
    masked = apply_masks(features, time, mel)
    for row, before, one in zip(masked, features, drawn, strict=True):
        expected = before.clone()
        for begin, end in one.time:
            assert 0 <= begin <= end <= 100
            assert end - begin <= 20
            expected[begin:end] = 0
        for begin, end in one.mel:
            assert 0 <= begin <= end <= 20
            assert end - begin <= 6
            expected[:, begin:end] = 0
        assert torch.equal(row, expected)
    assert len({tuple(one.time.ravel()) for one in drawn}) > 1
    assert all((one.time[:, 1] - one.time[:, 0] <= 2).all() for one in [draw_masks(config, FEATURES, 8, rng(3))])


def test_gain_moves_the_log_energy_by_itself() -> None:
    samples = noise(16000)
    louder = change_level(samples, AugmentConfig(gain_db=6), rng(1))
    gain = louder[0] / samples[0]
    assert abs(20 * np.log10(gain)) <= 6
    difference = fbank(torch.from_numpy(louder), FEATURES) - fbank(torch.from_numpy(samples), FEATURES)
    assert torch.allclose(difference, torch.full_like(difference, float(2 * np.log(gain))), atol=1e-3)


def test_shift_rolls_and_noise_keeps_the_ratio() -> None:
    samples = np.arange(1000, dtype=np.float32)
    shifted = shift(samples, AugmentConfig(shift_s=0.01), 16000, rng(4))
    by = int(shifted[0])
    assert min(by, 1000 - by) <= 160
    assert np.array_equal(np.roll(samples, -by), shifted)
    clip = noise(16000)
    noisy = add_noise(clip, None, AugmentConfig(noise_snr_db=(20, 20)), rng(5))
    assert 20 * np.log10(rms(clip) / rms(noisy - clip)) == pytest.approx(20, abs=0.01)
    recorded = add_noise(clip, np.ones(3, np.float32), AugmentConfig(noise_snr_db=(0, 0)), rng(5))
    assert np.allclose(recorded - clip, rms(clip), atol=1e-6)
    assert not add_noise(np.zeros(100, np.float32), None, AugmentConfig(), rng()).any()


@pytest.mark.parametrize("slope", [0.0, 1.0, 2.0])
def test_the_noise_has_its_slope_and_repeats_without_a_seam(slope: float) -> None:
    made = coloured_noise(1 << 16, rng(), slope)
    power = np.abs(np.fft.rfft(made)) ** 2
    low, high = power[100:200].mean(), power[10_000:20_000].mean()
    assert np.log10(low / high) == pytest.approx(slope * 2, abs=0.25)
    steps = np.abs(np.diff(np.tile(made, 2)))
    assert steps[len(made) - 1] <= steps.max()


def test_mix_is_the_weighted_sum_wherever_the_second_lies() -> None:
    first, second = noise(1000, 1), noise(300, 2)
    mixed = mix(first, second, 0.4, rng())
    rest = mixed - np.float32(0.4) * first
    at = int(np.flatnonzero(np.abs(rest) > 1e-7)[0])
    assert np.allclose(rest[at : at + 300], 0.6 * second, atol=1e-6)
    assert np.abs(rest).sum() == pytest.approx(np.abs(0.6 * second).sum(), rel=1e-4)
    longer = mix(second, first, 0.5, rng()) - np.float32(0.5) * second
    places = [at for at in range(701) if np.allclose(longer, 0.5 * first[at : at + 300], atol=1e-6)]
    assert len(places) == 1


def test_overlay_brings_clips_to_one_level_and_below_full_scale() -> None:
    quiet, loud = 0.001 * noise(2000, 1), 5 * noise(1000, 2)
    both = overlay([quiet, loud], rng(), spread_db=0.0)
    assert len(both) == 2000
    assert np.abs(both).max() <= 1
    alone = overlay([quiet], rng(), spread_db=0.0)
    assert rms(alone) == pytest.approx(0.05, rel=1e-4)
    rest = both - alone
    at = int(np.flatnonzero(np.abs(rest) > 1e-6)[0])
    assert rms(rest[at : at + 1000]) == pytest.approx(0.05, rel=1e-3)
    assert not overlay([np.zeros(10, np.float32)], rng()).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixup": 1.5}, "augment.mixup is 1.5"),
        ({"gain_db": -1}, "must not be negative"),
        ({"mixup_alpha": 0}, "must be positive"),
        ({"noise_snr_db": (20, 10)}, "lower ratio first"),
    ],
)
def test_impossible_settings(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        AugmentConfig(**changes)


def test_a_faster_clip_is_higher_and_a_slower_one_lower() -> None:
    seconds = np.arange(16000) / 16000
    tone = np.sin(2 * np.pi * 1000 * seconds).astype(np.float32)
    heard = []
    for seed in range(20):
        made = change_speed(tone, AugmentConfig(speed=0.25), rng(seed))
        assert made.shape == tone.shape
        assert made.dtype == np.float32
        heard.append(np.abs(np.fft.rfft(made[:8000])).argmax() * 2)  # Hz
    assert min(heard) >= 798
    assert max(heard) <= 1252
    assert min(heard) < 900 < 1100 < max(heard)


def test_a_response_adds_its_decibels_to_real_frames_alone() -> None:
    config = replace(FEATURES, mean=-6.0, std=4.0)
    response = draw_response(AugmentConfig(equalizer_db=9), FEATURES, rng(2))
    assert response.shape == (20,)
    assert 1 < np.abs(response).max() <= 9
    samples = torch.from_numpy(noise(16000))
    features = torch.stack([fbank(samples, config), fbank(samples, config)])
    lengths = torch.tensor([features.shape[1], 40])
    features[1, 40:] = 0
    made = apply_responses(features, lengths, torch.from_numpy(np.stack([response, response])), config)
    gain = np.log(10 ** (response / 10)) / (2 * 4.0)
    torch.testing.assert_close(made[0] - features[0], torch.from_numpy(gain).expand_as(made[0]), rtol=1e-4, atol=1e-5)
    assert torch.equal(made[1, 40:], features[1, 40:])
    torch.testing.assert_close(made[1, :40], made[0, :40])


def test_a_buried_clip_keeps_a_stretch_in_soft_noise() -> None:
    loud = np.full(16000, 0.5, np.float32)
    kept = []
    for seed in range(30):
        made = bury(loud, None, rng(seed))
        whole = np.flatnonzero(made > 0.25)
        kept.append(len(whole) / 16000)
        rest = np.delete(made, np.arange(whole[0], whole[-1] + 1))
        assert not len(rest) or np.abs(rest).max() < 0.25  # noise of -30 dB at most
    assert 0.39 < min(kept) < 0.6
    assert max(kept) > 0.85
