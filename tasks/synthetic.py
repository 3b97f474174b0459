"""Tasks of the synthetic problems: what a model remembers, and the accuracy at each length."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torchmetrics import Metric

from seqssm.backbone import Backbone, BackboneConfig
from seqssm.data import DNABatch
from seqssm.data.synthetic_tasks import RecallBatch
from seqssm.errors import UserError
from seqssm.longcontext.chunked import check_chunkable, fold_backbone
from seqssm.tasks.base import OptimizerConfig, Task
from seqssm.tasks.dna import DNAClassification


class AccuracyByLength(Metric):
    """Right answers at each sequence length, over all ranks.

    Args:
        lengths: all that will be seen, tokens.
    """

    right: Tensor
    total: Tensor

    def __init__(self, lengths: list[int]) -> None:
        super().__init__()
        self.lengths = sorted(set(lengths))
        for name in ("right", "total"):
            self.add_state(name, torch.zeros(len(self.lengths), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, length: int, right: Tensor) -> None:
        """Count answers, ``right`` (any shape) booleans, of sequences of a length."""
        at = self.lengths.index(length)
        self.right[at] += right.sum()
        self.total[at] += right.numel()

    def compute(self) -> list[tuple[int, int, int]]:
        """(length, right answers, answers) of each length that was seen."""
        rows = zip(self.lengths, self.right.tolist(), self.total.tolist(), strict=True)
        return [row for row in rows if row[2]]


def wilson_interval(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of a share (Wilson, 1927), which holds near 0 and 1, too."""
    share, n = right / total, total
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def accuracy_table(rows: list[tuple[int, int, int]], others: dict[str, dict[int, float]] | None = None) -> str:
    """Markdown: accuracy with its 95% interval at each length.

    Args:
        rows: length, right answers, answers.
        others: further columns by name: accuracy by length.
    """
    others = others or {}
    lines = [
        "| length | answers | accuracy | 95% interval |" + "".join(f" {name} |" for name in others),
        "|---|---|---|---|" + "---|" * len(others),
    ]
    for length, right, total in rows:
        low, high = wilson_interval(right, total)
        power = f" (2^{length.bit_length() - 1})" if length & (length - 1) == 0 else ""
        cells = [f"{length:,}{power}", str(total), f"{right / total:.4f}", f"{low:.4f}-{high:.4f}"]
        cells += [f"{column[length]:.4f}" if length in column else "" for column in others.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


class SequenceRecall(Task):
    """Predict the answers at a sequence's end: selective copying, induction heads, associative recall.

    The model is a causal language model whose loss counts the answers alone.

    Args:
        vocabulary_size: tokens; the command line takes it from the data.
        backbone: the model, forward only.
        chunk_length: run longer sequences in chunks of so many tokens, with the gradients of one pass in the memory of
            one chunk; 0 for one pass.
        label_smoothing: share of each target spread evenly over the vocabulary. A loss that goes to zero asks for no
            more than the largest logit; this one goes on asking for the same logits, whatever stands between.
        optimizer: learning rate and its schedule.
        init_from: a checkpoint whose weights to start from.
    """

    def __init__(
        self,
        vocabulary_size: int,
        backbone: BackboneConfig = BackboneConfig(d_model=64, n_layers=2),  # noqa: B008 - frozen
        chunk_length: int = 0,
        label_smoothing: float = 0.0,
        optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3),  # noqa: B008 - frozen
        init_from: str | None = None,
    ) -> None:
        super().__init__(
            backbone,
            optimizer,
            init_from,
            vocabulary_size=vocabulary_size,
            chunk_length=chunk_length,
            label_smoothing=label_smoothing,
        )
        self.vocabulary_size, self.chunk_length, self.label_smoothing = vocabulary_size, chunk_length, label_smoothing
        self.backbone = Backbone(self.backbone_config)
        if not self.backbone.causal:
            raise UserError("recall reads forward only: set backbone.bidirectional: none, reverse_complement: false")
        if chunk_length:
            check_chunkable(self.backbone, chunk_length, "model.chunk_length")
        d = self.backbone_config.d_model
        self.embedding = nn.Embedding(vocabulary_size, d)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head = nn.Linear(d, vocabulary_size, bias=False)
        self.by_length: AccuracyByLength | None = None
        self.load_initial_weights()

    def forward(self, tokens: Tensor, answers: int) -> Tensor:
        """tokens (b, l) integers -> (b, answers, vocabulary_size), the logits of the last positions."""
        length = tokens.shape[1]
        if not 0 < self.chunk_length < length:
            return self.head(self.backbone(self.embedding(tokens.long()))[0][:, -answers:])

        def reduce(carry: dict[str, Tensor], y: Tensor, start: int) -> dict[str, Tensor]:
            return {"last": torch.cat([carry["last"], y], dim=1)[:, -answers:]}

        none = torch.zeros(
            len(tokens), 0, self.backbone.d_out, device=tokens.device, dtype=self.backbone.norm.weight.dtype
        )
        carry, _ = fold_backbone(
            self.backbone,
            lambda start, stop: self.embedding(tokens[:, start:stop].long()),
            reduce,
            {"last": none},
            length=length,
            chunk_length=self.chunk_length,
            modules=[self.embedding],
        )
        return self.head(carry["last"])

    def training_step(self, batch: RecallBatch, batch_idx: int) -> Tensor:
        logits = self(batch.tokens, batch.targets.shape[1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), label_smoothing=self.label_smoothing)
        right = (logits.argmax(-1) == batch.targets).float().mean()
        self.log_dict({"train_loss": loss, "train_accuracy": right}, prog_bar=True, batch_size=len(batch.targets))
        return loss

    def validation_step(self, batch: RecallBatch, batch_idx: int) -> None:
        right = self.right(batch)
        self.log("val_accuracy", right.float().mean(), prog_bar=True, sync_dist=True, batch_size=len(right))

    def right(self, batch: RecallBatch) -> Tensor:
        """(b, t) which answers the model gives."""
        return self(batch.tokens, batch.targets.shape[1]).argmax(-1) == batch.targets

    def on_test_start(self) -> None:
        self.by_length = AccuracyByLength(_test_lengths(self)).to(self.device)

    def test_step(self, batch: RecallBatch, batch_idx: int) -> None:
        assert self.by_length is not None
        self.by_length.update(batch.tokens.shape[1], self.right(batch))

    def on_test_epoch_end(self) -> None:
        assert self.by_length is not None
        _report(self, self.by_length)


class NeedleSearch(DNAClassification):
    """:class:`DNAClassification`, with its arguments, whose test reports the accuracy at each length."""

    by_length: AccuracyByLength | None = None

    def right(self, batch: DNABatch) -> Tensor:
        """(b,) which labels the model gives."""
        return self.predict_proba(batch.tokens, batch.lengths).argmax(-1) == batch.labels

    def on_test_start(self) -> None:
        self.by_length = AccuracyByLength(_test_lengths(self)).to(self.device)

    def test_step(self, batch: DNABatch, batch_idx: int) -> None:
        assert self.by_length is not None
        self.by_length.update(batch.tokens.shape[1], self.right(batch))

    def on_test_epoch_end(self) -> None:
        assert self.by_length is not None
        _report(self, self.by_length)


def _test_lengths(task: Task) -> list[int]:
    lengths = getattr(getattr(task.trainer, "datamodule", None), "test_lengths", None)
    if lengths is None:
        raise UserError("a test by length needs data of seqssm.data.synthetic_tasks, which have test_lengths")
    return lengths


def _report(task: Task, metric: AccuracyByLength) -> None:
    rows = metric.compute()
    for length, right, total in rows:
        task.log(f"test_accuracy_{length}", right / total, rank_zero_only=True)
    rank_zero_only(print)(accuracy_table(rows))
