"""The audio tagger: what is heard in a clip of any length, and when."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from seqssm.backbone import Backbone, BackboneConfig
from seqssm.data.audio.reading import Sound, sound_blocks
from seqssm.data.features import FeatureConfig
from seqssm.errors import UserError
from seqssm.tasks.audio_layers import Downsampling, FrameStem, Pooling, PoolingKind, padded_lengths, real_positions
from seqssm.tasks.network import Network

if TYPE_CHECKING:
    from seqssm.tasks.events import Event


class Tags(NamedTuple):
    """What is heard in a recording.

    Attributes:
        duration_s: of the recording.
        probabilities: of all classes for all of it, the best first.
        present: the classes above their thresholds, the best first.
        events: what is heard when, in order of their beginning.
    """

    duration_s: float
    probabilities: dict[str, float]
    present: list[str]
    events: list[Event]


class TaggingNetwork(Network):
    """Score audio clips.

    A stem of convolutions makes a token of every ``frame_group`` frames, the backbone reads the tokens, and a linear
    head scores each of them; pooling over time gives the clip's scores. With a causal backbone everything is causal,
    and :class:`~seqssm.tasks.tagging_stream.StreamingTagger` runs it live.

    Its arguments are those of :class:`seqssm.tasks.tagging.AudioTagging` that a trained model needs.
    """

    kind: ClassVar[str] = "audio tagger"
    head_parts: ClassVar[tuple[str, ...]] = ("head", "pooling")

    def __init__(
        self,
        labels: list[str],
        multi_label: bool = False,
        features: FeatureConfig = FeatureConfig(),  # noqa: B008 - frozen
        backbone: BackboneConfig = BackboneConfig(),  # noqa: B008 - frozen
        frame_group: int = 4,
        stem_channels: list[int] = [32, 64, 64],  # noqa: B006 - never written to
        pooling: PoolingKind = "mean",
        dropout: float = 0.0,
        thresholds: list[float] | None = None,
        stem_downsampling: Downsampling = "stride",
        stem_depth: int = 1,
        **training: Any,
    ) -> None:
        # Checkpoints hold plain data.
        features = FeatureConfig(**features) if isinstance(features, dict) else features
        super().__init__(
            backbone,
            labels=list(labels),
            multi_label=multi_label,
            features=features.to_dict(),
            frame_group=frame_group,
            stem_channels=list(stem_channels),
            pooling=pooling,
            dropout=dropout,
            thresholds=thresholds,
            stem_downsampling=stem_downsampling,
            stem_depth=stem_depth,
            **training,
        )
        classes = len(labels)
        if classes < (1 if multi_label else 2):
            raise UserError(f"a tagger needs {'a class' if multi_label else 'two classes'} at least, got {classes}")
        self.labels, self.multi_label, self.features = list(labels), multi_label, features
        self.thresholds = [0.5] * classes if thresholds is None else list(thresholds)

        config = self.backbone_config
        if config.reverse_complement:
            raise UserError("backbone.reverse_complement is for DNA: set it to false")
        self.backbone = Backbone(config)
        self.stem = FrameStem(
            features.n_mels,
            config.d_model,
            frame_group,
            list(stem_channels),
            self.backbone.causal,
            stem_downsampling,
            stem_depth,
        )
        self.pooling = Pooling(pooling, config.d_model, classes)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(config.d_model, classes)
        if multi_label:
            nn.init.constant_(self.head.bias, -math.log(max(classes - 1, 1)))  # a class is present once in c clips

    def init_args(self) -> dict[str, Any]:
        args = super().init_args()
        # Before __init__ is through there is nothing tuned yet.
        return {**args, "thresholds": list(self.thresholds) if hasattr(self, "thresholds") else args["thresholds"]}

    @property
    def causal(self) -> bool:
        """Whether no output depends on later frames, so that the model can run live."""
        return self.backbone.causal

    @property
    def token_s(self) -> float:
        """Seconds from one token to the next."""
        return self.stem.frame_group * self.features.hop_samples / self.features.sample_rate

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Score clips.

        Args:
            features: (b, l, mel) normalised frames, padded on the right.
            lengths: (b,) real frames of each clip, at least 1.

        Returns:
            (b, c) float32 logits. Padding and neighbours in the batch do not change them.
        """
        return self.score(*self.encode(features, lengths))[1]

    def frame_logits(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Score every token, as :meth:`forward` the clip: (b, ceil(l / frame_group), c) float32 logits."""
        return self.score(*self.encode(features, lengths))[0]

    def encode(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
        """(b, t, d) tokens behind the backbone, and (b,) how many of them are real, or None where all are."""
        known = padded_lengths(features, lengths)
        x, _ = self.stem(features, known)
        known = None if known is None else self.stem.tokens(known)
        real = real_positions(known, x.shape[1])
        # Padding precedes the real tokens of a backward scan: its own segment keeps it out of their state.
        seq_idx = None if real is None or self.causal else (~real).to(torch.int32)
        return self.backbone(x, seq_idx=seq_idx)[0], known

    def score(self, y: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Frame logits (b, t, c) and clip logits (b, c) of tokens (b, t, d) behind the backbone."""
        with torch.autocast(device_type=y.device.type, enabled=False):
            y = self.dropout(y.to(self.head.weight.dtype))
            logits = self.head(y)
            return logits, self.pooling(logits, y, lengths)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits (..., c) to probabilities: each class for itself, or summing to one with one label a clip."""
        return logits.sigmoid() if self.multi_label else logits.softmax(-1)

    def predict(
        self,
        source: Sound,
        rate: int | None = None,
        *,
        threshold: float | None = None,
        window_s: float = 30.0,
    ) -> Tags:
        """Say what is heard in a recording of any length, as `seqssm tag` does.

        Args:
            source: the path of a file (WAV, FLAC, MP3, OGG, Opus), or samples (n,) or (channels, n) between -1 and 1.
            rate: Hz, of samples.
            threshold: probability from which any class is present; by default those tuned on validation.
            window_s: seconds a window of a model that reads both ways.

        Raises:
            UserError: the file cannot be read, or samples have no rate or are not finite.
        """
        from seqssm.tasks.events import ended
        from seqssm.tasks.tagging_stream import Listener, make_tagger

        listener = Listener(self, threshold=threshold)
        tagger, events, heard, rate_hz = None, [], 0, 1
        with torch.inference_mode():
            for samples, rate_hz in sound_blocks(source, rate):
                tagger = tagger or make_tagger(self, rate_hz, window_s)
                events += ended(listener.hear(tagger.accept(samples)))
                heard += samples.shape[-1]
            assert tagger is not None  # a sound has a block at least
            events += ended(listener.hear(tagger.flush()))
        events += ended(listener.detector.flush())
        tags = listener.tags(len(self.labels))
        probabilities = {label: p for label, p, _ in tags}
        present = [label for label, p, on in tags if p >= on]
        return Tags(heard / rate_hz, probabilities, present, sorted(events, key=lambda event: event.start_s))

    def probe(self, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        # Normalised features have a standard deviation of one half.
        features = 0.5 * torch.randn(8, 300, self.features.n_mels, generator=generator)
        with torch.inference_mode():
            return self.probabilities(self(features, torch.full((8,), 300)).double())
