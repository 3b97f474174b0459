"""Learning from a teacher: trained taggers that hear what the model hears, or logits of the training clips in a file.

Taggers, by name, folder or ``.ckpt``, score every batch as it is augmented (Beyer et al., 2022); of several, the mean
of their probabilities counts. They must have the model's classes and features. One that reads both ways can teach a
causal model.

Files of logits:

``.npy``: (clips, classes), rows in the order of the training split, columns in the order of the labels.
``.csv``: a header ``path`` (as in the data's table, or a whole path), optionally ``start`` in seconds, and one column a
label; every training clip needs a row, further rows are not used.
"""

from __future__ import annotations

import csv
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from seqssm.data.audio.batches import AudioBatch
from seqssm.data.features import FeatureConfig
from seqssm.errors import UserError
from seqssm.tasks.network import load_network
from seqssm.tasks.tagging_network import TaggingNetwork

STATISTICS_TOLERANCE = 1e-4
"""Of the mean and the standard deviation of log energies, which are a few units."""


class Teacher(ABC):
    """Gives soft targets for batches of training clips."""

    @abstractmethod
    def probabilities(self, batch: AudioBatch, temperature: float, multi_label: bool) -> Tensor:
        """(b, c) probabilities of logits that are divided by the temperature."""

    def loss(self, logits: Tensor, batch: AudioBatch, temperature: float, multi_label: bool) -> Tensor:
        """Cross-entropy of logits (b, c) against the teacher's probabilities.

        Gradients are scaled by the squared temperature, as in Hinton et al. (2015).
        """
        targets = self.probabilities(batch, temperature, multi_label)
        if multi_label:
            loss = F.binary_cross_entropy_with_logits(logits / temperature, targets)
        else:
            loss = F.cross_entropy(logits / temperature, targets)
        return loss * temperature**2


def find_teacher(
    teacher: str | Sequence[str],
    *,
    clips: Callable[[], Sequence[Any]],
    labels: Sequence[str],
    features: FeatureConfig,
    multi_label: bool,
) -> Teacher:
    """The teacher that ``model.teacher`` names: a CSV or NPY file of logits, or one or several checkpoints.

    Args:
        teacher: the file or the checkpoints.
        clips: gives the training clips, each with ``path`` and ``start_s``; asked for logits in a file alone.
        labels: class names in the order of the outputs.
        features: of the model.
        multi_label: whether the model scores each class by itself.

    Raises:
        UserError: something is missing or does not fit.
    """
    names = [teacher] if isinstance(teacher, str) else list(teacher)
    if len(names) == 1 and Path(names[0]).suffix.lower() in (".csv", ".npy"):
        return StoredTeacher.read(Path(names[0]), clips(), labels)
    return TeacherNetworks.load(names, labels, features, multi_label)


def _same_features(one: FeatureConfig, other: FeatureConfig) -> bool:
    """Whether two models hear the same: statistics of the same clips differ in their last digits between machines."""
    plain = (replace(config, mean=None, std=None) for config in (one, other))
    pairs = ((one.mean, other.mean), (one.std, other.std))
    close = (a == b if a is None or b is None else math.isclose(a, b, abs_tol=STATISTICS_TOLERANCE) for a, b in pairs)
    return len(set(plain)) == 1 and all(close)


class TeacherNetworks(Teacher):
    """Taggers in evaluation mode, whose mean counts. They are no part of the model that they teach."""

    def __init__(self, networks: Sequence[TaggingNetwork]) -> None:
        self.networks = list(networks)

    @classmethod
    def load(
        cls, names: Sequence[str], labels: Sequence[str], features: FeatureConfig, multi_label: bool
    ) -> TeacherNetworks:
        """Load checkpoints that fit a model; see :func:`find_teacher`."""
        if not names:
            raise UserError("model.teacher is an empty list: name a checkpoint, or leave it out")
        networks = []
        for name in names:
            network = load_network(name, TaggingNetwork)
            ours = {"classes": list(labels), "features": features.to_dict(), "multi_label": multi_label}
            theirs = {
                "classes": network.labels,
                "features": network.features.to_dict(),
                "multi_label": network.multi_label,
            }
            alike = {"features": _same_features(network.features, features)}
            for key, value in ours.items():
                if not alike.get(key, theirs[key] == value):
                    raise UserError(
                        f"model.teacher {name} has the {key} {theirs[key]}, the model has {value}: a teacher must be "
                        "trained on the same data with the same features"
                    )
            networks.append(network)
        return cls(networks)

    @torch.no_grad()
    def probabilities(self, batch: AudioBatch, temperature: float, multi_label: bool) -> Tensor:
        total = torch.zeros((), device=batch.features.device)
        for network in self.networks:
            if network.device != batch.features.device:
                network.to(batch.features.device)
            total = total + network.probabilities(network(batch.features, batch.lengths) / temperature)
        return total / len(self.networks)


class StoredTeacher(Teacher):
    """A teacher's logits (clips, c) for the clips of the training split."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    @classmethod
    def read(cls, path: Path, clips: Sequence[Any], labels: Sequence[str]) -> StoredTeacher:
        """Read a file of logits.

        Args:
            path: a CSV or NPY file.
            clips: the training clips, each with ``path`` and ``start_s``.
            labels: class names in the order of the outputs.

        Raises:
            UserError: the file is missing or does not fit the clips and labels.
        """
        if not path.is_file():
            raise UserError(f"model.teacher {path} does not exist: correct the path")
        table = cls._read_npy(path) if path.suffix == ".npy" else cls._read_csv(path, clips, labels)
        if table.shape != (len(clips), len(labels)):
            raise UserError(
                f"{path} has the shape {table.shape}; {len(clips)} training clips and {len(labels)} classes need "
                f"({len(clips)}, {len(labels)})"
            )
        if not np.isfinite(table).all():
            raise UserError(f"{path}: a logit is not finite")
        return cls(torch.from_numpy(table.astype(np.float32)))

    @staticmethod
    def _read_npy(path: Path) -> np.ndarray:
        try:
            return np.load(path, allow_pickle=False)
        except ValueError as error:
            raise UserError(f"{path}: not an array of numbers ({error})") from error

    @staticmethod
    def _read_csv(path: Path, clips: Sequence[Any], labels: Sequence[str]) -> np.ndarray:
        rows: dict[tuple[str, float], list[float]] = {}
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in ("path", *labels) if name not in (reader.fieldnames or ())]
            if missing:
                raise UserError(f"{path} has no column {', '.join(missing[:5])}: it needs path and one column a label")
            for row in reader:
                try:
                    rows[row["path"], float(row.get("start") or 0)] = [float(row[name]) for name in labels]
                except ValueError as error:
                    raise UserError(f"{path}, line {reader.line_num}: {error}") from error
        found = []
        for clip in clips:
            parts = Path(clip.path).parts
            # The longest tail of the path that has a row: tables name files relative to their own folder.
            names = ["/".join(parts[i:]) if i else str(clip.path) for i in range(len(parts))]
            at = next((rows[name, clip.start_s] for name in names if (name, clip.start_s) in rows), None)
            if at is None:
                raise UserError(f"{path} has no row for the training clip {clip.path} from {clip.start_s:g} s")
            found.append(at)
        return np.array(found)

    def probabilities(self, batch: AudioBatch, temperature: float, multi_label: bool) -> Tensor:
        """Those of a mixture of clips are mixed as their sounds are."""
        if batch.sources is None:
            raise UserError(
                "model.teacher: this data does not say which clips a batch holds; use AudioTaggingDataModule"
            )
        if self.logits.device != batch.sources.device:
            self.logits = self.logits.to(batch.sources.device)
        scaled = self.logits[batch.sources.clamp(min=0)] / temperature  # (b, k, c)
        soft = scaled.sigmoid() if multi_label else scaled.softmax(-1)
        weights = torch.ones_like(batch.sources, dtype=soft.dtype) if batch.weights is None else batch.weights
        targets = (soft * (weights * (batch.sources >= 0)).unsqueeze(-1)).sum(1)
        return targets.clamp(0, 1) if multi_label else targets
