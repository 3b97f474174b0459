"""Tagging of sound that is still going on, exactly and in constant memory; and of files of any length."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from seqssm.data.features import StreamingFbank
from seqssm.errors import UserError
from seqssm.mixers import State
from seqssm.streaming import Stream
from seqssm.tasks.events import Change, EventDetector
from seqssm.tasks.tagging_network import TaggingNetwork

SNAPSHOT_FORMAT = "seqssm-tagger"
STATE_PARTS = ("stem", "backbone", "pooling")


class TagScores(NamedTuple):
    """Logits of some consecutive tokens, frames (b, t, c), and of all that was heard so far, clip (b, c)."""

    frames: Tensor
    clip: Tensor


class StreamingTagger(nn.Module):
    """A causal tagger with its state in its hands: ``forward(features (b, t, mel), state) -> (TagScores, state)``.

    For :class:`~seqssm.streaming.Stream`, with chunks of whole frame groups. The state is that of the stem, the
    backbone and the pooling, with keys such as ``backbone.layers.0.scan``.

    Raises:
        UserError: the task looks ahead.
    """

    def __init__(self, task: TaggingNetwork) -> None:
        super().__init__()
        if not task.causal:
            raise UserError(
                "this model reads both ways and cannot run live: train one with model.backbone.bidirectional: none"
            )
        self.task = task
        self.train(task.training)

    def init_state(self, batch: int) -> State:
        """The state before the first frame."""
        device = self.task.head.weight.device
        parts = (
            self.task.stem.init_state(batch),
            self.task.backbone.init_state(batch),
            self.task.pooling.init_state(batch, device),
        )
        return {f"{name}.{k}": v for name, part in zip(STATE_PARTS, parts, strict=True) for k, v in part.items()}

    def forward(self, features: Tensor, state: State) -> tuple[TagScores, State]:
        """Hear the next frames; only the last chunk may end inside a frame group."""
        stem, backbone, pooling = (
            {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
            for name in STATE_PARTS
        )
        x, stem = self.task.stem(features, None, stem)
        y, backbone = self.task.backbone(x, backbone)
        logits = self.task.head(y)
        clip, pooling = self.task.pooling.advance(logits, y, pooling)
        parts = (stem, backbone, pooling)
        new_state = {f"{name}.{k}": v for name, part in zip(STATE_PARTS, parts, strict=True) for k, v in part.items()}
        return TagScores(logits, clip), new_state


class Tagger(ABC):
    """Samples in, scores out: features, model and pooling over a recording of any length, in constant memory.

    Args:
        task: in evaluation mode.
        input_rate: Hz, of the samples.
        block_frames: frames whose features are computed at once.

    Attributes:
        frames: the features (t, mel) that the last call made.
    """

    def __init__(self, task: TaggingNetwork, input_rate: int, block_frames: int) -> None:
        if task.training:
            raise ValueError("a stream needs the model in evaluation mode: call task.eval()")
        self.task = task
        self.input_rate = input_rate
        self._fbank = StreamingFbank(task.features, input_rate, block_frames)
        self.frames = torch.zeros(0, task.features.n_mels)

    def accept(self, samples: np.ndarray) -> list[TagScores]:
        """Take samples (n,) or (channels, n), any number of them, and give the scores that became ready, in order."""
        self.frames = self._fbank.accept(samples)
        return self._advance(self.frames) if len(self.frames) else []

    def flush(self) -> list[TagScores]:
        """End of the recording: the remaining scores."""
        self.frames = self._fbank.flush()
        return [*(self._advance(self.frames) if len(self.frames) else []), *self._end()]

    @abstractmethod
    def _advance(self, frames: Tensor) -> list[TagScores]: ...

    @abstractmethod
    def _end(self) -> list[TagScores]: ...


class LiveTagger(Tagger):
    """A causal model on a fixed grid of chunks: the same bytes for any packet sizes, equal to the whole clip's scores.

    Args:
        task: causal, in evaluation mode.
        input_rate: Hz, of the samples.
        chunk_s: seconds that the model hears at once, rounded to whole tokens, and the delay of its answers.
    """

    def __init__(self, task: TaggingNetwork, input_rate: int, chunk_s: float = 0.48) -> None:
        group = task.stem.frame_group
        self.chunk = group * max(1, round(chunk_s / task.token_s))  # frames
        super().__init__(task, input_rate, block_frames=min(self.chunk, 64))
        self._stream = Stream(StreamingTagger(task).eval(), self.chunk)

    def _advance(self, frames: Tensor) -> list[TagScores]:
        outputs: list[Any] = self._stream.advance(frames.unsqueeze(0).to(self.task.device))
        return outputs

    def _end(self) -> list[TagScores]:
        outputs: list[Any] = self._stream.flush()
        return outputs

    def snapshot(self) -> bytes:
        """All state, from the resampler to the pooling, as one safetensors blob: another process can go on with it."""
        parts = {"features": self._fbank.snapshot(), "model": self._stream.snapshot()}
        tensors = {name: torch.frombuffer(bytearray(blob), dtype=torch.uint8) for name, blob in parts.items()}
        return save(tensors, metadata={"format": SNAPSHOT_FORMAT, "input_rate": str(self.input_rate)})

    def restore(self, blob: bytes) -> None:
        """Go on from what :meth:`snapshot` gave.

        Raises:
            UserError: it is no such snapshot, or one of another model, chunk or sample rate.
        """
        about = _metadata(blob)
        if about.get("input_rate") != str(self.input_rate):
            raise UserError(f"the snapshot is of a stream at {about.get('input_rate')} Hz, not {self.input_rate}")
        try:
            parts = {name: tensor.numpy().tobytes() for name, tensor in load(blob).items()}
        except SafetensorError as error:
            raise UserError(f"the snapshot is damaged ({error}); take a new one") from error
        self._stream.restore(parts["model"])
        self._fbank.restore(parts["features"])


def _metadata(blob: bytes) -> dict[str, str]:
    try:
        size = int.from_bytes(blob[:8], "little")
        about = json.loads(blob[8 : 8 + size]).get("__metadata__", {})
    except (ValueError, AttributeError) as error:
        raise UserError("this is not a snapshot of a live tagger, or it is damaged") from error
    if about.get("format") != SNAPSHOT_FORMAT:
        raise UserError("this is not a snapshot of a live tagger")
    return about


class WindowTagger(Tagger):
    """A model that reads both ways, on windows with context to either side: exact for recordings of up to one window.

    Longer ones are read in windows whose outer parts serve as context and whose inner parts are joined; the clip's
    scores are pooled over all of it.

    Args:
        task: in evaluation mode.
        input_rate: Hz, of the samples.
        window_s: seconds a window, context included.
        context_s: seconds of it, at either side, whose scores come from the neighbouring windows.
    """

    def __init__(self, task: TaggingNetwork, input_rate: int, window_s: float = 30.0, context_s: float = 5.0) -> None:
        super().__init__(task, input_rate, block_frames=64)
        if not 0 <= 2 * context_s < window_s:
            raise UserError(f"a window of {window_s:g} s cannot hold two contexts of {context_s:g} s")
        group = task.stem.frame_group
        self.window = group * max(1, round(window_s / task.token_s))  # frames
        self.context = group * round(context_s / task.token_s)
        self._waiting = torch.zeros(0, task.features.n_mels)
        self._past = 0  # frames at the head of those waiting that are context alone
        self._pooled = task.pooling.init_state(1, task.head.weight.device)

    def _advance(self, frames: Tensor) -> list[TagScores]:
        self._waiting = torch.cat([self._waiting, frames])
        outputs = []
        # More than a window: the end of the recording is then not in this one.
        while len(self._waiting) > self.window:
            end = self.window - self.context
            outputs.append(self._run(self._waiting[: self.window], end))
            self._waiting = self._waiting[end - self.context :].clone()
            self._past = self.context
        return outputs

    def _end(self) -> list[TagScores]:
        if len(self._waiting) <= self._past:
            return []
        return [self._run(self._waiting, len(self._waiting))]

    @torch.inference_mode()
    def _run(self, frames: Tensor, end: int) -> TagScores:
        """Scores of the frames from the past context to ``end``."""
        task, group = self.task, self.task.stem.frame_group
        features = frames.unsqueeze(0).to(task.device)
        y, lengths = task.encode(features, torch.tensor([len(frames)], device=task.device))
        kept = slice(self._past // group, -(-end // group))
        logits, y = task.score(y, lengths)[0][:, kept], y[:, kept]
        clip, self._pooled = task.pooling.advance(logits, y, self._pooled)
        return TagScores(logits, clip)


def make_tagger(task: TaggingNetwork, input_rate: int, window_s: float = 30.0) -> Tagger:
    """The tagger for a file: one stream for a causal model, else windows."""
    if task.causal:
        return LiveTagger(task, input_rate, chunk_s=10.0)
    return WindowTagger(task, input_rate, window_s, context_s=window_s / 6)


class Listener:
    """Turns the scores of one recording into tags and events, as they come.

    Args:
        task: that gives the scores.
        threshold: probability from which any class is present; by default those tuned on validation.
        off_ratio: an event lasts while its class stays above so much of the threshold.
        min_duration_s: shorter events are dropped.
        max_gap_s: events of a class so close are one.
        smooth_s: events are made of means over so much.

    Attributes:
        on: (c,) the thresholds.
        detector: makes the events.
        last: (t, c) probabilities of the latest tokens.
        clip: (c,) those of all that was heard; None before anything was.
    """

    def __init__(
        self,
        task: TaggingNetwork,
        *,
        threshold: float | None = None,
        off_ratio: float = 0.6,
        min_duration_s: float = 0.2,
        max_gap_s: float = 0.3,
        smooth_s: float = 0.5,
    ) -> None:
        self.task = task
        on = np.array(task.thresholds if threshold is None else [threshold] * len(task.labels))
        if not 0 <= off_ratio <= 1 or (threshold is not None and not 0 < threshold <= 1):
            raise UserError("--threshold and --off-ratio must lie between 0 and 1")
        self.on = np.maximum(on, 1e-6)
        self.detector = EventDetector(
            task.labels, task.token_s, self.on, self.on * off_ratio, min_duration_s, max_gap_s, smooth_s
        )
        self.clip: NDArray[np.float64] | None = None
        self.last: NDArray[np.float64] = np.zeros((0, len(task.labels)))

    def hear(self, scores: Iterable[TagScores]) -> list[Change]:
        """What began and ended."""
        tables = []
        for one in scores:
            tables.append(self.task.probabilities(one.frames[0].double()).cpu().numpy())
            self.clip = self.task.probabilities(one.clip[0].double()).cpu().numpy()
        self.last = np.concatenate(tables) if tables else self.last[:0]
        return self.detector.accept(self.last)

    def tags(self, k: int) -> list[tuple[str, float, float]]:
        """Label, probability and threshold of the best k."""
        if self.clip is None:
            return []
        order = np.argsort(-self.clip, kind="stable")[:k]
        return [(self.task.labels[c], float(self.clip[c]), float(self.on[c])) for c in order]
