"""DNA classification: one label a sequence, from tens of bases to whole chromosomes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
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
from seqssm.data.dna.alphabet import VOCABULARY_SIZE, N, complement, reverse_complement
from seqssm.errors import UserError
from seqssm.tasks.base import OptimizerConfig, Task


class DNAClassification(Task):
    """Classify DNA sequences.

    Args:
        labels: class names in the order of the outputs; the command line takes them from the data.
        backbone: the model; ``reverse_complement: true`` in it makes the answer the same for both strands, exactly.
        kmer: embed each position not only as its base but also as the k-mer that ends there, read along the strand:
            composition is then one linear layer away. 1 for bases alone.
        patch: average the embeddings of so many neighbouring bases into one position of the backbone: long windows at
            a fraction of the cost, where the order of single bases matters less than composition. 1 for none.
        pooling: how positions become one vector: their mean, or the last real one (for causal models).
        standardize: scale the pooled vector by its statistics over the training windows (batch normalisation). The mean
            over a long window differs little from one window to the next, and without it learning is slow.
        label_smoothing: share of the target spread evenly over the classes.
        class_weights: one weight a class, ``balanced`` (inverse frequency in the training windows), or none.
        average_strands: outside training, average the probabilities of the sequence and its reverse complement.
        optimizer: learning rate and its schedule.
        init_from: a checkpoint whose backbone and embedding to start from.
    """

    class_weight: Tensor

    def __init__(
        self,
        labels: list[str],
        backbone: BackboneConfig = BackboneConfig(),  # noqa: B008 - frozen
        kmer: int = 1,
        patch: int = 1,
        pooling: Literal["mean", "last"] = "mean",
        standardize: bool = False,
        label_smoothing: float = 0.0,
        class_weights: list[float] | Literal["balanced"] | None = None,
        average_strands: bool = True,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008 - frozen
        init_from: str | None = None,
    ) -> None:
        super().__init__(
            backbone,
            optimizer,
            init_from,
            labels=list(labels),
            kmer=kmer,
            patch=patch,
            pooling=pooling,
            standardize=standardize,
            label_smoothing=label_smoothing,
            class_weights=class_weights,
            average_strands=average_strands,
        )
        self.labels = list(labels)
        self.kmer = kmer
        self.patch = patch
        self.pooling = pooling
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights
        self.average_strands = average_strands

        config = self.backbone_config
        if patch > 1 and config.reverse_complement:
            raise UserError(
                "model.patch must be 1 with backbone.reverse_complement: patches of the strands do not align"
            )
        self.embedding = nn.Embedding(VOCABULARY_SIZE, config.d_model)
        nn.init.normal_(self.embedding.weight, std=0.02)
        if kmer > 1:
            self.kmer_embedding = nn.Embedding(4**kmer + 1, config.d_model, padding_idx=4**kmer)
            nn.init.zeros_(self.kmer_embedding.weight)
        self.backbone = Backbone(config)
        self.standardize = nn.BatchNorm1d(config.d_model) if standardize else nn.Identity()
        self.head = nn.Linear(config.d_model, len(labels))
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
        x = self._embed(tokens, lengths, reverse=False)  # (b, l, d), l counting patches from here on
        if self.backbone_config.reverse_complement:
            x = torch.cat(
                [x, self._embed(complement(tokens), lengths, reverse=True)], dim=-1
            )  # (b, l, 2d): two strands
        lengths = -(-lengths // self.patch)
        real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]  # (b, l)
        padded = not bool(real.all())
        # Padding precedes the real tokens of a backward scan: its own segment keeps it out of their state.
        seq_idx = (~real).to(torch.int32) if padded and not self.backbone.causal else None
        y, _ = self.backbone(x, seq_idx=seq_idx)
        pooled = self._pool(y, lengths, real if padded else None)
        with torch.autocast(device_type=pooled.device.type, enabled=False):
            return self.head(self.standardize(pooled))

    def _embed(self, tokens: Tensor, lengths: Tensor, reverse: bool) -> Tensor:
        """(b, l) tokens to (b, ceil(l / patch), d)."""
        x = self._average(self.embedding, tokens.long(), lengths)
        if self.kmer > 1:
            x = x + self._average(self.kmer_embedding, kmer_ids(tokens, self.kmer, reverse), lengths)
        return x

    def _average(self, embedding: nn.Embedding, ids: Tensor, lengths: Tensor) -> Tensor:
        """Embed (b, l) ids and average each patch over its real positions: (b, ceil(l / patch), d)."""
        if self.patch == 1:
            return embedding(ids)
        batch, length = ids.shape
        patches = -(-length // self.patch)
        ids = F.pad(ids, (0, patches * self.patch - length))
        real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
        count = real.view(batch, patches, -1).sum(-1).clamp(min=1)  # (b, patches)
        weights = (real / count.repeat_interleave(self.patch, 1)).to(embedding.weight.dtype)
        # A bag sums its rows without writing (b, l, d) to memory.
        bags = F.embedding_bag(
            ids.view(-1, self.patch),
            embedding.weight,
            mode="sum",
            per_sample_weights=weights.view(-1, self.patch),
            padding_idx=embedding.padding_idx,
        )
        return bags.view(batch, patches, -1)

    def _pool(self, y: Tensor, lengths: Tensor, real: Tensor | None) -> Tensor:
        """(b, l, d or 2d) to (b, d), in float32 or wider; ``real`` (b, l) marks what is no padding, None: all."""
        wide = torch.promote_types(y.dtype, torch.float32)
        strands, d = self.backbone_config.reverse_complement, self.backbone_config.d_model
        if self.pooling == "last":
            pooled = y[torch.arange(len(y), device=y.device), lengths - 1]
            if strands:  # the second strand is read from its other end, which is token 0
                pooled = torch.cat([pooled[:, :d], y[:, 0, d:]], dim=-1)
            pooled = pooled.to(wide)
        else:
            if real is not None:
                y = y.masked_fill(~real[..., None], 0)
            pooled = y.sum(1, dtype=wide) / lengths[:, None]
        return pooled.unflatten(-1, (2, d)).mean(1) if strands else pooled

    def predict_proba(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """(b, c) float32 probabilities, averaged over both strands if the task says so."""
        probabilities = self(tokens, lengths).softmax(-1)
        if self.average_strands and not self.backbone_config.reverse_complement:
            other = self(reverse_complement(tokens, lengths), lengths).softmax(-1)
            probabilities = (probabilities + other) / 2
        return probabilities

    def on_fit_start(self) -> None:
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


def kmer_ids(tokens: Tensor, k: int, reverse: bool = False) -> Tensor:
    """Number of the k-mer that ends at each position.

    Args:
        tokens: (b, l) integer token ids.
        k: bases a k-mer.
        reverse: read from right to left, so that a k-mer ends at its leftmost position.

    Returns:
        (b, l) int64: 0 to 4**k - 1, or 4**k where the k-mer leaves the sequence or holds anything but A, C, G and T.
    """
    length = tokens.shape[1]
    ids = torch.zeros(tokens.shape, dtype=torch.long, device=tokens.device)
    whole = torch.ones(tokens.shape, dtype=torch.bool, device=tokens.device)
    for i in range(k):
        # Position t sees token t - i, or t + i in reverse; what lies outside is no base.
        shifted = F.pad(tokens[:, i:], (0, i), value=N) if reverse else F.pad(tokens, (i, 0), value=N)[:, :length]
        shifted = shifted[:, :length]
        ids += shifted.long() << (2 * i)
        whole &= shifted < N
    return ids.masked_fill(~whole, 4**k)
