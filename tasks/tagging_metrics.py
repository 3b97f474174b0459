"""Scores of an audio tagger over a whole split: never a mean of batch values."""

from __future__ import annotations

import csv
import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multiclass_accuracy, multilabel_auroc, multilabel_average_precision

from seqssm.files import atomic_write


@dataclass(frozen=True)
class ClassScores:
    """Per class: clips with it, average precision and ROC area (NaN where undefined)."""

    support: Tensor
    average_precision: Tensor
    auroc: Tensor


class TaggingScores(Metric):
    """Mean average precision, mean ROC area, d' and, with one label a clip, accuracy.

    Means are over the classes that have clips both with and without them; mAP over those with any. d' is
    sqrt(2) times the standard normal quantile of the mean ROC area.

    Args:
        classes: number of classes c.
        multi_label: whether a clip may have any number of labels.
    """

    full_state_update = False
    probabilities: list[Tensor]
    targets: list[Tensor]

    def __init__(self, classes: int, multi_label: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.classes, self.multi_label = classes, multi_label
        self.add_state("probabilities", [], dist_reduce_fx="cat")
        self.add_state("targets", [], dist_reduce_fx="cat")

    def update(self, probabilities: Tensor, labels: Tensor) -> None:
        """Take (b, c) probabilities and the labels, (b,) class ids or (b, c) zeros and ones."""
        self.probabilities.append(probabilities.detach().float())
        self.targets.append(one_hot(labels, self.classes).to(torch.int64))

    def table(self) -> tuple[Tensor, Tensor]:
        """(n, c) probabilities and zeros and ones of everything seen (as synchronised, inside :meth:`compute`).

        On the CPU: scores take many small steps, for each of which a GPU would have to be waited for.
        """
        return _joined(self.probabilities).cpu(), _joined(self.targets).cpu()

    def compute(self) -> dict[str, Tensor]:
        """The scores by name."""
        probabilities, targets = self.table()
        per_class = class_scores(probabilities, targets)
        area = per_class.auroc.nanmean()
        scores = {
            "mAP": per_class.average_precision.nanmean(),
            "mAUC": area,
            "d_prime": math.sqrt(2) * torch.special.ndtri(area.clamp(1e-6, 1 - 1e-6)),
        }
        if not self.multi_label:
            truth = targets.argmax(1)
            scores["accuracy"] = multiclass_accuracy(probabilities, truth, self.classes, average="micro")
        return scores


def _joined(parts: list[Tensor] | Tensor) -> Tensor:
    return torch.cat(list(parts)) if isinstance(parts, list) else parts


def one_hot(labels: Tensor, classes: int) -> Tensor:
    """(b,) class ids, or (b, c) targets as they are, to (b, c) float32 targets."""
    if labels.dim() == 2:
        return labels.float()
    return torch.nn.functional.one_hot(labels, classes).float()


def class_scores(probabilities: Tensor, targets: Tensor) -> ClassScores:
    """Average precision and ROC area of each class.

    Args:
        probabilities: (n, c).
        targets: (n, c) integers, 0 or 1.
    """
    support = targets.sum(0)
    classes = targets.shape[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes without clips, which are NaN here
        precision = _rows(multilabel_average_precision(probabilities, targets, classes, average="none"))
        area = _rows(multilabel_auroc(probabilities, targets, classes, average="none"))
    undefined = support == 0
    return ClassScores(
        support,
        precision.masked_fill(undefined, torch.nan),
        area.masked_fill(undefined | (support == len(targets)), torch.nan),
    )


def _rows(values: Tensor) -> Tensor:
    return values.float().reshape(-1)


def best_thresholds(probabilities: Tensor, targets: Tensor) -> list[float]:
    """For each class, the threshold with the best F1 on these clips, 0.5 for a class without any.

    It lies halfway between the last score that it takes in and the first that it leaves out.

    Args:
        probabilities: (n, c).
        targets: (n, c) integers, 0 or 1.
    """
    ordered, order = probabilities.double().sort(dim=0, descending=True, stable=True)
    hits = targets.gather(0, order).cumsum(0).double()  # true positives with the best k + 1 taken in
    taken = torch.arange(1, len(ordered) + 1, device=ordered.device, dtype=torch.float64)[:, None]
    f1 = 2 * hits / (taken + targets.sum(0))
    following = torch.cat([ordered[1:], torch.zeros_like(ordered[:1])])
    f1 = f1.masked_fill(ordered == following, -1)  # a threshold cannot part equal scores
    best = f1.argmax(0, keepdim=True)
    middle = ((ordered.gather(0, best) + following.gather(0, best)) / 2).squeeze(0)
    return torch.where(targets.sum(0) > 0, middle, 0.5).tolist()


def write_class_table(path: Path, labels: Sequence[str], scores: ClassScores, thresholds: Sequence[float]) -> None:
    """A CSV row a class: support, average precision, ROC area, threshold."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["label", "clips", "average_precision", "auroc", "threshold"])
    columns = (scores.support.tolist(), scores.average_precision.tolist(), scores.auroc.tolist(), thresholds)
    for name, clips, precision, area, threshold in zip(labels, *columns, strict=True):
        rows.writerow([name, int(clips), f"{precision:.4f}", f"{area:.4f}", f"{threshold:.4f}"])
    with atomic_write(path) as file:
        file.write(text.getvalue())
