"""The LightningDataModule for tagged recordings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader

from seqssm.data.audio.augment import AugmentConfig
from seqssm.data.audio.batches import SampleBatch, with_features
from seqssm.data.audio.device import DeviceClips, DeviceLoader, KeptBatches
from seqssm.data.audio.layouts import AudioLayout, Clip, ClipList
from seqssm.data.audio.recordings import RecordingsDataModule
from seqssm.data.audio.report import AudioReport
from seqssm.data.audio.sampling import Collate, OrderedClips, SplitClips, TrainingClips
from seqssm.data.audio.sources import list_clips, missing_files_error
from seqssm.data.audio.splits import AudioSplitPlan, check_classes, split_clips
from seqssm.data.audio.store import ClipStore, remarks
from seqssm.data.features import FeatureConfig
from seqssm.data.loading import EpochSampler, ResumableLoader, ShardSampler
from seqssm.data.splitting import SPLITS
from seqssm.errors import UserError


class AudioTaggingDataModule(RecordingsDataModule[SplitClips, TrainingClips, AudioReport]):
    """Tagged recordings from files to batches of `AudioBatch`.

    Input (see `seqssm.data.audio.sources` for every layout):
        path: a folder of class folders, a table of clips, or the folder of a published data set.
        format: `auto` recognises it; or folder, csv, esc50, audioset, fsd50k, urbansound8k, speech_commands.
        root: the folder below which every recording of a table must lie; default the table's own.
        vocabulary: a file of all class names (AudioSet: class_labels_indices.csv), to which labels are held.
        path_column, label_column, group_column: what a table's columns are called; default `path`, `labels` or `label`,
            and the first there is of source, group, src_file, speaker, recording, session.
        label_separator: between the labels of a clip; default the first in use of ; | , in a column `labels`.
        group_pattern: a regular expression searched in file names, whose first group is the clip's source.
        classes: the classes to use, clips of others being left out; None for all.
        label_map: class names to rename or merge, `{puppy: dog, noise: null}`; null drops the label.
        multi_label: whether clips have any number of labels; default whether some have none or several.
        skip_bad: leave missing and unreadable recordings out, with a count, where they would be an error.

    Split:
        split_by: `column` (the data set's own), `fold`, `group` (source), `file`; `auto` takes the first that the data
            or these settings name.
        split_fractions: default train 0.7, val 0.15, test 0.15. test_folds, val_folds: default the last, and the last
            but one. val_fraction: of train, held out by source where there is no validation split otherwise.
        drop_shared: leave train clips out whose samples equal those of a validation or test clip.
        min_class_clips: fewer clips of a class in any split is an error.

    Features and training:
        features: with mean and std None, the statistics of all train clips are computed, once.
        features_on: `loader` computes them in the loader's processes, `device` on the model's device, in batches.
        augment_on: `loader` augments training clips in the loader's processes; `device` keeps all of them, decoded,
            on the model's device (230 MB an hour at 16 kHz) and augments them there, a batch at once.
        crop_s: train on a random stretch of longer clips. Validation and test clips are whole.
        clips_per_epoch: default the number of train clips.
        balance: draw every class equally often in training.
        mix_clips: `[least, greatest]`: every item is a mixture of so many clips of its split, with the labels of all;
            train mixtures are new each time, those of validation and test always the same.
        augment: null for none. noise_path: a folder or file of noise for `augment.noise`.

    Other:
        cache_gb: decoded clips are kept in a memory map when they take at most so much. cache_dir: default
            `$XDG_CACHE_HOME/seqssm/audio`.

    Raises UserError for bad input, from `labels`, `features`, `prepare_data` and `setup`.
    """

    def __init__(
        self,
        path: str,
        *,
        format: str = "auto",
        root: str | None = None,
        vocabulary: str | None = None,
        path_column: str = "path",
        label_column: str | None = None,
        label_separator: str | None = None,
        group_column: str | None = None,
        group_pattern: str | None = None,
        classes: list[str] | None = None,
        label_map: dict[str, str | None] | None = None,
        multi_label: bool | None = None,
        skip_bad: bool = False,
        split_by: Literal["auto", "column", "fold", "group", "file"] = "auto",
        split_fractions: dict[str, float] | None = None,
        test_folds: list[str | int] | None = None,
        val_folds: list[str | int] | None = None,
        val_fraction: float = 0.15,
        drop_shared: bool = True,
        min_class_clips: int = 1,
        features: FeatureConfig = FeatureConfig(),  # noqa: B008 - frozen
        features_on: Literal["loader", "device"] = "loader",
        augment_on: Literal["loader", "device"] = "loader",
        crop_s: float | None = None,
        clips_per_epoch: int | None = None,
        balance: bool = False,
        mix_clips: tuple[int, int] | None = None,
        augment: AugmentConfig | None = AugmentConfig(),  # noqa: B008 - frozen
        noise_path: str | None = None,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        cache_gb: float = 4.0,
        cache_dir: str | None = None,
    ) -> None:
        settings = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        super().__init__(path, settings)
        self.save_hyperparameters(logger=False)
        if isinstance(features, dict):
            settings["features"] = FeatureConfig(**features)
        if isinstance(augment, dict):
            settings["augment"] = AugmentConfig(**augment)
        plain = {key: asdict(settings[key]) for key in ("features", "augment") if settings[key] is not None}
        self.hparams.update(plain)  # a checkpoint holds plain data alone
        _check_arguments(settings)
        self.layout = AudioLayout(
            path=Path(path),
            format=format,
            root=Path(root) if root else None,
            vocabulary=Path(vocabulary) if vocabulary else None,
            path_column=path_column,
            label_column=label_column,
            label_separator=label_separator,
            group_column=group_column,
            group_pattern=group_pattern,
        )
        self.split_plan = AudioSplitPlan(
            method=split_by,
            fractions=split_fractions or {"train": 0.7, "val": 0.15, "test": 0.15},
            test_folds=None if test_folds is None else [str(fold) for fold in test_folds],
            val_folds=None if val_folds is None else [str(fold) for fold in val_folds],
            val_fraction=val_fraction,
            seed=seed,
        )
        self._listing: ClipList | None = None
        self._labels: list[str] | None = None
        self._store: ClipStore | None = None
        self._on_device: DeviceClips | None = None
        self._split_said = ""

    # ---- what the data say of themselves -----------------------------------------------------------------------------

    @property
    def labels(self) -> list[str]:
        """Class names in the order of their ids, sorted. Reads tables and folders, no recordings."""
        if self._labels is None:
            chosen = self.settings["classes"]
            named = {label for clip in self._list().clips for label in clip.labels}
            found = set(map(str, chosen)) if chosen else named
            if chosen and found - named:
                raise UserError(f"{self.path} has no clips of the classes {', '.join(sorted(found - named))}")
            if len(found) < 2:
                raise UserError(f"{self.path}: tagging needs two classes or more, found {sorted(found)}")
            self._labels = sorted(found)
        return self._labels

    @property
    def multi_label(self) -> bool:
        """Whether an item has any number of labels. Reads tables and folders, no recordings."""
        return self.settings["mix_clips"] is not None or self._several()

    @property
    def statistics(self) -> tuple[float, float]:
        """Mean and standard deviation of the train split's log-mel energies."""
        config = self.features
        assert config.mean is not None
        assert config.std is not None
        return config.mean, config.std

    def describe(self) -> dict[str, Any]:
        """What a task keeps of the data, plain: labels, multi_label and features with their statistics."""
        return {"labels": self.labels, "multi_label": self.multi_label, "features": self.features.to_dict()}

    def clips(self, split: str) -> list[Clip]:
        """What the ordered loader of a split gives, in order; a mixture is its first clip with the labels of all."""
        return self._split(split).items()

    def samples(self, split: str, number: int) -> np.ndarray:
        """Samples (n,) float32 at the features' rate of the clip at a position of its split; not to be written to."""
        found = self._split(split)
        return found.store[int(found.numbers[number])]

    # ---- from files to splits ----------------------------------------------------------------------------------------

    def _list(self) -> ClipList:
        if self._listing is None:
            self._listing = list_clips(self.layout)
            self._map_labels(self._listing)
        return self._listing

    def _map_labels(self, listing: ClipList) -> None:
        mapping, chosen = self.settings["label_map"] or {}, self.settings["classes"]
        known = {label for clip in listing.clips for label in clip.labels}
        if mapping.keys() - known:
            raise UserError(f"label_map names {min(mapping.keys() - known)!r}, which no clip of {self.path} has")
        several = listing.several or any(len(clip.labels) != 1 for clip in listing.clips)
        kept = []
        for clip in listing.clips:
            labels = {mapping.get(label, label) for label in clip.labels} - {None}
            labels = {label for label in labels if not chosen or label in set(map(str, chosen))}
            if labels or several:
                kept.append(replace(clip, labels=tuple(sorted(filter(None, labels)))))
        self._left_out["clips of other classes"] = len(listing.clips) - len(kept)
        listing.clips = kept

    def _several(self) -> bool:
        listing, asked = self._list(), self.settings["multi_label"]
        odd = [clip for clip in listing.clips if len(clip.labels) != 1]
        if asked is False and odd:
            raise UserError(
                f"{odd[0].name} has {len(odd[0].labels)} labels ({len(odd)} such clips), but multi_label is false: "
                "leave multi_label out, or choose classes"
            )
        return bool(odd) if asked is None else bool(asked)

    def _divided(self) -> dict[str, SplitClips]:
        if self._splits:
            return self._splits
        settings, several = self.settings, self._several()
        self._labels = self.labels
        store = self._decoded()
        split, self._split_said = split_clips(store.clips, self.split_plan, several)
        self._left_out["clips marked drop"] = int((split == "drop").sum())
        if settings["drop_shared"]:
            held_out = {store.scans[i].digest for i in np.flatnonzero((split == "val") | (split == "test"))} - {""}
            shared = [i for i in np.flatnonzero(split == "train") if store.scans[i].digest in held_out]
            split[shared] = "drop"
            self._left_out["train clips that also stand in validation or test"] = len(shared)
        self._left_out["clips marked drop"] = int((split == "drop").sum()) - len(
            shared if settings["drop_shared"] else ()
        )
        check_classes(store.clips, split, self.labels, settings["min_class_clips"])
        for name in SPLITS:
            numbers = np.flatnonzero(split == name).tolist()
            if numbers:
                made = SplitClips.of(store, numbers, self.labels)
                if settings["mix_clips"] is not None:
                    made = made.with_mixtures(settings["mix_clips"], settings["seed"])
                self._splits[name] = made
        return self._splits

    def _decoded(self) -> ClipStore:
        if self._store is None:
            settings, listing = self.settings, self._list()
            missing = listing.missing()
            if missing and not settings["skip_bad"]:
                raise missing_files_error(missing, self.path)
            self._store = ClipStore(
                listing.clips,
                settings["features"].sample_rate,
                Path(settings["cache_dir"]) if settings["cache_dir"] else None,
                settings["cache_gb"],
                settings["skip_bad"],
            )
            self._left_out.update(self._store.left_out)
        return self._store

    def _training(self, split: SplitClips) -> TrainingClips:
        settings = self.settings
        return TrainingClips(
            split,
            self.features,
            several=self.multi_label,
            clips_per_epoch=settings["clips_per_epoch"] or len(split),
            seed=settings["seed"],
            crop_s=settings["crop_s"],
            balance=settings["balance"],
            mix_clips=settings["mix_clips"],
            augment=settings["augment"],
            noise=self._noise(),
        )

    def _make_report(self, splits: Mapping[str, SplitClips]) -> AudioReport:
        store = self._decoded()
        groups = {name: {clip.group or str(clip.path) for clip in split.clips} for name, split in splits.items()}
        digests = {name: {store.scans[i].digest for i in split.numbers} for name, split in splits.items()}
        held_out = [name for name in splits if name != "train"] if "train" in splits else []
        train_digests = digests.get("train", set()) - {""}
        decoded = all(scan.digest for scan in store.scans)
        counts = {
            name: Counter(label for clip in split.items() for label in clip.labels) for name, split in splits.items()
        }
        return AudioReport(
            labels=self.labels,
            counts={name: {label: count[label] for label in self.labels} for name, count in counts.items()},
            clips={name: len(split) for name, split in splits.items()},
            sources={name: len(found) for name, found in groups.items()},
            seconds={name: float(store.seconds[split.numbers].sum()) for name, split in splits.items()},
            clips_per_epoch=len(self.train) if self.train is not None else 0,
            shared_sources={name: len(groups[name] & groups["train"]) for name in held_out},
            identical={
                name: sum(store.scans[i].digest in train_digests for i in splits[name].numbers) for name in held_out
            }
            if decoded
            else None,
            left_out=dict(self._left_out),
            remarks=[f"split by {self._split_said}", *self._mixing_said(), *remarks(store)],
        )

    def _mixing_said(self) -> list[str]:
        counts = self.settings["mix_clips"]
        return [f"every item is a mixture of {counts[0]} to {counts[1]} clips of its split"] if counts else []

    # ---- loaders -----------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader | DeviceLoader:
        """Resumable to the batch; item order depends on seed and epoch alone."""
        self.setup("fit")
        train = self._train()
        rank, ranks = self._rank()
        sampler = EpochSampler(train, self.settings["batch_size"], ranks, rank)
        if self.trainer is not None:
            sampler.set_epoch(self.trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
        if self.settings["augment_on"] == "device":
            clips = self._on_device or DeviceClips(train, self._device())
            self._on_device = clips
            return DeviceLoader(clips, self.settings["batch_size"], sampler)
        return ResumableLoader(
            train, batch_size=self.settings["batch_size"], sampler=sampler, **self._loader_arguments()
        )

    def val_dataloader(self) -> Any:
        """The validation items in order; no loader without a validation split."""
        loader = super().val_dataloader()
        if self.settings["augment_on"] == "loader" or not isinstance(loader, DataLoader):
            return loader
        return KeptBatches(loader, self._device(), self.features)

    def _device(self) -> torch.device:
        """The model's; without a trainer the best there is."""
        if self.trainer is not None:
            return self.trainer.strategy.root_device
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def ordered_loader(self, split: str) -> DataLoader:
        """The items of a split, `train` too, as they are and in the order of `clips`."""
        dataset = OrderedClips(self._split(split), self.multi_label, self.settings["seed"])
        rank, ranks = self._rank()
        return DataLoader(
            dataset,
            batch_size=self.settings["eval_batch_size"] or self.settings["batch_size"],
            sampler=ShardSampler(dataset, ranks, rank),
            **self._loader_arguments(),
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Compute the features on the device where the loader left them to it."""
        return with_features(batch, self.features) if isinstance(batch, SampleBatch) else batch

    def _loader_arguments(self) -> dict[str, Any]:
        collate = Collate(self.features if self.settings["features_on"] == "loader" else None)
        return {"collate_fn": collate, **super()._loader_arguments()}

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The label map, the features and the clips of each class and split, for the checkpoint."""
        return {**self.describe(), "counts": self.report.counts if self.report else {}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the statistics of the features; raises UserError when the checkpoint was trained on other classes
        or features."""
        if state_dict["labels"] != self.labels:
            raise UserError(
                f"the checkpoint was trained on the classes {state_dict['labels']}, the data have {self.labels}: "
                "set classes, or use the data it was trained on"
            )
        theirs = FeatureConfig(**state_dict["features"])
        plain, ours = (replace(one, mean=None, std=None) for one in (theirs, self.settings["features"]))
        if plain != ours:
            raise UserError(f"the checkpoint was trained with features {theirs}, not {ours}: set features as there")
        self._features = theirs


def _check_arguments(settings: dict[str, Any]) -> None:
    for name in ("batch_size", "eval_batch_size", "clips_per_epoch"):
        if settings[name] is not None and settings[name] < 1:
            raise UserError(f"{name} is {settings[name]}: it must be at least 1")
    for name in ("num_workers", "seed", "cache_gb"):
        if settings[name] < 0:
            raise UserError(f"{name} is {settings[name]}: it must not be negative")
    if not 0 <= settings["val_fraction"] < 1:
        raise UserError(f"val_fraction is {settings['val_fraction']}: it must lie between 0 and 1")
    if settings["crop_s"] is not None and settings["crop_s"] <= 0:
        raise UserError(f"crop_s is {settings['crop_s']}: it must be positive")
    if settings["mix_clips"] is not None and not 1 <= settings["mix_clips"][0] <= settings["mix_clips"][1]:
        raise UserError(f"mix_clips is {settings['mix_clips']}: give the least and the greatest number of clips")
