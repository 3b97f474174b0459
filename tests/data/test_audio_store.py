import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from seqssm.data.audio.layouts import Clip
from seqssm.data.audio.store import ClipStore, decode, default_cache, remarks, with_statistics
from seqssm.data.features import FeatureConfig, fbank
from seqssm.data.resampling import resample
from seqssm.errors import UserError

CONFIG = FeatureConfig(n_mels=20)


@pytest.fixture
def clips(tmp_path: Path) -> list[Clip]:
    """Three recordings of unequal rates, channels and lengths, and a part of the first."""
    made = []
    for i, (rate, channels) in enumerate([(16000, 1), (44100, 2), (8000, 8)]):
        data = 0.1 * np.random.default_rng(i).standard_normal((rate * (i + 1) // 4, channels))
        soundfile.write(tmp_path / f"{i}.wav", data, rate, subtype="FLOAT")
        made.append(Clip(tmp_path / f"{i}.wav", ("a",)))
    return [*made, Clip(tmp_path / "0.wav", ("b",), 0.1, 0.2)]


def expected(clip: Clip) -> np.ndarray:
    data, rate = soundfile.read(clip.path, dtype="float32", always_2d=True)
    end = None if clip.end_s is None else round(clip.end_s * rate)
    mono = data[round(clip.start_s * rate) : end].mean(1, dtype=np.float32)
    return resample(mono, rate, 16000)


@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
def test_samples_are_mono_at_one_rate_cached_or_not(clips: list[Clip], cache_gb: float) -> None:
    store = ClipStore(clips, 16000, cache_gb=cache_gb)
    assert [len(store[i]) for i in range(4)] == [4000, 8000, 12000, 1600]
    for number, clip in enumerate(clips):
        assert np.abs(store[number] - expected(clip)).max() < 1e-7
    assert store.seconds.tolist() == [0.25, 0.5, 0.75, 0.1]
    assert np.array_equal(store.read(0, 100, 50), store[0][100:150])
    assert np.array_equal(store.read(3, 1500, 500), store[3][1500:])
    copy = pickle.loads(pickle.dumps(store))
    assert len(pickle.dumps(store)) < 10_000
    assert np.array_equal(copy[2], store[2])


def test_the_second_time_nothing_is_decoded_until_a_file_changes(
    clips: list[Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ClipStore(clips, 16000)
    kept = [np.array(first[i]) for i in range(4)]
    with monkeypatch.context() as patched:
        patched.setattr("seqssm.data.audio.store.decode", None)
        again = ClipStore(clips, 16000)
        assert all(np.array_equal(again[i], kept[i]) for i in range(4))
        assert again.scans == first.scans
    soundfile.write(clips[0].path, np.zeros(160), 16000)
    assert len(ClipStore(clips[:3], 16000)[0]) == 160
    assert len(ClipStore(clips[:3], 8000)[0]) == 80
    for file in default_cache().glob("*.f32"):
        os.truncate(file, 4)  # a damaged cache is made again
    assert len(ClipStore(clips[:3], 16000)[1]) == 8000


def test_statistics_are_those_of_every_frame_and_are_kept(clips: list[Clip], monkeypatch: pytest.MonkeyPatch) -> None:
    store = ClipStore(clips, 16000)
    found = with_statistics(CONFIG, store, [0, 2])
    values = torch.cat([fbank(torch.from_numpy(np.array(store[i])), CONFIG) for i in (0, 2)]).double()
    assert found.mean == pytest.approx(float(values.mean()), abs=1e-6)
    assert found.std == pytest.approx(float(values.std(unbiased=False)), abs=1e-6)
    assert with_statistics(CONFIG, store, [0]).mean != found.mean
    monkeypatch.setattr("seqssm.data.audio.store.fbank", None)
    assert with_statistics(CONFIG, ClipStore(clips, 16000, cache_gb=0), [0, 2]) == found


def test_silent_data_has_no_statistics(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(8000), 16000)
    with pytest.raises(UserError, match="all silent"):
        with_statistics(CONFIG, ClipStore([Clip(tmp_path / "a.wav", ())], 16000), [0])


@pytest.mark.parametrize("cache_gb", [0.0, 1.0])
def test_bad_clips_are_named_or_left_out_with_a_count(clips: list[Clip], tmp_path: Path, cache_gb: float) -> None:
    (tmp_path / "text.wav").write_text("not audio at all, only a few words")
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "nan.wav", np.array([0.0, np.nan]), 16000, subtype="FLOAT")
    bad = [Clip(tmp_path / f"{name}.wav", ("a",)) for name in ("text", "none", "nan", "gone")]
    mixed = [bad[0], clips[0], *bad[1:], clips[1], Clip(tmp_path / "0.wav", (), 5.0)]
    with pytest.raises(UserError, match=r"text\.wav.*such clips; skip_bad leaves them out"):
        ClipStore(mixed, 16000, cache_gb=cache_gb)
    store = ClipStore(mixed, 16000, cache_gb=cache_gb, skip_bad=True)
    assert store.clips == clips[:2]
    assert store.left_out == {"unreadable clips": 5}
    assert np.abs(store[1] - expected(clips[1])).max() < 1e-7
    assert any(line.startswith("left out 5 unreadable clips; the first: ") for line in remarks(store))
    again = ClipStore(mixed, 16000, cache_gb=cache_gb, skip_bad=True)
    assert np.array_equal(again[1], store[1])
    with pytest.raises(UserError, match="not one of 4 clips is readable"):
        ClipStore(bad, 16000, cache_gb=cache_gb, skip_bad=True)


def test_remarks_say_what_was_done_to_the_recordings(clips: list[Clip], tmp_path: Path) -> None:
    soundfile.write(tmp_path / "silent.wav", np.zeros(800), 16000)
    soundfile.write(tmp_path / "clipped.wav", np.sign(np.sin(np.arange(800))), 16000)
    extra = [Clip(tmp_path / "silent.wav", ()), Clip(tmp_path / "clipped.wav", ())]
    assert remarks(ClipStore([*clips, *extra], 16000)) == [
        "resampled to 16,000 Hz: 1 of 8,000 Hz, 1 of 44,100 Hz",
        "averaged channels: 1 clips of 2 channels, 1 clips of 8 channels",
        f"1 silent clips (all samples zero), kept; the first: {tmp_path / 'silent.wav'}",
        f"1 clipped clips (samples at full scale), kept; the first: {tmp_path / 'clipped.wav'}",
    ]
    assert decode(extra[1], 16000)[1].clipped > 0.99


def test_equal_samples_have_equal_digests(clips: list[Clip], tmp_path: Path) -> None:
    data, _ = soundfile.read(clips[0].path, dtype="float32")
    soundfile.write(tmp_path / "copy.flac", data, 16000, subtype="PCM_24")
    soundfile.write(tmp_path / "copy.wav", data, 16000, subtype="FLOAT")
    copies = [clips[0], Clip(tmp_path / "copy.wav", ()), clips[1]]
    digests = [scan.digest for scan in ClipStore(copies, 16000).scans]
    assert digests[0] == digests[1] != digests[2]


def test_a_cache_that_cannot_be_written_is_named(clips: list[Clip], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write in .*file.*set cache_dir, or cache_gb 0"):
        ClipStore(clips, 16000, cache_dir=tmp_path / "file")
