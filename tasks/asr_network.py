"""The streaming recogniser: what is said, while it is being said."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from seqssm.backbone import Backbone, BackboneConfig
from seqssm.data.audio.reading import Sound, sound_blocks
from seqssm.data.features import FeatureConfig
from seqssm.data.speech.text import TextConfig
from seqssm.data.speech.tokenizers import tokenizer_from_dict
from seqssm.errors import UserError
from seqssm.tasks.asr_layers import SUBSAMPLING, Joiner, Lookahead, Predictor, Subsampling
from seqssm.tasks.audio_layers import real_positions
from seqssm.tasks.network import Network

if TYPE_CHECKING:
    from seqssm.tasks.asr_decoding import DecodingConfig
    from seqssm.tasks.transcripts import EndpointRules, Result

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


class Transcript(NamedTuple):
    """What is said in a recording: all of the text, and its segments with the times of their words."""

    text: str
    segments: list[Result]


class ASRNetwork(Network):
    """Recognise speech by a causal model with one lookahead: a CTC head, and a transducer where asked for.

    Subsampling makes a token of four frames (40 ms). The first layers of the backbone read them, then one convolution
    looks ahead, then the other layers follow; the delay is that of the one convolution, wherever it stands. Its length
    is drawn for each training batch from ``lookahead_ms``, so that one checkpoint runs with any of these, which
    :class:`~seqssm.tasks.asr_stream.Transcriber` chooses a session.

    Its arguments are those of :class:`seqssm.tasks.asr.StreamingASR` that a trained model needs.
    """

    kind: ClassVar[str] = "speech recogniser"
    body_parts: ClassVar[tuple[str, ...]] = ("backbone", "upper")
    head_parts: ClassVar[tuple[str, ...]] = ("head", "intermediate_head", "predictor", "joiner")

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
        rnnt_weight: float = 0.0,
        **training: Any,
    ) -> None:
        # Checkpoints hold plain data.
        features = FeatureConfig(**features) if isinstance(features, dict) else features
        text = TextConfig(**text) if isinstance(text, dict) else text
        super().__init__(
            backbone,
            tokenizer=dict(tokenizer),
            text=text.to_dict(),
            features=features.to_dict(),
            lookahead_after=lookahead_after,
            lookahead_ms=list(lookahead_ms),
            eval_lookahead_ms=eval_lookahead_ms,
            stem_channels=stem_channels,
            dropout=dropout,
            rnnt_weight=rnnt_weight,
            **training,
        )
        config = self.backbone_config
        if config.bidirectional != "none" or config.reverse_complement:
            raise UserError("streaming recognition needs model.backbone.bidirectional: none, reverse_complement: false")
        below = (config.n_layers + 1) // 2 if lookahead_after is None else lookahead_after
        if not 0 < below <= config.n_layers:
            raise UserError(f"model.lookahead_after is {below}: it must lie between 1 and {config.n_layers} layers")
        self.features, self.text = features, text
        self.tokenizer = tokenizer_from_dict(tokenizer)
        self.lookahead_ms = list(lookahead_ms)
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

    @classmethod
    def output_names(cls, init_args: Mapping[str, Any]) -> list[str]:
        stored = init_args.get("tokenizer")
        return ["<blank>", *tokenizer_from_dict(stored).tokens] if stored else []

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

    def transcribe(self, log_probs: Tensor, lengths: Tensor) -> list[str]:
        """Greedy transcripts of (b, t, v) log-probabilities."""
        best = log_probs.argmax(-1)
        best = best.masked_fill(torch.arange(best.shape[1], device=best.device) >= lengths[:, None], 0)
        new = best.clone()
        new[:, 1:][best[:, 1:] == best[:, :-1]] = 0
        return [" ".join(self.tokenizer.decode(row[row > 0].tolist()).split()) for row in new.cpu()]

    def predict(
        self,
        source: Sound,
        rate: int | None = None,
        *,
        lookahead_ms: int | None = None,
        decoding: DecodingConfig | None = None,
        rules: EndpointRules | None = None,
    ) -> Transcript:
        """Write down what is said in a recording of any length, as `seqssm transcribe` does.

        Args:
            source: the path of a file (WAV, FLAC, MP3, OGG, Opus), or samples (n,) or (channels, n) between -1 and 1.
            rate: Hz, of samples.
            lookahead_ms: one of those that the model was trained with; by default that of its validation.
            decoding: greedy CTC by default.
            rules: where the text is cut into segments.

        Raises:
            UserError: the file cannot be read, or samples have no rate or are not finite.
        """
        from seqssm.tasks.asr_decoding import DecodingConfig, decoders
        from seqssm.tasks.asr_stream import Transcriber

        decoder = decoders(self, decoding or DecodingConfig())()
        stream, results = None, []
        for samples, rate_hz in sound_blocks(source, rate):
            if stream is None:
                stream = Transcriber(self, rate_hz, lookahead_ms=lookahead_ms, decoder=decoder, rules=rules)
            results += stream.accept(samples)
        assert stream is not None  # a sound has a block at least
        results += stream.finish()
        final = [result for result in results if result.is_final]
        return Transcript(" ".join(result.text for result in final if result.text), final)

    def probe(self, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        # Normalised features have a standard deviation of one half.
        features = 0.5 * torch.randn(4, 300, self.features.n_mels, generator=generator)
        with torch.inference_mode():
            return self(features, torch.full((4,), 300))[0].exp()
