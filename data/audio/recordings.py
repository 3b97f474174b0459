"""What the LightningDataModules for recordings have in common: from divided recordings to loaders."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader

from seqssm.data.audio.layouts import Clip
from seqssm.data.audio.reading import AUDIO_SUFFIXES
from seqssm.data.audio.store import ClipStore, decode, with_statistics
from seqssm.data.features import FeatureConfig
from seqssm.data.loading import data_rank
from seqssm.errors import UserError


class RecordingSplit(Protocol):
    """The recordings of a split: where they are kept, and their numbers there."""

    store: ClipStore
    numbers: np.ndarray


class Report(Protocol):
    """Counts and leaks, to be printed before training."""

    def print(self) -> None: ...


Split = TypeVar("Split", bound=RecordingSplit)
Training = TypeVar("Training")
Said = TypeVar("Said", bound=Report)


class RecordingsDataModule(LightningDataModule, Generic[Split, Training, Said]):
    """Recordings divided into splits, and their features.

    Args:
        path: of the data set, for messages.
        settings: the arguments of the class derived from this one; here ``features``, ``noise_path`` and
            ``num_workers`` are used.
    """

    def __init__(self, path: str, settings: dict[str, Any]) -> None:
        super().__init__()
        self.path, self.settings = Path(path), settings
        self.train: Training | None = None
        self.report: Said | None = None
        self._splits: dict[str, Split] = {}
        self._features: FeatureConfig | None = None
        self._reported = False
        self._left_out: Counter[str] = Counter()

    @abstractmethod
    def _divided(self) -> dict[str, Split]:
        """The splits, decoded when they are first asked for; also kept in ``_splits``."""

    @abstractmethod
    def _training(self, split: Split) -> Training:
        """The data set of the train loader."""

    @abstractmethod
    def _make_report(self, splits: Mapping[str, Split]) -> Said: ...

    @abstractmethod
    def ordered_loader(self, split: str) -> DataLoader:
        """The items of a split, `train` too, as they are and in order."""

    @property
    def features(self) -> FeatureConfig:
        """The features with the statistics of the train split, which are computed when they are first asked for."""
        if self._features is None:
            config = self.settings["features"]
            if config.mean is None:
                train = self._divided().get("train")
                if train is None:
                    raise UserError(f"{self.path} {self._without_train()}: set features.mean and features.std")
                config = with_statistics(config, train.store, train.numbers.tolist())
            self._features = config
        return self._features

    def prepare_data(self) -> None:
        """Decode the recordings and compute the statistics (Lightning calls this in one process of a machine)."""
        self._divided()
        if "train" in self._splits:
            _ = self.features

    def setup(self, stage: str | None = None) -> None:
        """Divide and check the data; before training, print the counts and what leaks between the splits."""
        splits = self._divided()
        if self.train is None and "train" in splits:
            self.train = self._training(splits["train"])
        if self.report is None:
            self.report = self._make_report(splits)
        if stage == "fit":
            self._train()
            if not self._reported:
                self._reported = True
                rank_zero_only(self.report.print)()

    def val_dataloader(self) -> DataLoader | list:
        """The validation items in order; no loader without a validation split."""
        self.setup()
        return self.ordered_loader("val") if "val" in self._splits else []

    def test_dataloader(self) -> DataLoader:
        """The test items in order."""
        return self.ordered_loader("test")

    def predict_dataloader(self) -> DataLoader:
        """The test items."""
        return self.ordered_loader("test")

    def _train(self) -> Training:
        if self.train is None:
            raise UserError(f"{self.path} {self._without_train()}: change the split, or what is left out")
        return self.train

    def _without_train(self) -> str:
        """What is wrong where there is nothing to train on, in words."""
        reasons = [f"{count:,} {reason}" for reason, count in self._left_out.items() if count]
        return "has nothing to train on" + (f", {', '.join(reasons)} being left out" if reasons else "")

    def _split(self, name: str) -> Split:
        splits = self._divided()
        if name not in splits:
            raise UserError(f"{self.path} has no {name} split: change the split")
        return splits[name]

    def _noise(self) -> list[np.ndarray]:
        """The recordings of ``noise_path``: (n,) float32 each."""
        if self.settings["noise_path"] is None:
            return []
        path = Path(self.settings["noise_path"])
        files = sorted(f for f in path.rglob("*") if f.suffix.lower() in AUDIO_SUFFIXES) if path.is_dir() else [path]
        if not files:
            raise UserError(f"noise_path {path} has no recordings")
        return [decode(Clip(file, ()), self.settings["features"].sample_rate)[0] for file in files]

    def _rank(self) -> tuple[int, int]:
        return data_rank(self.trainer)

    def _loader_arguments(self) -> dict[str, Any]:
        workers = self.settings["num_workers"]
        return {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }
