"""The same code on real recordings, where they lie beside the repository."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from seqssm.data import AudioTaggingDataModule
from seqssm.data.audio.reading import read_audio
from seqssm.data.audio.splits import split_clips

DATA = Path(__file__).parents[3] / "shared" / "data" / "tagging" / "kitchen20"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data beside the repository")


def test_kitchen20_is_divided_by_source() -> None:
    data = AudioTaggingDataModule(str(DATA))
    assert len(data.labels) == 20
    assert not data.multi_label
    clips = data._list().clips
    assert len(clips) == 822
    split, _ = split_clips(clips, data.split_plan, several=False)
    counts = Counter(split)
    assert [counts[name] / 822 for name in ("train", "val", "test")] == pytest.approx([0.7, 0.15, 0.15], abs=0.03)
    labels_of: dict[str, set[str]] = {}
    splits_of: dict[str, set[str]] = {}
    for clip, one in zip(clips, split, strict=True):
        labels_of.setdefault(clip.group, set()).update(clip.labels)
        splits_of.setdefault(clip.group, set()).add(one)
    assert all(len(names) == 1 for names in splits_of.values())
    two = [group for group, labels in labels_of.items() if len(labels) > 1]
    assert two
    assert all(splits_of[group] == {"train"} for group in two)


def test_a_recording_reads_as_soundfile_reads_it() -> None:
    path = sorted((DATA / "audio").glob("*.ogg"))[0]
    expected, rate = soundfile.read(path, dtype="float32")
    samples, read_rate = read_audio(path)
    assert read_rate == rate == 16000
    assert np.array_equal(samples[0], expected)
