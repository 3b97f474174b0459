"""Audio tagging: what is heard in a clip of any length, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from seqssm.backbone import BackboneConfig
from seqssm.data.audio.batches import AudioBatch
from seqssm.data.features import FeatureConfig
from seqssm.errors import UserError
from seqssm.tasks.audio_layers import Downsampling, PoolingKind
from seqssm.tasks.base import CHECKPOINT_KEY, OptimizerConfig, Task
from seqssm.tasks.distillation import Teacher, find_teacher
from seqssm.tasks.tagging_metrics import TaggingScores, best_thresholds, class_scores, one_hot, write_class_table
from seqssm.tasks.tagging_network import TaggingNetwork


class AudioTagging(TaggingNetwork, Task):
    """Tag audio clips: any number of labels each (binary cross-entropy), or exactly one (cross-entropy).

    A stem of convolutions makes a token of every ``frame_group`` frames, the backbone reads the tokens, and a linear
    head scores each of them; pooling over time gives the clip's scores. With a causal backbone everything is causal,
    and :class:`~seqssm.tasks.tagging_stream.StreamingTagger` runs it live.

    Args:
        labels: class names in the order of the outputs; the command line takes them from the data.
        multi_label: whether a clip may have several labels, or none; from the data, too.
        features: how samples become features, with the training data's statistics; from the data, too.
        backbone: the model; ``bidirectional: none`` without attention or with causal attention can run live.
        frame_group: frames a token, a product of strides: 2, 4 (40 ms) or 8.
        stem_channels: of the stem's layers, each of which halves the bands.
        stem_downsampling: by strides of the stem's convolutions, or by maxima behind dense ones, which costs more.
        stem_depth: convolutions a layer.
        pooling: how frame scores become clip scores: their mean, halfway from there to the greatest (``mean_max``), a
            learnt weighting, or the last one.
        dropout: before the head.
        label_smoothing: share of the target spread evenly over the classes (over yes and no for several labels).
        teacher: what to learn from as well: one or several trained taggers (names, folders or ``.ckpt``), or a CSV or
            NPY of logits for the training clips; see :mod:`seqssm.tasks.distillation`.
        teacher_weight: its share of the loss.
        teacher_temperature: both logits are divided by it in its part of the loss.
        thresholds: a class is present from this probability on; tuned on the validation clips after every epoch (best
            F1) and kept with the weights.
        optimizer: learning rate and its schedule.
        init_from: a checkpoint whose weights to start from.
    """

    def __init__(
        self,
        labels: list[str],
        multi_label: bool = False,
        features: FeatureConfig = FeatureConfig(),  # noqa: B008 - frozen
        backbone: BackboneConfig = BackboneConfig(),  # noqa: B008 - frozen
        frame_group: int = 4,
        stem_channels: list[int] = [32, 64, 64],  # noqa: B006 - never written to
        stem_downsampling: Downsampling = "stride",
        stem_depth: int = 1,
        pooling: PoolingKind = "mean",
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
        teacher: str | list[str] | None = None,
        teacher_weight: float = 0.5,
        teacher_temperature: float = 1.0,
        thresholds: list[float] | None = None,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 - frozen
        init_from: str | None = None,
    ) -> None:
        super().__init__(
            labels,
            multi_label,
            features,
            backbone,
            frame_group=frame_group,
            stem_channels=stem_channels,
            stem_downsampling=stem_downsampling,
            stem_depth=stem_depth,
            pooling=pooling,
            dropout=dropout,
            thresholds=thresholds,
            optimizer=optimizer,
            init_from=init_from,
            label_smoothing=label_smoothing,
            teacher=teacher,
            teacher_weight=teacher_weight,
            teacher_temperature=teacher_temperature,
        )
        if not 0 <= teacher_weight <= 1 or teacher_temperature <= 0:
            raise UserError("model.teacher_weight must lie between 0 and 1, model.teacher_temperature above 0")
        self.label_smoothing = label_smoothing
        self.teacher, self.teacher_weight, self.teacher_temperature = teacher, teacher_weight, teacher_temperature
        classes = len(labels)
        self.val_scores, self.test_scores = (TaggingScores(classes, multi_label) for _ in range(2))
        self._teacher: Teacher | None = None
        self.load_initial_weights()

    def init_args(self) -> dict[str, Any]:
        """As :meth:`Task.init_args`. The teacher is left out, too: what it taught is in the weights."""
        return {key: value for key, value in super().init_args().items() if key != "teacher"}

    # ---- training ----------------------------------------------------------------------------------------------

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.thresholds = list(checkpoint[CHECKPOINT_KEY]["init_args"]["thresholds"])

    def on_fit_start(self) -> None:
        if self.teacher is not None:
            datamodule: Any = getattr(self.trainer, "datamodule", None)
            self._teacher = find_teacher(
                self.teacher,
                clips=lambda: datamodule.clips("train"),
                labels=self.labels,
                features=self.features,
                multi_label=self.multi_label,
            )

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of (b, c) logits; labels are (b,) class ids or (b, c) targets between 0 and 1."""
        if self.multi_label:
            targets = one_hot(labels, len(self.labels))
            targets = targets * (1 - self.label_smoothing) + self.label_smoothing / 2
            return F.binary_cross_entropy_with_logits(logits, targets)
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def training_step(self, batch: AudioBatch, batch_idx: int) -> Tensor:
        logits = self(batch.features, batch.lengths)
        loss = self.loss(logits, batch.labels)
        if self._teacher is not None:
            soft = self._teacher.loss(logits, batch, self.teacher_temperature, self.multi_label)
            loss = (1 - self.teacher_weight) * loss + self.teacher_weight * soft
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch.lengths))
        return loss

    def validation_step(self, batch: AudioBatch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: AudioBatch, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: AudioBatch, batch_idx: int) -> Tensor:
        # In float64: rounding a softmax to float32 makes ties.
        return self.probabilities(self(batch.features, batch.lengths).double())

    def _evaluate(self, batch: AudioBatch, split: str) -> None:
        logits, size = self(batch.features, batch.lengths), len(batch.lengths)
        loss = self.loss(logits, batch.labels)
        self.log(f"{split}_loss", loss, prog_bar=True, sync_dist=True, batch_size=size, on_step=False, on_epoch=True)
        self._scores(split).update(self.probabilities(logits), batch.labels)

    def _scores(self, split: str) -> TaggingScores:
        return self.val_scores if split == "val" else self.test_scores

    def on_validation_epoch_end(self) -> None:
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        self._finish("test")

    def _finish(self, split: str) -> None:
        """Log the scores of the whole split, tune the thresholds on validation, and write the table of classes."""
        metric = self._scores(split)
        values = metric.compute()
        self.log_dict({f"{split}_{name}": value for name, value in values.items()}, prog_bar=True)
        with metric.sync_context(should_sync=metric._to_sync):
            probabilities, targets = metric.table()
        metric.reset()
        if self.trainer.sanity_checking:
            return
        if split == "val":
            self.thresholds = best_thresholds(probabilities, targets)
        folder = self.trainer.log_dir if self.trainer.loggers else None
        if not folder or not self.trainer.is_global_zero:
            return
        scores = class_scores(probabilities, targets)
        write_class_table(Path(folder) / f"per_class_{split}.csv", self.labels, scores, self.thresholds)
        if not self.multi_label and self.trainer.state.fn != TrainerFn.FITTING:  # a picture takes as long as an epoch
            from torchmetrics.functional.classification import multiclass_confusion_matrix

            from seqssm.tasks.plots import confusion_matrix_png

            counts = multiclass_confusion_matrix(probabilities, targets.argmax(1), len(self.labels))
            confusion_matrix_png(counts.cpu().numpy(), self.labels, Path(folder) / f"confusion_{split}.png")
