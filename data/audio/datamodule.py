"""The LightningDataModule for tagged recordings."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from seqssm.data.audio.batches import AudioBatch, batch_features
from seqssm.data.audio.reading import read_audio
from seqssm.data.audio.sources import Clip, list_clips
from seqssm.data.features import FeatureConfig, fbank
from seqssm.data.resampling import resample


class AudioTaggingDataModule(LightningDataModule):
    """Thin version."""

    def __init__(
        self,
        path: str,
        *,
        features: FeatureConfig = FeatureConfig(),  # noqa: B008 - frozen
        multi_label: bool = False,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        settings = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        super().__init__()
        self.save_hyperparameters(logger=False)
        self.settings: dict[str, Any] = settings
        table = Path(path)
        self._all = list_clips(table / "clips.csv" if table.is_dir() else table)
        self.labels = sorted({label for clip in self._all for label in clip.labels})
        self.multi_label = multi_label
        self._clips: dict[str, list[Clip]] = {}
        groups: dict[str, set[str]] = {}
        for clip in self._all:
            groups.setdefault(clip.group, set()).update(clip.labels)
        rng = np.random.default_rng(seed)
        single = sorted(group for group, labels in groups.items() if len(labels) == 1)
        draw = dict(zip(single, rng.random(len(single)), strict=True))
        for clip in self._all:
            u = draw.get(clip.group, 0.0)
            self._clips.setdefault("train" if u < 0.7 else "val" if u < 0.85 else "test", []).append(clip)
        self._samples: dict[Path, torch.Tensor] = {}
        self._features: FeatureConfig | None = None

    @property
    def features(self) -> FeatureConfig:
        """With the statistics of the train split."""
        if self._features is None:
            config = self.settings["features"]
            if config.mean is None:
                values = torch.cat([fbank(self._read(clip), config) for clip in self.clips("train")[:100]])
                config = replace(config, mean=float(values.mean()), std=float(values.std()))
            self._features = config
        return self._features

    @property
    def statistics(self) -> tuple[float, float]:
        """Mean and standard deviation of the train split's log-mel energies."""
        assert self.features.mean is not None
        assert self.features.std is not None
        return self.features.mean, self.features.std

    def describe(self) -> dict[str, Any]:
        """What a task keeps of the data, plain."""
        return {"labels": self.labels, "multi_label": self.multi_label, "features": self.features.to_dict()}

    def clips(self, split: str) -> list[Clip]:
        """The clips of a split, in the order of its loader."""
        return self._clips[split]

    def _read(self, clip: Clip) -> torch.Tensor:
        if clip.path not in self._samples:
            samples, rate = read_audio(clip.path, clip.start_s, clip.end_s)
            self._samples[clip.path] = torch.from_numpy(
                resample(samples.mean(0), rate, self.settings["features"].sample_rate)
            )
        return self._samples[clip.path]

    def _collate(self, clips: list[Clip]) -> AudioBatch:
        features, lengths = batch_features([self._read(clip) for clip in clips], self.features)
        if self.multi_label:
            labels = torch.zeros(len(clips), len(self.labels))
            for row, clip in zip(labels, clips, strict=True):
                row[[self.labels.index(label) for label in clip.labels]] = 1.0
        else:
            labels = torch.tensor([self.labels.index(clip.labels[0]) for clip in clips])
        return AudioBatch(features, lengths, labels)

    def loader(self, split: str) -> DataLoader:
        """The clips of a split in order, not augmented."""
        return DataLoader(self.clips(split), batch_size=self.settings["batch_size"], collate_fn=self._collate)  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader:
        """Shuffled."""
        return DataLoader(
            self.clips("train"),  # type: ignore[arg-type]
            batch_size=self.settings["batch_size"],
            shuffle=True,
            collate_fn=self._collate,
        )

    def val_dataloader(self) -> DataLoader:
        """In order."""
        return self.loader("val")

    def test_dataloader(self) -> DataLoader:
        """In order."""
        return self.loader("test")

    def predict_dataloader(self) -> DataLoader:
        """The test clips."""
        return self.loader("test")
