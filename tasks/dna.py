"""DNA classification: one label a sequence, from tens of bases to whole chromosomes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
)

from seqssm.backbone import BackboneConfig
from seqssm.data import DNABatch
from seqssm.errors import UserError
from seqssm.longcontext.parallel import LengthSplit
from seqssm.tasks.base import OptimizerConfig, Task
from seqssm.tasks.composition import Composition
from seqssm.tasks.dna_layers import PoolingMode
from seqssm.tasks.dna_network import DNANetwork
from seqssm.tasks.dna_parts import pool_part, split_classifier


class DNAClassification(DNANetwork, Task):
    """Classify DNA sequences.

    Args:
        labels: class names in the order of the outputs; the command line takes them from the data.
        backbone: the model; ``reverse_complement: true`` in it makes the answer the same for both strands, exactly.
        kmer: embed each position not only as its base but also as the k-mer that ends there, read along the strand:
            composition is then one linear layer away. 1 for bases alone.
        motif: add to each position a convolution so many bases wide over the one-hot bases, a bank of motifs; 0 for
            none.
        motif_layers: so many convolutions of five positions after it, each added to its input: what stands near what, a
            motif of motifs.
        patch: average the embeddings of so many neighbouring bases into one position of the backbone: long windows at
            a fraction of the cost, where the order of single bases matters less than composition. 1 for none.
        positions: learn a vector for each of so many places in a window, which then may not be longer. For windows that
            are aligned, at a transcription start, say: what a motif means there depends on where it stands. 0 for none.
        pooling: how positions become one vector: their mean, their maximum, both side by side (``mean_max``), or the
            last real one (for causal models).
        pool_bins: pool so many equal parts of a window each by itself, for aligned windows, too; 1 pools the whole.
        standardize: scale what enters the backbone, and the pooled vector, by their statistics over the training
            windows (batch normalisation). The composition of long windows, and of patches, differs little from one to
            the next, and without it learning is slow.
        composition: add the logits of a logistic regression on the shares of k-mers of so many bases. It is fitted on
            the training windows before the first step, its penalty chosen on the validation windows, and stays as it
            is: the network learns what composition alone leaves over. 0 for none.
        composition_only: answer by that regression alone: the network is neither trained nor run, and one batch of one
            epoch is all that the training needs (``trainer.limit_train_batches: 1``).
        head_dropout: dropout of the pooled vector.
        label_smoothing: share of the target spread evenly over the classes.
        class_weights: one weight a class, ``balanced`` (inverse frequency in the training windows), or none.
        average_strands: outside training, average the probabilities of the sequence and its reverse complement.
        chunk_length: run longer windows in chunks of so many bases, with the gradients of one pass in the memory of one
            chunk, for a causal backbone without attention (:mod:`seqssm.longcontext.chunked`); 0 for one pass.
        chunk_offload: keep what crosses the borders between chunks in the memory of the host.
        chunk_kept: how many chunks of a window, its last ones, keep their activations instead of being run a second
            time in the backward pass: faster, where memory allows. The first of them costs none.
        members: train so many networks, each by itself on the same batches, and answer with the mean of their
            probabilities.
        optimizer: learning rate and its schedule.
        init_from: a checkpoint whose backbone and embedding to start from: a shipped name, a folder or a .ckpt.
    """

    class_weight: Tensor

    def __init__(
        self,
        labels: list[str],
        backbone: BackboneConfig = BackboneConfig(),  # noqa: B008 - frozen
        kmer: int = 1,
        motif: int = 0,
        motif_layers: int = 0,
        patch: int = 1,
        positions: int = 0,
        pooling: PoolingMode = "mean",
        pool_bins: int = 1,
        standardize: bool = False,
        composition: int = 0,
        composition_only: bool = False,
        head_dropout: float = 0.0,
        label_smoothing: float = 0.0,
        class_weights: list[float] | Literal["balanced"] | None = None,
        average_strands: bool = True,
        chunk_length: int = 0,
        chunk_offload: bool = False,
        chunk_kept: int = 1,
        members: int = 1,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 - frozen
        init_from: str | None = None,
    ) -> None:
        super().__init__(
            labels,
            backbone,
            kmer=kmer,
            motif=motif,
            motif_layers=motif_layers,
            patch=patch,
            positions=positions,
            pooling=pooling,
            pool_bins=pool_bins,
            standardize=standardize,
            composition=composition,
            composition_only=composition_only,
            head_dropout=head_dropout,
            average_strands=average_strands,
            chunk_length=chunk_length,
            chunk_offload=chunk_offload,
            chunk_kept=chunk_kept,
            members=members,
            optimizer=optimizer,
            init_from=init_from,
            label_smoothing=label_smoothing,
            class_weights=class_weights,
        )
        if not 0 <= label_smoothing < 1:
            raise UserError(f"model.label_smoothing is {label_smoothing}: it must lie between 0 and 1")
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights
        weights = class_weights if isinstance(class_weights, list) else [1.0] * len(labels)
        self.register_buffer("class_weight", torch.tensor(weights), persistent=False)

        classes = len(labels)
        scores = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(classes, average="micro"),
                "balanced_accuracy": MulticlassAccuracy(classes, average="macro"),
                "macro_f1": MulticlassF1Score(classes, average="macro"),
                "mcc": MulticlassMatthewsCorrCoef(classes),
                "auroc": MulticlassAUROC(classes, average="macro"),
            }
        )
        self.val_scores, self.test_scores = scores.clone(prefix="val_"), scores.clone(prefix="test_")
        self.val_confusion, self.test_confusion = (MulticlassConfusionMatrix(classes) for _ in range(2))
        self.load_initial_weights()

    def pool(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        if self._split is not None:
            return pool_part(self, tokens, lengths, self._split)
        return super().pool(tokens, lengths)

    def split_length(self, split: LengthSplit) -> None:
        split_classifier(self, split)
        self._split = split

    _split: LengthSplit | None = None

    def on_fit_start(self) -> None:
        if self.class_weights == "balanced":
            by_label = self.trainer.datamodule.report.counts["train"]  # type: ignore[attr-defined]
            counts = torch.tensor([float(by_label[label]) for label in self.labels])
            self.class_weight.copy_(counts.sum() / (len(counts) * counts))
            weights = ", ".join(f"{n} {w:.3g}" for n, w in zip(self.labels, self.class_weight.tolist(), strict=True))
            rank_zero_info(f"class weights: {weights}")

        if self.composition is not None and not self.composition.fitted:
            self._fit_composition(self.composition)

    def _fit_composition(self, composition: Composition) -> None:
        from seqssm.tasks.baselines import CompositionRegression, Windows

        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if datamodule is None or datamodule.val is None:
            raise UserError(
                "model.composition chooses its penalty on validation windows: give a validation split, or 0"
            )
        balance = bool(datamodule.settings["balance"] or self.class_weights == "balanced")
        regression = CompositionRegression("k-mers", [(composition.k,)], len(self.labels), balance=balance)
        regression.fit(Windows.read(datamodule.grid("train")), Windows.read(datamodule.grid("val")))
        _, mean, scale, fitted = regression.chosen
        composition.take(mean, scale, fitted)
        loss, strength = regression.settings["validation_log_loss"], regression.settings["C"]
        rank_zero_info(f"{composition.k}-mer regression: C {strength:g}, log loss on validation {loss:.4f}")

    def configure_optimizers(self) -> Any:
        if not self.composition_only:
            return super().configure_optimizers()
        for said in (
            "`LightningModule.configure_optimizers` returned",
            "`training_step` returned `None`",
            "`parameters` is",
        ):
            warnings.filterwarnings("ignore", message=said)  # on purpose: there is nothing to train
        return None

    def training_step(self, batch: DNABatch, batch_idx: int) -> Tensor | None:
        if self.composition_only:  # fitted in on_fit_start
            return None
        logits = self.member_logits(batch.tokens, batch.lengths)  # (b, m, c)
        labels = batch.labels[:, None].expand(logits.shape[:2]).flatten()
        loss = F.cross_entropy(
            logits.flatten(0, 1), labels, weight=self.class_weight, label_smoothing=self.label_smoothing
        )
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch.labels))
        return loss

    def validation_step(self, batch: DNABatch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: DNABatch, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: DNABatch, batch_idx: int) -> Tensor:
        return self.predict_proba(batch.tokens, batch.lengths)

    def _evaluate(self, batch: DNABatch, split: str) -> None:
        probabilities = self.predict_proba(batch.tokens, batch.lengths)
        loss = F.nll_loss(probabilities.clamp_min(1e-12).log(), batch.labels)
        size = len(batch.labels)
        self.log(f"{split}_loss", loss, prog_bar=True, sync_dist=True, batch_size=size, on_step=False, on_epoch=True)
        scores, confusion = self._metrics(split)
        scores.update(probabilities, batch.labels)
        confusion.update(probabilities, batch.labels)
        self.log_dict(scores, prog_bar=True, batch_size=size, on_step=False, on_epoch=True)

    def _metrics(self, split: str) -> tuple[MetricCollection, MulticlassConfusionMatrix]:
        if split == "val":
            return self.val_scores, self.val_confusion
        return self.test_scores, self.test_confusion

    def on_validation_epoch_end(self) -> None:
        self._draw_confusion("val")

    def on_test_epoch_end(self) -> None:
        self._draw_confusion("test")

    def _draw_confusion(self, split: str) -> None:
        from seqssm.tasks.plots import confusion_matrix_png

        confusion = self._metrics(split)[1]
        counts = confusion.compute()
        confusion.reset()
        folder = self.trainer.log_dir if self.trainer.loggers else None
        if folder and self.trainer.is_global_zero and not self.trainer.sanity_checking:
            confusion_matrix_png(counts.cpu().numpy(), self.labels, Path(folder) / f"confusion_{split}.png")
