"""Speech recognition with a causal model: what is said, while it is being said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics.text import CharErrorRate, WordErrorRate

from seqssm.backbone import BackboneConfig
from seqssm.data.features import FeatureConfig
from seqssm.data.speech.batches import SpeechBatch
from seqssm.data.speech.text import TextConfig
from seqssm.errors import UserError
from seqssm.files import atomic_write
from seqssm.tasks.asr_layers import ctc_loss, spellable, transducer_loss
from seqssm.tasks.asr_network import SPEECH_FEATURES, ASRNetwork
from seqssm.tasks.base import OptimizerConfig, Task


class StreamingASR(ASRNetwork, Task):
    """Recognise speech with CTC, and an RNN-T head where asked for, by a causal model with one lookahead.

    Subsampling makes a token of four frames (40 ms). The first layers of the backbone read them, then one convolution
    looks ahead, then the other layers follow; the delay is that of the one convolution, wherever it stands. Its length
    is drawn for each training batch from ``lookahead_ms``, so that one checkpoint runs with any of these, which
    :class:`~seqssm.tasks.asr_stream.Transcriber` chooses a session. The first layers have a CTC loss of their own.

    Args:
        tokenizer: the tokens, as a tokenizer's ``to_dict`` gives them; from the data.
        text: the written form of transcripts; from the data.
        features: how samples become features, with the training data's statistics; from the data, too.
        backbone: all layers; causal.
        lookahead_after: the layer that the lookahead follows, counted from 1; half of them by default.
        lookahead_ms: lookaheads to choose from, multiples of 40 ms.
        eval_lookahead_ms: the one for validation and tests; the longest by default.
        stem_channels: of the subsampling's convolutions.
        dropout: before the heads.
        intermediate_weight: share of the intermediate CTC loss.
        rnnt_weight: share of the transducer's loss beside CTC; 0 has no transducer.
        optimizer: learning rate and its schedule.
        init_from: a checkpoint whose weights to start from.
    """

    def __init__(
        self,
        tokenizer: dict[str, Any],
        text: TextConfig = TextConfig(),  # noqa: B008 - frozen
        features: FeatureConfig = SPEECH_FEATURES,
        backbone: BackboneConfig = BackboneConfig(),  # noqa: B008 - frozen
        lookahead_after: int | None = None,
        lookahead_ms: list[int] = [0, 80, 160, 320],  # noqa: B006 - never written to
        eval_lookahead_ms: int | None = None,
        stem_channels: int = 32,
        dropout: float = 0.1,
        intermediate_weight: float = 0.3,
        rnnt_weight: float = 0.0,
        optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3),  # noqa: B008 - frozen
        init_from: str | None = None,
    ) -> None:
        super().__init__(
            tokenizer,
            text,
            features,
            backbone,
            lookahead_after=lookahead_after,
            lookahead_ms=lookahead_ms,
            eval_lookahead_ms=eval_lookahead_ms,
            stem_channels=stem_channels,
            dropout=dropout,
            rnnt_weight=rnnt_weight,
            optimizer=optimizer,
            init_from=init_from,
            intermediate_weight=intermediate_weight,
        )
        if not 0 <= intermediate_weight < 1 or not 0 <= rnnt_weight <= 1:
            raise UserError("model.intermediate_weight must lie in [0, 1), model.rnnt_weight in [0, 1]")
        self.intermediate_weight, self.rnnt_weight = intermediate_weight, rnnt_weight
        self.val_wer, self.test_wer = WordErrorRate(), WordErrorRate()
        self.val_cer, self.test_cer = CharErrorRate(), CharErrorRate()
        self._transcripts: list[tuple[str, str]] = []
        self.load_initial_weights()

    # ---- training ----------------------------------------------------------------------------------------------------

    def losses(self, batch: SpeechBatch, choice: int) -> dict[str, Tensor]:
        """The loss, and what it is made of."""
        encoding = self.encode(batch.features, batch.lengths, choice)
        targets = (encoding.lengths, batch.tokens, batch.token_lengths)
        ctc = ctc_loss(self.score(encoding.encoded), *targets)
        parts = {"ctc": ctc}
        loss = ctc
        if self.intermediate_weight:
            parts["intermediate"] = ctc_loss(self._log_probs(self.intermediate_head, encoding.intermediate), *targets)
            loss = (1 - self.intermediate_weight) * ctc + self.intermediate_weight * parts["intermediate"]
        if self.predictor is not None and self.joiner is not None:
            predicted = self.predictor(self.predictor.history(batch.tokens))  # (b, u + 1, d)
            encoded = self.dropout(encoding.encoded)
            logits = self.joiner(encoded[:, :, None], predicted[:, None])  # (b, t, u + 1, v)
            parts["rnnt"] = transducer_loss(logits, *targets)
            loss = (1 - self.rnnt_weight) * loss + self.rnnt_weight * parts["rnnt"]
        return {"loss": loss, **parts}

    def training_step(self, batch: SpeechBatch, batch_idx: int) -> Tensor:
        choice = int(torch.randint(len(self.lookahead_ms), ()))
        parts = self.losses(batch, choice)
        size = len(batch.lengths)
        loss = parts.pop("loss")
        self.log("train_loss", loss, prog_bar=True, batch_size=size)
        self.log_dict({f"train_{name}": value for name, value in parts.items()}, batch_size=size)
        lost = ~spellable(self.subsampling.tokens(batch.lengths), batch.tokens, batch.token_lengths)
        self.log("train_unspellable", lost.float().mean(), batch_size=size)
        return loss

    def validation_step(self, batch: SpeechBatch, batch_idx: int) -> None:
        self._evaluate(batch, "val")

    def test_step(self, batch: SpeechBatch, batch_idx: int) -> None:
        self._evaluate(batch, "test")

    def predict_step(self, batch: SpeechBatch, batch_idx: int) -> list[str]:
        return self.transcribe(*self(batch.features, batch.lengths))

    def _evaluate(self, batch: SpeechBatch, split: str) -> None:
        log_probs, lengths = self(batch.features, batch.lengths)
        loss, size = ctc_loss(log_probs, lengths, batch.tokens, batch.token_lengths), len(lengths)
        self.log(f"{split}_loss", loss, prog_bar=True, sync_dist=True, batch_size=size, on_step=False, on_epoch=True)
        said = self.transcribe(log_probs, lengths)
        meant = [
            self.tokenizer.decode(row[:n].tolist())
            for row, n in zip(batch.tokens.cpu(), batch.token_lengths.tolist(), strict=True)
        ]
        for metric in self._metrics(split).values():
            metric.update(said, meant)
        self._transcripts += zip(meant, said, strict=True)

    def _metrics(self, split: str) -> dict[str, WordErrorRate | CharErrorRate]:
        if split == "val":
            return {"wer": self.val_wer, "cer": self.val_cer}
        return {"wer": self.test_wer, "cer": self.test_cer}

    def on_validation_epoch_end(self) -> None:
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        self._finish("test")

    def _finish(self, split: str) -> None:
        """Log the error rates of the whole split, and write its transcripts (of this process' share) beside them."""
        self.log_dict({f"{split}_{name}": metric for name, metric in self._metrics(split).items()}, prog_bar=True)
        transcripts, self._transcripts = self._transcripts, []
        folder = self.trainer.log_dir if self.trainer.loggers else None
        if self.trainer.sanity_checking or not folder or not self.trainer.is_global_zero:
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        with atomic_write(Path(folder) / f"transcripts_{split}.tsv") as file:
            file.write("reference\thypothesis\n")
            file.writelines(f"{meant}\t{said}\n" for meant, said in transcripts)
