"""The LightningDataModule for transcribed speech."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import DataLoader

from seqssm.data.audio.recordings import RecordingsDataModule
from seqssm.data.audio.store import ClipStore, remarks
from seqssm.data.features import FeatureConfig
from seqssm.data.loading import EpochSampler, ResumableLoader, ShardSampler
from seqssm.data.speech.augment import SpeechAugmentConfig
from seqssm.data.speech.batches import Collate, SpokenBatch, with_speech_features
from seqssm.data.speech.manifests import (
    SpeechLayout,
    Utterance,
    UtteranceList,
    extra_utterances,
    list_utterances,
    missing_recordings,
    missing_recordings_error,
)
from seqssm.data.speech.report import SpeechReport
from seqssm.data.speech.sampling import OrderedBatches, SplitUtterances, TrainingBatches
from seqssm.data.speech.sayable import sayable
from seqssm.data.speech.splits import SpeechSplitPlan, split_utterances
from seqssm.data.speech.text import TextConfig
from seqssm.data.speech.tokenizers import (
    CharacterTokenizer,
    SentencePieceTokenizer,
    TokenizerConfig,
    make_tokenizer,
)
from seqssm.data.splitting import SPLITS
from seqssm.errors import UserError

PLAIN_SETTINGS = ("features", "text", "tokenizer", "augment")


class SpeechDataModule(RecordingsDataModule[SplitUtterances, TrainingBatches, SpeechReport]):
    """Transcribed speech from files to batches of `SpeechBatch`.

    Input (see `seqssm.data.speech.manifests` for every layout):
        path: a manifest with columns path and text, or the folder of a published data set.
        format: `auto` recognises it; or tsv, csv, jsonl, librispeech, common_voice, speech_commands.
        root: the folder below which every recording of a manifest must lie; default the manifest's own.
        path_column, text_column, speaker_column: what a manifest's columns are called; default the usual names.
        subsets: of LibriSpeech (`train-clean-100`, ...) and Common Voice (`validated`, ...), those to use.
        extra: more manifests or folders whose train utterances are added to train, such as synthetic speech.
        skip_bad: leave missing, unreadable and untranscribable recordings out, with a count, where they would be an
            error.

    Text:
        text: the declared form of transcripts. tokenizer: the tokens, made from train's texts in that form.
        empty_text: what to do about an utterance with nothing said in it: `error`, `drop` it, or `keep` it, the model
            learning to say nothing.

    Split:
        split_by: `column` (the data set's own), `speaker`, `text`, `file`; `auto` takes the column where there is one.
        split_fractions: default train 0.8, val 0.1, test 0.1. val_fraction: of train, held out by speaker (by text
            where there are few) where there is no validation split otherwise.
        drop_shared: leave train utterances out whose samples equal those of a validation or test utterance.

    Features and training:
        features: with mean and std None, the statistics of all train utterances are computed, once.
        features_on: `loader` computes them in the loader's processes, `device` on the model's device, in batches.
        max_utterance_s: longer train utterances are left out.
        frames_per_token: train utterances with fewer frames for each token (and for the blank between two equal ones)
            are left out, as no alignment of a model with such a subsampling could say them.
        batch_seconds: of a training batch, padding included. batch_size: the most utterances of it.
        eval_batch_seconds: of validation and test batches; default as in training.
        augment: null for none. noise_path: a folder or file of noise for `augment.noise`.

    Other:
        cache_gb: decoded utterances are kept in a memory map when they take at most so much. cache_dir: default
            `$XDG_CACHE_HOME/seqssm/audio`.

    Raises UserError for bad input, from `tokenizer`, `features`, `prepare_data` and `setup`.
    """

    def __init__(
        self,
        path: str,
        *,
        format: str = "auto",
        root: str | None = None,
        path_column: str | None = None,
        text_column: str | None = None,
        speaker_column: str | None = None,
        subsets: list[str] | None = None,
        extra: list[str] | None = None,
        skip_bad: bool = False,
        text: TextConfig = TextConfig(),  # noqa: B008 - frozen
        tokenizer: TokenizerConfig = TokenizerConfig(),  # noqa: B008 - frozen
        empty_text: Literal["error", "drop", "keep"] = "error",
        split_by: Literal["auto", "column", "speaker", "text", "file"] = "auto",
        split_fractions: dict[str, float] | None = None,
        val_fraction: float = 0.1,
        drop_shared: bool = True,
        features: FeatureConfig = FeatureConfig(n_mels=80),  # noqa: B008 - frozen
        features_on: Literal["loader", "device"] = "loader",
        max_utterance_s: float = 30.0,
        frames_per_token: int = 4,
        batch_seconds: float = 120.0,
        batch_size: int | None = None,
        eval_batch_seconds: float | None = None,
        augment: SpeechAugmentConfig | None = SpeechAugmentConfig(),  # noqa: B008 - frozen
        noise_path: str | None = None,
        num_workers: int = 0,
        seed: int = 0,
        cache_gb: float = 4.0,
        cache_dir: str | None = None,
    ) -> None:
        settings = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        super().__init__(path, settings)
        self.save_hyperparameters(logger=False)
        for key, kind in zip(PLAIN_SETTINGS, (FeatureConfig, TextConfig, TokenizerConfig, SpeechAugmentConfig),
                             strict=True):  # fmt: skip
            if isinstance(settings[key], dict):
                settings[key] = kind(**settings[key])
        plain = {key: asdict(settings[key]) for key in PLAIN_SETTINGS if settings[key] is not None}
        self.hparams.update(plain)  # a checkpoint holds plain data alone
        _check_arguments(settings)
        self.layout = SpeechLayout(
            path=Path(path),
            format=format,
            root=Path(root) if root else None,
            path_column=path_column,
            text_column=text_column,
            speaker_column=speaker_column,
            subsets=tuple(subsets) if subsets else None,
        )
        self.split_plan = SpeechSplitPlan(
            method=split_by,
            fractions=split_fractions or {"train": 0.8, "val": 0.1, "test": 0.1},
            val_fraction=val_fraction,
            seed=seed,
        )
        self.text: TextConfig = settings["text"]
        self._listing: UtteranceList | None = None
        self._tokenizer: CharacterTokenizer | SentencePieceTokenizer | None = None
        self._store: ClipStore | None = None
        self._split_said = ""

    # ---- what the data say of themselves -----------------------------------------------------------------------------

    @property
    def tokenizer(self) -> CharacterTokenizer | SentencePieceTokenizer:
        """The tokens, from the texts of train. Reads manifests, no recordings."""
        if self._tokenizer is None:
            texts = [one.text for one in self._listed().utterances if one.split == "train" and one.text]
            config = self.settings["tokenizer"]
            if not texts and config.stored is None and config.model is None and self.text.characters is None:
                raise UserError(
                    f"{self.path} has no train texts to make tokens of: set tokenizer.stored to a checkpoint's"
                )
            self._tokenizer = make_tokenizer(config, texts, self.text.characters)
        return self._tokenizer

    def describe(self) -> dict[str, Any]:
        """What a task keeps of the data, plain: the tokenizer, the form of the text and the features."""
        return {
            "tokenizer": self.tokenizer.to_dict(),
            "text": self.text.to_dict(),
            "features": self.features.to_dict(),
        }

    def utterances(self, split: str) -> list[Utterance]:
        """What the ordered loader of a split gives, in order, with normalised texts."""
        return self._split(split).utterances

    def samples(self, split: str, number: int) -> np.ndarray:
        """Samples (n,) float32 at the features' rate of the utterance at a position of its split; not to be written
        to."""
        return self._split(split).samples(number)

    # ---- from files to splits ----------------------------------------------------------------------------------------

    def _listed(self) -> UtteranceList:
        """Utterances with normalised texts and their splits."""
        if self._listing is None:
            listing = list_utterances(self.layout)
            split, self._split_said = split_utterances(listing.utterances, self.split_plan)
            placed = [replace(one, split=name) for one, name in zip(listing.utterances, split, strict=True)]
            for path in self.settings["extra"] or []:
                placed += extra_utterances(Path(path))
            self._left_out.update(listing.left_out)
            self._left_out["utterances marked drop"] += int((split == "drop").sum())
            listing.utterances = [
                replace(one, text=self.text.normalise(one.written)) for one in placed if one.split != "drop"
            ]
            self._listing = listing
        return self._listing

    def _divided(self) -> dict[str, SplitUtterances]:
        if self._splits:
            return self._splits
        settings = self.settings
        utterances, without = sayable(
            self._listed().utterances, self.tokenizer, self.text, settings["empty_text"], settings["skip_bad"]
        )
        self._left_out.update(without)
        missing = missing_recordings(utterances)
        if missing and not settings["skip_bad"]:
            raise missing_recordings_error(missing, self.path)
        if missing:
            gone = {one.path for one in missing}
            self._left_out["missing recordings"] += len(missing)
            utterances = [one for one in utterances if one.path not in gone]
        if not utterances:
            raise UserError(f"{self.path}: no utterance is left")
        clips = [one.clip for one in utterances]
        of = {id(clip): one for clip, one in zip(clips, utterances, strict=True)}
        store = ClipStore(
            clips,
            settings["features"].sample_rate,
            Path(settings["cache_dir"]) if settings["cache_dir"] else None,
            settings["cache_gb"],
            settings["skip_bad"],
        )
        self._left_out.update(store.left_out)
        self._store = store
        utterances = [of[id(clip)] for clip in store.clips]  # without unreadable ones
        tokens = [np.array(self.tokenizer.encode(one.text), np.int64) for one in utterances]
        split = np.array([one.split for one in utterances], object)
        self._leave_out(split, store, tokens)
        space = np.array(self.tokenizer.encode(" "), np.int64) if _has_space(self.tokenizer) else np.zeros(0, np.int64)
        for name in SPLITS:
            numbers = np.flatnonzero(split == name)
            if len(numbers):
                chosen, theirs = [utterances[i] for i in numbers], [tokens[i] for i in numbers]
                self._splits[name] = SplitUtterances(store, numbers, chosen, theirs, space)
        return self._splits

    def _leave_out(self, split: np.ndarray, store: ClipStore, tokens: list[np.ndarray]) -> None:
        """Mark train utterances as dropped that are too long, too short, or in validation or test as well."""
        settings = self.settings
        features, augment = settings["features"], settings["augment"]
        fastest = max(augment.speeds) if augment else 1.0
        frames = np.array([features.frames(int(scan.samples / fastest)) for scan in store.scans])
        held_out = {store.scans[i].digest for i in np.flatnonzero((split == "val") | (split == "test"))} - {""}
        for reason, chosen in (
            (f"train utterances longer than {settings['max_utterance_s']:g} s",
             store.seconds > settings["max_utterance_s"]),
            ("train utterances too short for their text",
             frames < settings["frames_per_token"] * np.array([_steps(one) for one in tokens])),
            ("train utterances that also stand in validation or test",
             np.array([settings["drop_shared"] and scan.digest in held_out for scan in store.scans])),
        ):  # fmt: skip
            left_out = chosen & (split == "train")
            self._left_out[reason] += int(left_out.sum())
            split[left_out] = "drop"

    def _training(self, split: SplitUtterances) -> TrainingBatches:
        settings = self.settings
        return TrainingBatches(
            split,
            self.features,
            batch_seconds=settings["batch_seconds"],
            batch_size=settings["batch_size"],
            seed=settings["seed"],
            augment=settings["augment"],
            noise=self._noise(),
        )

    def _make_report(self, splits: Mapping[str, SplitUtterances]) -> SpeechReport:
        train = splits.get("train")
        others = {name: split for name, split in splits.items() if name != "train"} if train else {}
        speakers = {name: {one.speaker for one in split.utterances} - {""} for name, split in splits.items()}
        texts = {one.text for one in train.utterances} if train else set()
        batches = self.train.plan(0) if self.train else []
        padded = sum(max(item.seconds for item in batch) * len(batch) for batch in batches)
        spoken = sum(item.seconds for batch in batches for item in batch)
        store = self._store
        assert store is not None
        return SpeechReport(
            utterances={name: len(split) for name, split in splits.items()},
            speakers={name: len(found) for name, found in speakers.items()},
            seconds={name: float(split.seconds.sum()) for name, split in splits.items()},
            words={name: sum(len(one.text.split()) for one in split.utterances) for name, split in splits.items()},
            tokens={name: sum(map(len, split.tokens)) for name, split in splits.items()},
            vocabulary=self.tokenizer.size,
            batches_per_epoch=len(batches),
            padding=1 - spoken / padded if padded else 0.0,
            shared_speakers={name: len(speakers[name] & speakers["train"]) for name in others},
            shared_texts={name: sum(one.text in texts for one in split.utterances) for name, split in others.items()},
            identical=_identical(splits) if train else None,
            left_out=dict(self._left_out),
            remarks=[*remarks(store), f"split: {self._split_said}"],
        )

    # ---- loaders -----------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> ResumableLoader:
        """Augmented train utterances, batches of like lengths, in an order that the seed and the epoch give."""
        self.setup()
        train = self._train()
        rank, ranks = self._rank()
        if len(train) < ranks:
            raise UserError(f"an epoch has {len(train)} batches for {ranks} devices: lower batch_seconds")
        sampler = EpochSampler(train, 1, ranks, rank)  # an item is a batch
        return ResumableLoader(train, sampler=sampler, **self._loader_arguments())

    def ordered_loader(self, split: str) -> DataLoader:
        """The utterances of a split as they are and in the order of `utterances`."""
        found, settings = self._split(split), self.settings
        dataset = OrderedBatches(
            found, settings["eval_batch_seconds"] or settings["batch_seconds"], settings["batch_size"]
        )
        rank, ranks = self._rank()
        return DataLoader(dataset, sampler=ShardSampler(dataset, ranks, rank), **self._loader_arguments())

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Compute the features on the device where the loader left them to it."""
        return with_speech_features(batch, self.features) if isinstance(batch, SpokenBatch) else batch

    def _loader_arguments(self) -> dict[str, Any]:
        collate = Collate(self.features if self.settings["features_on"] == "loader" else None)
        return {"batch_size": None, "collate_fn": collate, **super()._loader_arguments()}

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The tokenizer, the form of the text and the features, for the checkpoint."""
        return self.describe()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises UserError when the checkpoint was trained on other tokens, texts or features."""
        here = self.describe()
        for key in ("tokenizer", "text", "features"):
            if state_dict[key] != here[key]:
                raise UserError(
                    f"the checkpoint was trained with another {key} ({state_dict[key]!r:.300}) than the data have "
                    f"({here[key]!r:.300}): set it as there, or use the data it was trained on"
                )


def _steps(tokens: np.ndarray) -> int:
    """Steps that CTC needs to say tokens: one each, and a blank between equal neighbours; one for nothing."""
    return max(1, len(tokens) + int((tokens[1:] == tokens[:-1]).sum()))


def _has_space(tokenizer: CharacterTokenizer | SentencePieceTokenizer) -> bool:
    """Whether joined texts need a token between them; pieces of words begin with their space."""
    return isinstance(tokenizer, CharacterTokenizer) and not tokenizer.unknown(" ")


def _identical(splits: Mapping[str, SplitUtterances]) -> dict[str, int] | None:
    digests = {name: [split.store.scans[i].digest for i in split.numbers] for name, split in splits.items()}
    if not all(map(all, digests.values())):
        return None
    train = set(digests["train"])
    return {name: sum(one in train for one in found) for name, found in digests.items() if name != "train"}


def _check_arguments(settings: dict[str, Any]) -> None:
    for name in ("batch_seconds", "batch_size", "eval_batch_seconds", "max_utterance_s", "frames_per_token"):
        if settings[name] is not None and settings[name] <= 0:
            raise UserError(f"{name} is {settings[name]}: it must be positive")
    for name in ("num_workers", "seed", "cache_gb"):
        if settings[name] < 0:
            raise UserError(f"{name} is {settings[name]}: it must not be negative")
    if not 0 <= settings["val_fraction"] < 1:
        raise UserError(f"val_fraction is {settings['val_fraction']}: it must lie between 0 and 1")
    if settings["empty_text"] not in ("error", "drop", "keep"):
        raise UserError(f"empty_text is {settings['empty_text']!r}: choose error, drop or keep")
    slowest = min(settings["augment"].speeds) if settings["augment"] else 1.0
    if settings["max_utterance_s"] / slowest > settings["batch_seconds"]:
        raise UserError(
            f"batch_seconds {settings['batch_seconds']:g} is less than an utterance of max_utterance_s "
            f"{settings['max_utterance_s']:g} at the slowest speed {slowest:g}: raise it, or lower max_utterance_s"
        )
