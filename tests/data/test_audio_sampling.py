from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader

from seqssm.data.audio.augment import AugmentConfig
from seqssm.data.audio.batches import AudioBatch, batch_features, with_features
from seqssm.data.audio.layouts import Clip
from seqssm.data.audio.sampling import OrderedClips, SplitClips, TrainingClips, collate
from seqssm.data.audio.store import ClipStore
from seqssm.data.features import FeatureConfig, fbank

CONFIG = FeatureConfig(n_mels=20, mean=-7.0, std=3.0)
PLAIN = AugmentConfig(mixup=0, time_masks=0, mel_masks=0, gain_db=0, shift_s=0, noise=0)
LABELS = ["a", "b", "c"]


@pytest.fixture
def split(tmp_path: Path) -> SplitClips:
    """Clip i is noise of 1600 + 160 i samples; six of class a, three of b, one of c."""
    clips = []
    for i, label in enumerate("aaaaaabbbc"):
        data = 0.1 * np.random.default_rng(i).standard_normal(1600 + 160 * i)
        soundfile.write(tmp_path / f"{i}.wav", data, 16000, subtype="FLOAT")
        clips.append(Clip(tmp_path / f"{i}.wav", (label,), group=f"g{i}"))
    return SplitClips.of(ClipStore(clips, 16000), range(10), LABELS)


def training(split: SplitClips, **changes: object) -> TrainingClips:
    arguments = {"several": False, "clips_per_epoch": len(split), "seed": 0, "augment": PLAIN, **changes}
    return TrainingClips(split, CONFIG, **arguments)


def same(one, other) -> bool:  # type: ignore[no-untyped-def]
    return np.array_equal(one.samples, other.samples) and np.array_equal(one.target, other.target)


def test_padding_and_neighbours_change_no_frame(split: SplitClips) -> None:
    samples = [torch.from_numpy(np.array(split.store[i])) for i in (0, 9, 4)]
    features, lengths = batch_features(samples, CONFIG)
    assert lengths.tolist() == [CONFIG.frames(len(one)) for one in samples]
    for row, length, one in zip(features, lengths, samples, strict=True):
        alone = fbank(one, CONFIG)
        assert torch.allclose(row[:length], alone, atol=1e-6)
        assert not row[length:].any()
        assert length == len(alone)
    tiny, lengths = batch_features([samples[0][:100], samples[0][:400], samples[0]], CONFIG)
    assert lengths.tolist() == [1, 1, 8]
    assert torch.allclose(tiny[0, :1], fbank(samples[0][:100], CONFIG), atol=1e-6)


def test_ordered_clips_are_whole_and_in_order(split: SplitClips) -> None:
    loader = DataLoader(OrderedClips(split, False, 0), batch_size=4, collate_fn=collate)
    batches = [with_features(batch, CONFIG) for batch in loader]
    assert isinstance(batches[0], AudioBatch)
    assert torch.cat([batch.labels for batch in batches]).tolist() == [0] * 6 + [1] * 3 + [2]
    assert torch.cat([batch.sources for batch in batches])[:, 0].tolist() == list(range(10))
    assert torch.allclose(batches[2].features[1], fbank(torch.from_numpy(np.array(split.store[9])), CONFIG), atol=1e-6)


def test_every_clip_comes_once_an_epoch_in_an_order_that_the_seed_decides(split: SplitClips) -> None:
    dataset = training(split)
    first = [dataset[i].sources[0] for i in range(10)]
    second = [dataset[i].sources[0] for i in range(10, 20)]
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert [training(split)[i].sources[0] for i in range(10)] == first
    assert [training(split, seed=1)[i].sources[0] for i in range(10)] != first
    sample = dataset[3]
    assert np.array_equal(sample.samples, split.store[first[3]])
    assert sample.target == split.targets[first[3]].argmax()
    short = training(split, clips_per_epoch=4)
    assert sorted(short[i].sources[0] for i in range(20)) == sorted([*range(10)] * 2)


def test_balance(split: SplitClips) -> None:
    dataset = training(split, balance=True, clips_per_epoch=12)
    assert Counter(int(dataset[i].target) for i in range(12)) == {0: 4, 1: 4, 2: 4}
    split.targets[9, 0] = 1  # with several labels a clip each, by chance
    several = training(split, balance=True, several=True, clips_per_epoch=3000)
    drawn = Counter(several.draw(0).tolist())
    weight = np.array([1 / 7] * 6 + [1 / 3] * 3 + [1 + 1 / 7])
    for i, expected in enumerate(3000 * weight / weight.sum()):
        assert drawn[i] == pytest.approx(expected, abs=5 * expected**0.5)


def test_an_item_depends_on_seed_and_number_alone(split: SplitClips) -> None:
    full = AugmentConfig(noise=0.5, speed=0.2, equalizer_db=6)
    one, other = training(split, augment=full), training(split, augment=full)
    backwards = [other[i] for i in reversed(range(30))][::-1]
    assert all(same(one[i], backwards[i]) for i in range(30))
    assert all(np.array_equal(one[i].masks.time, backwards[i].masks.time) for i in range(30))
    assert not same(training(split, augment=full, seed=1)[0], one[0])
    workers = DataLoader(one, batch_size=5, collate_fn=collate, num_workers=2)
    alone = DataLoader(one, batch_size=5, collate_fn=collate)
    for left, right in zip(workers, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_mixup_mixes_samples_and_labels_alike(split: SplitClips) -> None:
    dataset = training(split, augment=AugmentConfig(**{**PLAIN.__dict__, "mixup": 1.0}), clips_per_epoch=200)
    assert dataset.several
    shares = []
    for i in range(40):
        sample = dataset[i]
        first, second = sample.sources
        share = sample.weights[0]
        shares.append(share)
        expected = np.float32(share) * split.targets[first] + np.float32(1 - share) * split.targets[second]
        assert np.allclose(sample.target, expected, atol=1e-6)
        assert len(sample.samples) == len(split.store[first])
        rest = sample.samples - np.float32(share) * split.store[first]
        whole = split.store[second]
        size = min(len(rest), len(whole))
        at = int(np.argmax(np.abs(rest) > 1e-6))  # where the second begins
        found = rest[at : at + size]
        assert len(found) == size
        assert np.abs(np.correlate(whole, found[:300])).max() == pytest.approx(
            float(1 - share) ** -1 * float(found[:300] @ found[:300]), rel=1e-3
        )
    assert np.mean(shares) == pytest.approx(0.5, abs=0.06)
    assert np.std(shares) == pytest.approx(0.109, abs=0.04)  # Beta(10, 10)
    batch = collate([dataset[i] for i in range(4)])
    assert batch.labels.dtype == torch.float32
    assert torch.allclose(batch.labels.sum(1), torch.ones(4))
    assert torch.allclose(batch.weights.sum(1), torch.ones(4))


def test_half_of_the_clips_are_mixed_and_padded_with_none(split: SplitClips) -> None:
    dataset = training(split, augment=AugmentConfig(**{**PLAIN.__dict__, "mixup": 0.5}), clips_per_epoch=400)
    counts = Counter(len(dataset[i].sources) for i in range(400))
    assert counts[2] == pytest.approx(200, abs=50)
    batch = collate([dataset[i] for i in range(20)])
    single = batch.sources[:, 1] == -1
    assert single.any()
    assert (batch.weights[single] == torch.tensor([1.0, 0.0])).all()


def test_crops_are_stretches_of_longer_clips(split: SplitClips) -> None:
    dataset = training(split, crop_s=0.12)
    begins = set()
    for i in range(50):
        sample = dataset[i]
        whole = split.store[sample.sources[0]]
        assert len(sample.samples) == min(1920, len(whole))
        if sample.sources[0] == 9:
            windows = np.lib.stride_tricks.sliding_window_view(whole, 1920)
            begins.add(int(np.flatnonzero((windows == sample.samples).all(1))[0]))
    assert len(begins) > 2


def test_mixtures_stay_in_their_split_and_hold_the_labels_of_all(split: SplitClips) -> None:
    mixed = split.with_mixtures((1, 3), seed=0)
    assert [m[0] for m in mixed.mixtures] == list(range(10))
    assert {len(m) for m in mixed.mixtures} == {1, 2, 3}
    ordered = OrderedClips(mixed, True, 0)
    for i, (clip, members) in enumerate(zip(mixed.items(), mixed.mixtures, strict=True)):
        labels = {split.clips[m].labels[0] for m in members}
        assert len(labels) == len(members)  # of other classes each
        assert clip.labels == tuple(sorted(labels))
        assert clip.group == f"g{i}"
        assert [LABELS[j] for j in np.flatnonzero(ordered[i].target)] == sorted(labels)
        assert np.array_equal(ordered[i].samples, ordered[i].samples)
        assert ordered[i].sources == members
    dataset = training(mixed, several=True, mix_clips=(2, 2), augment=AugmentConfig())
    first = [dataset[i] for i in range(10)]
    assert all(sample.target.sum() == 2 and sample.target.max() == 1 for sample in first)
    assert [sample.sources for sample in first] != [dataset[i].sources for i in range(10, 20)]


def test_recorded_noise_is_added(split: SplitClips) -> None:
    noisy = AugmentConfig(**{**PLAIN.__dict__, "noise": 1.0, "noise_snr_db": (0.0, 0.0)})
    dataset = training(split, augment=noisy, noise=[np.ones(50, np.float32)])
    sample = dataset[0]
    added = sample.samples - split.store[sample.sources[0]]
    assert np.allclose(added, added[0], atol=1e-6)
    assert added[0] == pytest.approx(float(np.sqrt(np.mean(split.store[sample.sources[0]] ** 2))), rel=1e-4)


def test_no_augmentation_has_no_masks(split: SplitClips) -> None:
    batch = collate([training(split, augment=None)[i] for i in range(3)])
    assert batch.time_masks is None
    assert batch.labels.dtype == torch.int64


def test_empty_clips_are_noise_with_no_label_or_with_equal_shares(split: SplitClips) -> None:
    empty = replace(PLAIN, empty=0.3)
    for several, target in ((False, 1 / 3), (True, 0.0)):
        data = training(split, augment=empty, several=several)
        items = [data[i] for i in range(200)]
        assert all(item.target.shape == (3,) for item in items)
        found = [item for item in items if item.weights == (0.0,)]
        assert 40 <= len(found) <= 80
        for item in found:
            assert item.target.tolist() == pytest.approx([target] * 3)
            assert -80.01 <= 20 * np.log10(np.sqrt(np.mean(item.samples**2))) <= -29.99
            assert len(item.samples) == split.store.scans[item.sources[0]].samples
        assert all(item.target.sum() == 1 for item in items if item.weights == (1.0,))
    recording = np.sin(np.arange(8000)).astype(np.float32)
    data = training(split, augment=replace(PLAIN, empty=1.0), noise=[recording])
    assert np.abs(np.fft.rfft(data[0].samples)).argmax() / len(data[0].samples) == pytest.approx(
        1 / (2 * np.pi), abs=1e-3
    )
