"""Speech recognition with a causal model: what is said, while it is being said."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.text import CharErrorRate, WordErrorRate

from seqssm.backbone import Backbone, BackboneConfig
from seqssm.data.features import FeatureConfig
from seqssm.data.speech.batches import SpeechBatch
from seqssm.data.speech.text import TextConfig
from seqssm.data.speech.tokenizers import tokenizer_from_dict
from seqssm.errors import UserError
from seqssm.files import atomic_write
from seqssm.tasks.asr_layers import (
    SUBSAMPLING,
    Joiner,
    Lookahead,
    Predictor,
    Subsampling,
    ctc_loss,
    spellable,
    transducer_loss,
)
from seqssm.tasks.audio_layers import real_positions
from seqssm.tasks.base import OptimizerConfig, Task

SPEECH_FEATURES = FeatureConfig(n_mels=80)


@dataclasses.dataclass(frozen=True)
class Encoding:
    """What the encoder makes of utterances.

    Attributes:
        encoded: (b, t, d) tokens behind all layers.
        intermediate: (b, t, d) tokens below the lookahead.
        lengths: (b,) real tokens.
    """

    encoded: Tensor
    intermediate: Tensor
    lengths: Tensor


class StreamingASR(Task):
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
        # Lightning's load_from_checkpoint hands the stored plain data over as it is.
        features = FeatureConfig(**features) if isinstance(features, dict) else features
        text = TextConfig(**text) if isinstance(text, dict) else text
        super().__init__(
            backbone,
            optimizer,
            init_from,
            tokenizer=dict(tokenizer),
            text=text.to_dict(),
            features=features.to_dict(),
            lookahead_after=lookahead_after,
            lookahead_ms=list(lookahead_ms),
            eval_lookahead_ms=eval_lookahead_ms,
            stem_channels=stem_channels,
            dropout=dropout,
            intermediate_weight=intermediate_weight,
            rnnt_weight=rnnt_weight,
        )
        config = self.backbone_config
        if config.bidirectional != "none" or config.reverse_complement:
            raise UserError("streaming recognition needs model.backbone.bidirectional: none, reverse_complement: false")
        if not 0 <= intermediate_weight < 1 or not 0 <= rnnt_weight <= 1:
            raise UserError("model.intermediate_weight must lie in [0, 1), model.rnnt_weight in [0, 1]")
        below = (config.n_layers + 1) // 2 if lookahead_after is None else lookahead_after
        if not 0 < below <= config.n_layers:
            raise UserError(f"model.lookahead_after is {below}: it must lie between 1 and {config.n_layers} layers")
        self.features, self.text = features, text
        self.tokenizer = tokenizer_from_dict(tokenizer)
        self.lookahead_ms = list(lookahead_ms)
        self.intermediate_weight, self.rnnt_weight = intermediate_weight, rnnt_weight
        d, vocabulary = config.d_model, self.tokenizer.size + 1
        self.subsampling = Subsampling(features.n_mels, d, stem_channels)
        self.backbone = Backbone(dataclasses.replace(config, n_layers=below))
        self.lookahead = Lookahead(d, [self._tokens(ms) for ms in lookahead_ms])
        upper = config.n_layers - below
        # The pattern of mixers goes on above where it stopped below.
        start = below % len(config.pattern)
        pattern = config.pattern[start:] + config.pattern[:start]
        self.upper = Backbone(dataclasses.replace(config, n_layers=upper, pattern=pattern)) if upper else None
        if not self.causal:
            raise UserError("streaming recognition needs causal mixers that carry a state")
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(d, vocabulary)
        self.intermediate_head = nn.Linear(d, vocabulary)
        self.predictor = Predictor(vocabulary, d) if rnnt_weight else None
        self.joiner = Joiner(d, vocabulary) if rnnt_weight else None
        self.eval_choice = self.menu_position(max(lookahead_ms) if eval_lookahead_ms is None else eval_lookahead_ms)
        self.val_wer, self.test_wer = WordErrorRate(), WordErrorRate()
        self.val_cer, self.test_cer = CharErrorRate(), CharErrorRate()
        self._transcripts: list[tuple[str, str]] = []
        self.load_initial_weights()

    @property
    def causal(self) -> bool:
        """Always: nothing but the lookahead depends on later frames."""
        return self.backbone.causal and (self.upper is None or self.upper.causal)

    @property
    def token_s(self) -> float:
        """Seconds from one token to the next."""
        return SUBSAMPLING * self.features.hop_samples / self.features.sample_rate

    def _tokens(self, ms: float) -> int:
        tokens = ms / 1000 / self.token_s
        if abs(tokens - round(tokens)) > 1e-6:
            raise UserError(f"model.lookahead_ms has {ms}: take multiples of a token's {1000 * self.token_s:g} ms")
        return round(tokens)

    def menu_position(self, lookahead_ms: int) -> int:
        """Position of a lookahead among those that this model was trained with.

        Raises:
            UserError: it is not among them.
        """
        if lookahead_ms not in self.lookahead_ms:
            known = ", ".join(map(str, self.lookahead_ms))
            raise UserError(f"a lookahead of {lookahead_ms} ms: this model was trained with {known} ms; choose one")
        return self.lookahead_ms.index(lookahead_ms)

    # ---- the model ---------------------------------------------------------------------------------------------------

    def encode(self, features: Tensor, lengths: Tensor, choice: int | Tensor | None = None) -> Encoding:
        """Run the encoder on whole utterances.

        Args:
            features: (b, l, mel) normalised frames, padded on the right.
            lengths: (b,) real frames.
            choice: position in ``lookahead_ms``, for all or (b,); that of validation by default.
        """
        frames = real_positions(lengths, features.shape[1])
        x = features if frames is None else features.masked_fill(~frames[..., None], 0)
        x, _ = self.subsampling(x)
        lengths = self.subsampling.tokens(lengths)
        x, _ = self.backbone(x)
        choice = self.eval_choice if choice is None else choice
        chosen = torch.as_tensor(choice, device=x.device).expand(len(x))
        y = self.lookahead(x, chosen, real_positions(lengths, x.shape[1]))
        if self.upper is not None:
            y, _ = self.upper(y)
        return Encoding(y, x, lengths)

    def forward(self, features: Tensor, lengths: Tensor, choice: int | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """CTC log-probabilities (b, t, v), float32, blank 0, and (b,) real tokens; arguments as of :meth:`encode`.

        Padding and neighbours in the batch do not change them.
        """
        encoding = self.encode(features, lengths, choice)
        return self.score(encoding.encoded), encoding.lengths

    def score(self, encoded: Tensor) -> Tensor:
        """CTC log-probabilities (b, t, v) of encoded tokens (b, t, d)."""
        return self._log_probs(self.head, encoded)

    def _log_probs(self, head: nn.Linear, x: Tensor) -> Tensor:
        with torch.autocast(device_type=x.device.type, enabled=False):
            return head(self.dropout(x.to(head.weight.dtype))).float().log_softmax(-1)

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

    def transcribe(self, log_probs: Tensor, lengths: Tensor) -> list[str]:
        """Greedy transcripts of (b, t, v) log-probabilities."""
        best = log_probs.argmax(-1)
        best = best.masked_fill(torch.arange(best.shape[1], device=best.device) >= lengths[:, None], 0)
        new = best.clone()
        new[:, 1:][best[:, 1:] == best[:, :-1]] = 0
        return [" ".join(self.tokenizer.decode(row[row > 0].tolist()).split()) for row in new.cpu()]

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
