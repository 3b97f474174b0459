"""Baselines that any audio tagger has to beat, fitted on the clips and features it was trained on."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from seqssm.data.audio.batches import AudioBatch
from seqssm.tasks.audio_layers import MaskedBatchNorm, padded_lengths, real_positions, shorter
from seqssm.tasks.baselines import Baseline, Majority, Progress
from seqssm.tasks.tagging_metrics import class_scores, one_hot

KEPT_BYTES = 2**29
"""Features of a split that are kept once they have been computed: an hour and a half of 64 bands."""


class Clips:
    """The clips of a split, as their DataModule's loaders give them.

    Args:
        datamodule: an ``AudioTaggingDataModule`` that is set up.
        split: its name.
        classes: number of classes c.
    """

    def __init__(self, datamodule: Any, split: str, classes: int) -> None:
        self.datamodule, self.split, self.classes = datamodule, split, classes
        self._kept: list[AudioBatch] | None = None
        self._labels: NDArray[Any] | None = None
        self._spectra: NDArray[np.float64] | None = None

    def __len__(self) -> int:
        return len(self.datamodule.clips(self.split))

    def batches(self) -> Iterator[AudioBatch]:
        """All clips once, in order, as they are; read once, where they are few."""
        if self._kept is not None:
            yield from self._kept
            return
        kept, size = [], 0
        for batch in self._ready(self.datamodule.ordered_loader(self.split)):
            size += batch.features.nbytes
            if size <= KEPT_BYTES:
                kept.append(batch)
            yield batch
        if size <= KEPT_BYTES:
            self._kept = kept

    def training_batches(self, epoch: int) -> Iterator[AudioBatch]:
        """An epoch of what the model was trained on, augmentation included."""
        loader = self.datamodule.train_dataloader()
        loader.sampler.set_epoch(epoch)
        yield from self._ready(loader)

    def _ready(self, loader: Iterable[Any]) -> Iterator[AudioBatch]:
        for batch in loader:
            yield self.datamodule.on_after_batch_transfer(batch, 0)

    @property
    def labels(self) -> NDArray[Any]:
        """(n,) class ids, or (n, c) zeros and ones."""
        if self._labels is None:
            self._read()
        assert self._labels is not None
        return self._labels

    @property
    def spectra(self) -> NDArray[np.float64]:
        """(n, 2 mel) mean and standard deviation over time of each band."""
        if self._spectra is None:
            self._read()
        assert self._spectra is not None
        return self._spectra

    def _read(self) -> None:
        labels, spectra = [], []
        for batch in self.batches():
            labels.append(batch.labels.numpy())
            for features, length in zip(batch.features, batch.lengths.tolist(), strict=True):
                frames = features[:length].double()
                spectra.append(torch.cat([frames.mean(0), frames.std(0, correction=0)]).numpy())
        self._labels = np.concatenate(labels)
        if self._labels.ndim == 2:
            self._labels = (self._labels > 0.5).astype(np.int64)
        self._spectra = np.stack(spectra)


class MeanSpectrumRegression(Baseline[Clips]):
    """Logistic regression on the mean and spread over time of each mel band, standardised; C is chosen."""

    name = "mean spectrum"
    PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # values of C

    def fit(self, train: Clips, validation: Clips, progress: Progress = lambda share: None) -> Self:
        from sklearn.exceptions import ConvergenceWarning

        self.mean, self.scale = train.spectra.mean(0), train.spectra.std(0)
        self.scale[self.scale == 0] = 1
        features, held_out = self._standard(train), self._standard(validation)
        best = np.inf
        with warnings.catch_warnings():
            # The last digits of the optimum do not matter: what counts is the loss on the validation clips.
            warnings.simplefilter("ignore", ConvergenceWarning)
            for step, penalty in enumerate(self.PENALTIES):
                models = self._solve(features, train.labels, penalty)
                loss = self.log_loss(self._probabilities(models, held_out), validation.labels)
                progress((step + 1) / len(self.PENALTIES))
                if loss < best:
                    best, self.models = loss, models
                    self.settings = {"C": penalty, "validation_log_loss": loss}
        return self

    def predict_proba(self, windows: Clips) -> NDArray[np.float64]:
        return self._probabilities(self.models, self._standard(windows))

    def _standard(self, clips: Clips) -> NDArray[np.float64]:
        return (clips.spectra - self.mean) / self.scale

    def _solve(self, features: NDArray[np.float64], labels: NDArray[Any], penalty: float) -> list[Any]:
        """One model of all classes, or one for each, which is a number where no clip or every clip has the class."""
        from sklearn.linear_model import LogisticRegression

        def solve(target: NDArray[Any]) -> Any:
            if len(np.unique(target)) < 2:
                return float(target[0])
            return LogisticRegression(C=penalty, max_iter=500).fit(features, target)

        return [solve(labels)] if labels.ndim == 1 else [solve(column) for column in labels.T]

    def _probabilities(self, models: list[Any], features: NDArray[np.float64]) -> NDArray[np.float64]:
        if len(models) > 1 or self.n_classes == 1:
            columns = [
                np.full(len(features), model) if isinstance(model, float) else model.predict_proba(features)[:, 1]
                for model in models
            ]
            return np.stack(columns, axis=1)
        probabilities = np.zeros((len(features), self.n_classes))
        probabilities[:, models[0].classes_] = models[0].predict_proba(features)
        return probabilities


class ConvolutionalTagger(nn.Module):
    """Four blocks of convolution, batch norm, ReLU and 2 x 2 max pooling, then mean plus maximum over time.

    Args:
        classes: outputs.
        channels: of the blocks.
        dropout: before the head.
    """

    def __init__(self, classes: int, channels: tuple[int, ...] = (32, 64, 128, 256), dropout: float = 0.2) -> None:
        super().__init__()
        inputs = (1, *channels[:-1])
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1, bias=False) for before, after in zip(inputs, channels, strict=True)
        )
        self.norms = nn.ModuleList(MaskedBatchNorm(after) for after in channels)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels[-1], classes)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """(b, c) logits of features (b, l, mel), the same for any padding beyond ``lengths`` (b,)."""
        x = features.unsqueeze(1)
        known = padded_lengths(features, lengths)
        real = real_positions(known, x.shape[2])
        x = x if real is None else x.masked_fill(~real[:, None, :, None], 0)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.relu(norm(convolution(x), real))
            x = x if real is None else x.masked_fill(~real[:, None, :, None], 0)
            x = F.max_pool2d(x, 2, ceil_mode=True)
            known, real = shorter(known, 2, x.shape[2])
        x = x.mean(3)  # (b, channels, t)
        # Nothing is negative, so the zeros of the padding change no sum and no maximum, here and in the blocks.
        x = x if real is None else x.masked_fill(~real[:, None], 0)
        mean = x.mean(2) if known is None else x.sum(2) / known[:, None]
        return self.head(self.dropout(mean + x.amax(2)))


class SmallAudioCNN(Baseline[Clips]):
    """``ConvolutionalTagger`` trained from scratch on the model's features, augmentation and number of epochs.

    AdamW and one learning rate cycle; the epoch with the best validation accuracy (with several labels: mAP) is kept,
    as the model's is.

    Args:
        n_classes, balance, seed: see ``Baseline``.
        epochs, learning_rate: of the training.
        device: where to train.
    """

    name = "small CNN"

    def __init__(
        self,
        n_classes: int,
        *,
        balance: bool = False,
        seed: int = 0,
        epochs: int = 30,
        learning_rate: float = 2e-3,
        device: str = "cpu",
    ) -> None:
        super().__init__(n_classes, balance=balance, seed=seed)
        self.epochs, self.learning_rate, self.device = epochs, learning_rate, torch.device(device)

    def fit(self, train: Clips, validation: Clips, progress: Progress = lambda share: None) -> Self:
        self.several = train.labels.ndim == 2
        cuda = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(cuda):
            torch.manual_seed(self.seed)
            self.network = ConvolutionalTagger(self.n_classes).to(self.device)
            self._train(train, validation, progress)
        self.settings["parameters"] = sum(p.numel() for p in self.network.parameters())
        return self

    def _train(self, train: Clips, validation: Clips, progress: Progress) -> None:
        steps_per_epoch = len(train.datamodule.train_dataloader())
        total = self.epochs * steps_per_epoch
        optimizer = torch.optim.AdamW(self.network.parameters(), self.learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.learning_rate, total_steps=total, pct_start=0.2)
        best, state, step = -1.0, self.network.state_dict(), 0
        for epoch in range(self.epochs):
            self.network.train()
            for batch in train.training_batches(epoch):
                logits = self._logits(batch)
                labels = batch.labels.to(self.device)
                optimizer.zero_grad()
                self._loss(logits, labels).backward()
                nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                step += 1
                progress(step / total)
            score = self._score(self.predict_proba(validation), validation.labels)
            if score > best:
                best, state = score, copy.deepcopy(self.network.state_dict())
                name = "validation_mAP" if self.several else "validation_accuracy"
                self.settings = {"epoch": epoch + 1, "epochs": self.epochs, name: best}
        self.network.load_state_dict(state)

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.several:
            return F.binary_cross_entropy_with_logits(logits, one_hot(labels, self.n_classes))
        return F.cross_entropy(logits, labels)

    def _score(self, probabilities: NDArray[np.float64], labels: NDArray[Any]) -> float:
        if self.several:
            scores = class_scores(torch.from_numpy(probabilities), torch.from_numpy(labels))
            return float(scores.average_precision.nanmean())
        return float((probabilities.argmax(1) == labels).mean())

    def _logits(self, batch: AudioBatch) -> Tensor:
        return self.network(batch.features.to(self.device), batch.lengths.to(self.device))

    @torch.no_grad()
    def predict_proba(self, windows: Clips) -> NDArray[np.float64]:
        self.network.eval()
        parts = [self._logits(batch).double() for batch in windows.batches()]
        probabilities = [part.sigmoid() if self.several else part.softmax(1) for part in parts]
        return torch.cat(probabilities).cpu().numpy()


def audio_baselines(n_classes: int, *, epochs: int, seed: int = 0, device: str = "cpu") -> list[Baseline[Any]]:
    """The baselines that stand beside every tagger's scores, from the cheapest to the dearest.

    Args:
        n_classes: of the task.
        epochs: of the CNN: as many as the model had.
        seed: of the CNN.
        device: where the CNN is trained.
    """
    return [
        Majority(n_classes),
        MeanSpectrumRegression(n_classes),
        SmallAudioCNN(n_classes, epochs=epochs, seed=seed, device=device),
    ]
