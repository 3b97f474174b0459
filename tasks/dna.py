"""DNA classification: one label a sequence, from tens of bases to whole chromosomes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
)

from seqssm.backbone import Backbone, BackboneConfig
from seqssm.data import DNABatch
from seqssm.data.dna.alphabet import reverse_complement
from seqssm.errors import UserError
from seqssm.longcontext.chunked import check_chunkable, fold_backbone
from seqssm.longcontext.parallel import LengthSplit
from seqssm.tasks.base import OptimizerConfig, Task
from seqssm.tasks.dna_layers import Pooling, PoolingMode, SequenceEmbedding
from seqssm.tasks.dna_parts import pool_part, split_classifier


class DNAClassification(Task):
    """Classify DNA sequences.

    Args:
        labels: class names in the order of the outputs; the command line takes them from the data.
        backbone: the model; ``reverse_complement: true`` in it makes the answer the same for both strands, exactly.
        kmer: embed each position not only as its base but also as the k-mer that ends there, read along the strand:
            composition is then one linear layer away. 1 for bases alone.
        motif: add to each position a convolution so many bases wide over the one-hot bases, a bank of motifs; 0 for
            none.
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
        head_dropout: dropout of the pooled vector.
        label_smoothing: share of the target spread evenly over the classes.
        class_weights: one weight a class, ``balanced`` (inverse frequency in the training windows), or none.
        average_strands: outside training, average the probabilities of the sequence and its reverse complement.
        chunk_length: run longer windows in chunks of so many bases, with the gradients of one pass in the memory of one
            chunk, for a causal backbone without attention (:mod:`seqssm.longcontext.chunked`); 0 for one pass.
        chunk_offload: keep what crosses the borders between chunks in the memory of the host.
        optimizer: learning rate and its schedule.
        init_from: a checkpoint whose backbone and embedding to start from.
    """

    class_weight: Tensor

    def __init__(
        self,
        labels: list[str],
        backbone: BackboneConfig = BackboneConfig(),  # noqa: B008 - frozen
        kmer: int = 1,
        motif: int = 0,
        patch: int = 1,
        positions: int = 0,
        pooling: PoolingMode = "mean",
        pool_bins: int = 1,
        standardize: bool = False,
        head_dropout: float = 0.0,
        label_smoothing: float = 0.0,
        class_weights: list[float] | Literal["balanced"] | None = None,
        average_strands: bool = True,
        chunk_length: int = 0,
        chunk_offload: bool = False,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 - frozen
        init_from: str | None = None,
    ) -> None:
        super().__init__(
            backbone,
            optimizer,
            init_from,
            labels=list(labels),
            kmer=kmer,
            motif=motif,
            patch=patch,
            positions=positions,
            pooling=pooling,
            pool_bins=pool_bins,
            standardize=standardize,
            head_dropout=head_dropout,
            label_smoothing=label_smoothing,
            class_weights=class_weights,
            average_strands=average_strands,
            chunk_length=chunk_length,
            chunk_offload=chunk_offload,
        )
        self.labels = list(labels)
        self.patch = patch
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights
        self.average_strands = average_strands
        self.chunk_length, self.chunk_offload = chunk_length, chunk_offload

        config = self.backbone_config
        if patch > 1 and config.reverse_complement:
            raise UserError(
                "model.patch must be 1 with backbone.reverse_complement: patches of the strands do not align"
            )
        if patch > 1 and (motif or positions):
            raise UserError("model.motif and model.positions must be 0 with model.patch: its positions are means")
        if pooling == "last" and pool_bins > 1:
            raise UserError("model.pool_bins must be 1 with model.pooling last: there is one last position")
        self.backbone = Backbone(config)
        if chunk_length:
            self._check_chunks(positions, standardize)
        self.embedding = SequenceEmbedding(
            config.d_model, kmer, motif, patch, positions, self.backbone.causal, standardize
        )
        self.pooling = Pooling(pooling, pool_bins, strands=config.reverse_complement)
        width = self.pooling.width * config.d_model
        self.standardize = nn.BatchNorm1d(width) if standardize else nn.Identity()
        self.head = nn.Sequential(nn.Dropout(head_dropout), nn.Linear(width, len(labels)))
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

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Score sequences.

        Args:
            tokens: (b, l) uint8 token ids, padded on the right.
            lengths: (b,) real tokens of each sequence, at least 1.

        Returns:
            (b, c) float32 logits. Padding and neighbours in the batch do not change them.
        """
        if self._split is not None:
            pooled = pool_part(self, tokens, lengths, self._split)
        elif 0 < self.chunk_length < tokens.shape[1]:
            pooled = self._pool_chunks(tokens, lengths)
        else:
            pooled = self._pool(tokens, lengths)
        return self.score(pooled)

    def _pool(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        x = self.embedding(tokens, lengths)  # (b, l, d), l counting patches from here on
        if self.backbone_config.reverse_complement:
            other = self.embedding(tokens, lengths, other_strand=True)
            x = torch.cat([x, other], dim=-1)  # (b, l, 2d)
        lengths = -(-lengths // self.patch)
        real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]  # (b, l)
        # Padding precedes the real tokens of a backward scan: its own segment keeps it out of their state.
        seq_idx = None if self.backbone.causal or bool(real.all()) else (~real).to(torch.int32)
        y, _ = self.backbone(x, seq_idx=seq_idx)
        return self.pooling(y, lengths)

    def _pool_chunks(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        patches = -(-lengths // self.patch)
        wide = torch.promote_types(self.backbone.norm.weight.dtype, torch.float32)

        def embed(start: int, stop: int) -> Tensor:
            return self.embedding.chunk(tokens, lengths, start * self.patch, stop * self.patch)

        gathered, _ = fold_backbone(
            self.backbone,
            embed,
            lambda gathered, y, start: self.pooling.update(gathered, y, patches, start),
            self.pooling.start(patches, self.backbone_config.d_model, wide),
            length=-(-tokens.shape[1] // self.patch),
            chunk_length=self.chunk_length // self.patch,
            modules=[self.embedding],
            offload=self.chunk_offload,
        )
        return self.pooling.finish(gathered, patches, wide)

    def _check_chunks(self, positions: int, standardize: bool) -> None:
        if self.chunk_length < 0 or self.chunk_length % self.patch:
            raise UserError(
                f"model.chunk_length is {self.chunk_length}: give a multiple of model.patch ({self.patch}), or 0"
            )
        if positions or standardize:
            raise UserError(
                "model.chunk_length cannot go with model.positions, which are for short windows, nor with "
                "model.standardize, which needs statistics of the whole window before its first chunk: leave one out"
            )
        check_chunkable(self.backbone, self.chunk_length // self.patch, "model.chunk_length")

    def score(self, pooled: Tensor) -> Tensor:
        """(b, width · d) pooled vectors to (b, c) logits, never in 16 bit."""
        with torch.autocast(device_type=pooled.device.type, enabled=False):
            return self.head(self.standardize(pooled))

    def check_unaligned(self) -> None:
        """Raise UserError where the model can only say something of whole, aligned windows."""
        if self.pooling.bins > 1 or self.embedding.places is not None:
            raise UserError(
                "this model was made for aligned windows (model.pool_bins or model.positions) and says nothing of a "
                "place in a long sequence; train one with model.pool_bins: 1 and model.positions: 0"
            )

    def split_length(self, split: LengthSplit) -> None:
        split_classifier(self, split)
        self._split = split

    _split: LengthSplit | None = None

    def predict_proba(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(b, c) float32 probabilities, averaged over both strands if the task says so."""
        probabilities = self(tokens, lengths).softmax(-1)
        if self.average_strands and not self.backbone_config.reverse_complement:
            other = self(reverse_complement(tokens, lengths), lengths).softmax(-1)
            probabilities = (probabilities + other) / 2
        return probabilities

    def on_fit_start(self) -> None:
        if self.chunk_length and isinstance(self.trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            raise UserError(
                "model.chunk_length recomputes chunks in the backward pass, when a sharded strategy has given the "
                "weights back: use trainer.strategy ddp, or chunk_length 0"
            )
        if self.class_weights == "balanced":
            by_label = self.trainer.datamodule.report.counts["train"]  # type: ignore[attr-defined]
            counts = torch.tensor([float(by_label[label]) for label in self.labels])
            self.class_weight.copy_(counts.sum() / (len(counts) * counts))
            weights = ", ".join(f"{n} {w:.3g}" for n, w in zip(self.labels, self.class_weight.tolist(), strict=True))
            rank_zero_info(f"class weights: {weights}")

    def training_step(self, batch: DNABatch, batch_idx: int) -> Tensor:
        logits = self(batch.tokens, batch.lengths)
        loss = F.cross_entropy(logits, batch.labels, weight=self.class_weight, label_smoothing=self.label_smoothing)
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
