"""Baselines of audio taggers, on clips with a louder band for each label."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from seqssm.data.audio.batches import AudioBatch
from seqssm.tasks.audio_baselines import Clips, ConvolutionalTagger, MeanSpectrumRegression, SmallAudioCNN
from seqssm.tasks.baselines import Majority, run_baselines

MELS = 16


class Loader(list):
    sampler = SimpleNamespace(set_epoch=lambda epoch: None)


class Tones:
    """What the baselines ask of a DataModule."""

    def __init__(self, several: bool) -> None:
        self.several = several
        self.items = {name: self._make(size, seed) for seed, (name, size) in enumerate((("train", 60), ("val", 24)))}

    def _make(self, size: int, seed: int) -> list[AudioBatch]:
        generator = torch.Generator().manual_seed(seed)
        present = torch.rand(size, 3, generator=generator) < 0.4
        if not self.several:
            present = torch.nn.functional.one_hot(torch.arange(size) % 3, 3).bool()
        features = torch.randn(size, 32, MELS, generator=generator) * 0.5
        for c in range(3):
            features[..., 5 * c : 5 * c + 4] += present[:, c, None, None]
        lengths = 20 + torch.arange(size) % 13
        features[torch.arange(32) >= lengths[:, None]] = 0
        labels = present.float() if self.several else present.long().argmax(1)
        rows = torch.arange(size).split(12)
        return [AudioBatch(features[i], lengths[i], labels[i]) for i in rows]

    def clips(self, split: str) -> list[int]:
        return list(range(sum(len(batch.labels) for batch in self.items[split])))

    def ordered_loader(self, split: str) -> Loader:
        return Loader(self.items[split])

    def train_dataloader(self) -> Loader:
        return self.ordered_loader("train")

    def on_after_batch_transfer(self, batch: AudioBatch, index: int) -> AudioBatch:
        return batch


@pytest.mark.parametrize("several", [True, False])
def test_spectrum_and_cnn_learn_and_majority_does_not(several: bool) -> None:
    data = Tones(several)
    train, val = Clips(data, "train", 3), Clips(data, "val", 3)
    assert len(train) == 60
    chosen = [Majority(3), MeanSpectrumRegression(3), SmallAudioCNN(3, epochs=8, learning_rate=5e-3)]
    fitted = run_baselines(chosen, train, val, val)
    assert list(fitted) == ["majority", "mean spectrum", "small CNN"]
    shares = train.labels.mean(0) if several else np.full(3, 1 / 3)
    np.testing.assert_allclose(fitted["majority"].probabilities[0], shares)
    for name in ("mean spectrum", "small CNN"):
        p = fitted[name].probabilities
        assert p.shape == (24, 3)
        right = ((p > 0.5) == val.labels).mean() if several else (p.argmax(1) == val.labels).mean()
        assert right > 0.9, name
    assert fitted["small CNN"].settings["epochs"] == 8


def test_spectra_leave_padding_out() -> None:
    clips = Clips(Tones(True), "val", 3)
    batch = next(clips.batches())
    first = batch.features[0, : int(batch.lengths[0])].double()
    np.testing.assert_allclose(clips.spectra[0, :MELS], first.mean(0).numpy())
    np.testing.assert_allclose(clips.spectra[0, MELS:], first.std(0, correction=0).numpy())


def test_a_class_that_no_training_clip_has() -> None:
    data = Tones(True)
    for batch in data.items["train"]:
        batch.labels[:, 2] = 0
    train, val = Clips(data, "train", 3), Clips(data, "val", 3)
    p = MeanSpectrumRegression(3).fit(train, val).predict_proba(val)
    assert (p[:, 2] == 0).all()
    assert np.isfinite(p).all()


@torch.no_grad()
def test_padding_does_not_change_the_cnn() -> None:
    torch.manual_seed(0)
    network = ConvolutionalTagger(3, channels=(4, 6, 8, 8)).eval()
    for norm in network.norms:
        torch.nn.init.uniform_(norm.bias, 0, 1)
    features = torch.randn(1, 37, MELS)
    alone = network(features, torch.tensor([37]))
    padded = torch.cat([features, torch.full((1, 22, MELS), 7.0)], dim=1)
    together = network(torch.cat([padded, torch.randn(1, 59, MELS)]), torch.tensor([37, 59]))
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)
