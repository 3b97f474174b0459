"""Augmentation of whole batches on a device: what the loader's processes make, by the same rules."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from seqssm.data.audio import AudioTaggingDataModule
from seqssm.data.audio.augment import AugmentConfig
from seqssm.data.audio.batches import AudioBatch, with_features
from seqssm.data.audio.device import DeviceClips
from seqssm.data.audio.layouts import Clip
from seqssm.data.audio.sampling import SplitClips, TrainingClips, collate
from seqssm.data.audio.store import ClipStore
from seqssm.data.features import FeatureConfig, fbank
from seqssm.errors import UserError

CONFIG = FeatureConfig(n_mels=20, mean=-7.0, std=3.0)
PLAIN = AugmentConfig(mixup=0, time_masks=0, mel_masks=0, gain_db=0, shift_s=0, noise=0)
LABELS = ["a", "b", "c"]
CPU = torch.device("cpu")


@pytest.fixture
def split(tmp_path: Path) -> SplitClips:
    """Clip i is a tone of 500 (i + 1) Hz, 3200 + 320 i samples long; six of class a, three of b, one of c."""
    clips = []
    for i, label in enumerate("aaaaaabbbc"):
        data = 0.1 * np.sin(2 * np.pi * 500 * (i + 1) * np.arange(3200 + 320 * i) / 16000)
        soundfile.write(tmp_path / f"{i}.wav", data, 16000, subtype="FLOAT")
        clips.append(Clip(tmp_path / f"{i}.wav", (label,), group=f"g{i}"))
    return SplitClips.of(ClipStore(clips, 16000), range(10), LABELS)


def device_clips(split: SplitClips, **changes: object) -> DeviceClips:
    arguments = {"several": False, "clips_per_epoch": len(split), "seed": 0, "augment": PLAIN, **changes}
    return DeviceClips(TrainingClips(split, CONFIG, **arguments), CPU)


def heard_hz(features: torch.Tensor) -> set[int]:
    """Bands that sound in frames (l, mel)."""
    return set(torch.nonzero(features.mean(0) > features.mean(0).max() - 1.0).flatten().tolist())


@pytest.mark.parametrize("augment", [None, PLAIN])
def test_what_is_not_augmented_is_what_the_loader_gives(split: SplitClips, augment: AugmentConfig | None) -> None:
    made = device_clips(split, augment=augment)
    items = [3, 11, 7, 28]
    theirs = with_features(collate([made.clips[i] for i in items]), CONFIG)
    ours = made.batch(items)
    torch.testing.assert_close(ours.features, theirs.features, rtol=0, atol=2e-4)
    for name in ("lengths", "labels", "sources", "weights"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def test_a_batch_depends_on_seed_and_number_alone(split: SplitClips) -> None:
    full = AugmentConfig(noise=0.5, empty=0.2, equalizer_db=6)
    one, other = device_clips(split, augment=full), device_clips(split, augment=full)
    other.batch([5, 6, 7])
    for left, right in zip(one.batch([0, 1, 2, 3]), other.batch([0, 1, 2, 3]), strict=True):
        assert torch.equal(left, right)
    assert not torch.equal(one.batch([4, 5]).features, one.batch([6, 7]).features)
    differently = device_clips(split, augment=full, seed=1).batch([0, 1, 2, 3])
    assert not torch.equal(differently.features, one.batch([0, 1, 2, 3]).features)


def test_mixup_mixes_sounds_labels_and_sources_alike(split: SplitClips) -> None:
    made = device_clips(split, augment=replace(PLAIN, mixup=1.0, mixup_alpha=1.0))
    tones = [heard_hz(fbank(torch.from_numpy(np.array(split.store[i])), CONFIG)) for i in range(10)]
    batch = made.batch(list(range(200)))
    torch.testing.assert_close(batch.weights.sum(1), torch.ones(200))
    targets = torch.from_numpy(split.targets).float()
    expected = (targets[batch.sources] * batch.weights[..., None]).sum(1)
    torch.testing.assert_close(batch.labels, expected)
    assert abs(batch.weights[:, 0].mean() - 0.5) < 0.1  # Beta(1, 1)
    for row in range(200):
        first, _ = batch.sources[row].tolist()
        if batch.weights[row, 0] > 0.8:
            assert heard_hz(batch.features[row, : batch.lengths[row]]) & tones[first]
        assert batch.lengths[row] == CONFIG.frames(split.store.scans[first].samples)


def test_mixtures_have_the_labels_of_all_their_clips(split: SplitClips) -> None:
    made = device_clips(split, several=True, mix_clips=(1, 3))
    batch = made.batch(list(range(100)))
    assert batch.labels.shape == (100, 3)
    sounding = batch.weights > 0
    assert set(sounding.sum(1).tolist()) == {1, 2, 3}
    for row in range(100):
        members = batch.sources[row][sounding[row]].tolist()
        assert batch.labels[row].tolist() == split.targets[members].any(0).astype(float).tolist()
        longest = max(split.store.scans[i].samples for i in members)
        assert batch.lengths[row] == CONFIG.frames(longest)


def test_shifts_roll_gains_move_levels_and_crops_are_parts(split: SplitClips) -> None:
    reading = device_clips(split, augment=replace(PLAIN, shift_s=0.05))
    rng = np.random.default_rng(0)
    sizes = reading.sizes[np.arange(10)]
    rolled = reading._read(np.arange(10), sizes, sizes, rng)
    for i in range(10):
        clip = np.array(split.store[i])
        found = [s for s in range(-800, 801) if np.array_equal(np.roll(clip, s), rolled[i, : len(clip)].numpy())]
        assert found
        assert not rolled[i, len(clip) :].any()
    cropped = device_clips(split, crop_s=0.1).batch(list(range(10)))
    assert cropped.lengths.tolist() == [CONFIG.frames(1600)] * 10
    louder = device_clips(split, augment=replace(PLAIN, gain_db=6.0)).batch(list(range(10)))
    plain = device_clips(split).batch(list(range(10)))
    gain = (louder.features.amax((1, 2)) - plain.features.amax((1, 2))) * 2 * 3.0 / np.log(10) * 10
    assert 2 < gain.abs().max() <= 6.01
    assert gain.std() > 1


def test_noise_has_its_ratio_and_empty_clips_hold_nothing_else(split: SplitClips) -> None:
    def samples_of(**changes) -> tuple[torch.Tensor, torch.Tensor]:
        made = device_clips(split, augment=replace(PLAIN, **changes))
        counts = made.sizes[np.arange(10)]
        clean = made._read(np.arange(10), counts, counts, np.random.default_rng(1))
        real = torch.arange(clean.shape[1]) < torch.from_numpy(counts)[:, None]
        rng = np.random.default_rng(2)
        empty = rng.random(10) < made.augment.empty
        return clean, made._augmented(clean, real, counts, empty, made.augment, rng)

    clean, noisy = samples_of(noise=1.0, noise_snr_db=(20.0, 20.0))
    ratio = 10 * torch.log10(clean.square().sum(1) / (noisy - clean).square().sum(1))
    torch.testing.assert_close(ratio, torch.full((10,), 20.0), rtol=0, atol=0.01)
    assert not noisy[0, 3200:].any()  # none in the padding
    clean, alone = samples_of(empty=1.0)
    correlation = (clean * alone).sum(1) / (clean.norm(dim=1) * alone.norm(dim=1))
    assert correlation.abs().max() < 0.1
    clean, buried = samples_of(buried=1.0)
    for before, after, size in zip(clean, buried, range(3200, 6400, 320), strict=True):
        rest = (after - before)[:size]
        level = 20 * torch.log10(before[:size].square().mean().sqrt())
        own = torch.nonzero(rest.abs() > 0.05).flatten()  # where the tone is missing
        assert len(own) < 0.62 * size  # the tone passes 0.05 in two samples of three
        assert level > -30
        assert not after[size:].any()
    assert (buried - clean).abs().max() > 0.05
    made = device_clips(split, augment=replace(PLAIN, empty=0.3))
    batch = made.batch(list(range(200)))
    empty = batch.weights[:, 0] == 0
    assert 40 <= empty.sum() <= 80
    torch.testing.assert_close(batch.labels[empty], torch.full((int(empty.sum()), 3), 1 / 3))
    assert (batch.labels[~empty].sum(1) == 1).all()


def test_noise_of_recordings(split: SplitClips) -> None:
    recordings = [np.sin(np.arange(n)).astype(np.float32) for n in (8000, 100)]
    made = device_clips(split, augment=replace(PLAIN, empty=1.0), noise=recordings)
    noise = made._noise(20, 1000, np.random.default_rng(0))
    spectra = torch.fft.rfft(noise).abs()
    assert ((spectra.argmax(1) / 1000 - 1 / (2 * np.pi)).abs() < 2e-3).all()


def test_a_training_run_takes_its_batches_from_the_device(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for label in ("x", "y"):
        (tmp_path / "sounds" / label).mkdir(parents=True)
        for i in range(20):
            soundfile.write(tmp_path / "sounds" / label / f"{i}.wav", 0.1 * rng.standard_normal(1600), 8000)
    settings = {
        "features": FeatureConfig(sample_rate=8000, n_mels=16),
        "batch_size": 8,
        "cache_dir": str(tmp_path / "c"),
    }
    data = AudioTaggingDataModule(str(tmp_path / "sounds"), augment_on="device", **settings)
    data.setup("fit")
    loader = data.train_dataloader()
    assert len(loader) == len(AudioTaggingDataModule(str(tmp_path / "sounds"), **settings).train_dataloader())
    batches = list(loader)
    assert len(batches) == len(loader)
    assert all(isinstance(batch, AudioBatch) for batch in batches)
    again = data.train_dataloader()
    again.load_state_dict({"epoch": 0, "batches": 1})
    assert torch.equal(next(iter(again)).features, batches[1].features)  # goes on within the epoch
    kept = data.val_dataloader()
    plain = AudioTaggingDataModule(str(tmp_path / "sounds"), **settings).val_dataloader()
    for _ in range(2):
        for left, right in zip(kept, plain, strict=True):
            assert torch.equal(left.features, right.features)
            assert torch.equal(left.labels, right.labels)
    fast = AudioTaggingDataModule(
        str(tmp_path / "sounds"), augment_on="device", augment=AugmentConfig(speed=0.1), **settings
    )
    fast.setup("fit")
    with pytest.raises(UserError, match=r"augment\.speed is made in the loader"):
        fast.train_dataloader()
