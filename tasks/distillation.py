"""Learning from a teacher whose logits for the training clips are stored in a file.

``.npy``: (clips, classes), rows in the order of the training split, columns in the order of the labels.
``.csv``: a header ``path`` (as in the data's table, or a whole path), optionally ``start`` in seconds, and one column a
label; every training clip needs a row, further rows are not used.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from seqssm.data.audio.batches import AudioBatch
from seqssm.errors import UserError


class Teacher:
    """A teacher's logits (clips, c) for the clips of the training split."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    @classmethod
    def read(cls, path: Path, clips: Sequence[Any], labels: Sequence[str]) -> Teacher:
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

    def loss(self, logits: Tensor, batch: AudioBatch, temperature: float, multi_label: bool) -> Tensor:
        """Cross-entropy against the teacher's probabilities, those of a mixture of clips mixed as their sounds are.

        Gradients are scaled by the squared temperature, as in Hinton et al. (2015).
        """
        if batch.sources is None:
            raise UserError(
                "model.teacher: this data does not say which clips a batch holds; use AudioTaggingDataModule"
            )
        if self.logits.device != logits.device:
            self.logits = self.logits.to(logits.device)
        scaled = self.logits[batch.sources.clamp(min=0)] / temperature  # (b, k, c)
        soft = scaled.sigmoid() if multi_label else scaled.softmax(-1)
        weights = torch.ones_like(batch.sources, dtype=soft.dtype) if batch.weights is None else batch.weights
        targets = (soft * (weights * (batch.sources >= 0)).unsqueeze(-1)).sum(1)
        if multi_label:
            loss = F.binary_cross_entropy_with_logits(logits / temperature, targets.clamp(0, 1))
        else:
            loss = F.cross_entropy(logits / temperature, targets)
        return loss * temperature**2
