from pathlib import Path

import numpy as np
import pytest
import soundfile

from seqssm.data.audio.augment import rms
from seqssm.data.audio.scenes import (
    Placement,
    clip_background,
    faded,
    make_scene,
    needle_parts,
    noise_background,
    scene_parts,
    write_scene,
)
from seqssm.errors import UserError

RATE = 1000


def noise(count: int, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(count)).astype(np.float32)


def nothing(count: int) -> np.ndarray:
    return np.zeros(count, np.float32)


def test_clips_sound_where_the_events_say_and_nowhere_else() -> None:
    clips = [noise(700, 1), noise(400, 2)]
    samples, events = make_scene(clips, nothing, RATE, Placement(gap_s=(0.2, 0.5), snr_db=None))
    assert [event.clip for event in events] == [0, 1]
    heard = np.zeros_like(samples)
    for event in events:
        begin, end = round(event.start_s * RATE), round(event.end_s * RATE)
        heard[begin:end] = faded(clips[event.clip], 20)
    assert np.array_equal(samples, heard)
    assert 0.2 <= events[0].start_s <= 0.5
    assert 0.2 <= events[1].start_s - events[0].end_s <= 0.5
    again, _ = make_scene(clips, nothing, RATE, Placement(gap_s=(0.2, 0.5), snr_db=None))
    assert np.array_equal(again, samples)
    other, _ = make_scene(clips, nothing, RATE, Placement(gap_s=(0.2, 0.5), snr_db=None, seed=1))
    assert not np.array_equal(other[: len(samples)], samples[: len(other)])


def test_the_background_may_sound_between_the_clips_alone() -> None:
    clip, fade = noise(700, 1), 20
    placement = Placement(gap_s=(0.3, 0.3), snr_db=None, between=True)
    samples, (event,) = make_scene([clip], noise_background(0), RATE, placement)
    behind, _ = make_scene([np.zeros_like(clip)], noise_background(0), RATE, Placement(gap_s=(0.3, 0.3), snr_db=None))
    begin, end = round(event.start_s * RATE), round(event.end_s * RATE)
    assert np.array_equal(samples[begin + fade : end - fade], clip[fade:-fade])
    assert np.array_equal(samples[:begin], behind[:begin])
    assert np.array_equal(samples[end:], behind[end:])
    assert rms(behind[begin:end]) > 0


def test_the_end_may_cut_the_last_clip() -> None:
    clips = [noise(700, 1), noise(400, 2)]
    samples, events = make_scene(clips, nothing, RATE, Placement(1.4, gap_s=(0.1, 0.1), snr_db=None, cut=True))
    assert [(event.start_s, event.end_s) for event in events] == [(0.1, 0.8), (0.9, 1.3)]
    samples, events = make_scene(clips, nothing, RATE, Placement(1.2, gap_s=(0.1, 0.1), snr_db=None, cut=True))
    assert [(event.start_s, event.end_s) for event in events] == [(0.1, 0.8), (0.9, 1.2)]
    assert len(samples) == 1200
    assert np.array_equal(samples[920:1180], clips[1][20:280])
    assert make_scene(clips, nothing, RATE, Placement(0.1, gap_s=(0.1, 0.1), cut=True))[1] == []


@pytest.mark.parametrize("seconds", [1.0, 7.3, 200.0])
def test_a_scene_is_as_long_as_asked_and_repeats_whole_clips(seconds: float) -> None:
    clips = [noise(700, 1), noise(400, 2)]
    samples, events = make_scene(clips, noise_background(0), RATE, Placement(seconds=seconds, gap_s=(0.1, 0.2)))
    assert len(samples) == round(seconds * RATE)
    assert [event.clip for event in events] == [i % 2 for i in range(len(events))]
    assert all(event.end_s <= seconds for event in events)
    assert len(events) >= int(seconds / 0.9) - 1


def test_the_clip_is_so_much_louder_than_the_background() -> None:
    clip = noise(4000, 3)
    background = noise_background(1, level=0.02, slope=0.0)
    samples, (event,) = make_scene([clip], background, RATE, Placement(gap_s=(3.0, 3.0), snr_db=14.0))
    begin, end = round(event.start_s * RATE), round(event.end_s * RATE)
    behind = rms(samples[:begin])
    assert behind == pytest.approx(0.02, rel=0.05)
    ratio = (rms(samples[begin:end]) ** 2 - behind**2) ** 0.5 / behind
    assert 20 * np.log10(ratio) == pytest.approx(14, abs=0.4)


def test_background_of_clips_has_one_level_and_no_seams() -> None:
    time = np.arange(3000) / RATE
    clips = [(gain * np.sin(2 * np.pi * 5 * time)).astype(np.float32) for gain in (0.5, 0.01)]
    more = clip_background([*clips, nothing(100)], RATE, seed=0, level=0.1)
    pieces = [more(count) for count in (10, 5000, 1, 12_000, 0, 999)]
    assert [len(piece) for piece in pieces] == [10, 5000, 1, 12_000, 0, 999]
    joined = np.concatenate(pieces)
    whole = clip_background([*clips, nothing(100)], RATE, seed=0, level=0.1)(len(joined))
    assert np.array_equal(joined, whole)
    assert rms(joined) == pytest.approx(0.1, rel=0.05)
    assert np.abs(np.diff(joined)).max() < 0.02
    with pytest.raises(UserError, match="are silent"):
        clip_background([nothing(10)], RATE, seed=0)


def test_noise_has_no_seams_between_pieces() -> None:
    pieces = noise_background(3)
    whole = noise_background(3)(3000)
    assert np.array_equal(np.concatenate([pieces(1), pieces(2000), pieces(999)]), whole)


def test_a_needle_lies_at_its_second(tmp_path: Path) -> None:
    clip = noise(500, 4)
    parts = needle_parts(clip, nothing, RATE, seconds=150, at_s=100.25, snr_db=None)
    sizes = []

    def counted():  # type: ignore[no-untyped-def]
        for part in parts:
            sizes.append(len(part))
            yield part

    write_scene(tmp_path / "needle.wav", counted(), RATE)
    assert max(sizes) <= 60 * RATE
    samples, rate = soundfile.read(tmp_path / "needle.wav", dtype="float32")
    assert rate == RATE
    assert len(samples) == 150 * RATE
    expected = np.zeros(150 * RATE, np.float32)
    expected[100_250:100_750] = faded(clip, 20)
    assert np.abs(samples - expected).max() < 5e-5
    with pytest.raises(UserError, match="does not fit into 10 s"):
        list(needle_parts(clip, nothing, RATE, seconds=10, at_s=9.8))


def test_an_hour_comes_in_pieces() -> None:
    most = total = 0
    placement = Placement(seconds=3600, gap_s=(500, 600))
    for samples, _ in scene_parts([noise(700)], lambda count: nothing(count), RATE, placement):
        most, total = max(most, len(samples)), total + len(samples)
    assert total == 3600 * RATE
    assert most <= 60 * RATE
