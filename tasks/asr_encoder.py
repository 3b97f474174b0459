"""A recogniser's step for a table of live streams: chunks of sound in, log-probabilities out, states carried."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seqssm.backbone import Backbone
from seqssm.data.features import fbank
from seqssm.mixers import State
from seqssm.tasks.asr_layers import SUBSAMPLING
from seqssm.tasks.asr_network import ASRNetwork

STATE_PARTS = ("subsampling", "backbone", "lookahead", "upper")
OPEN_END = 2**62
"""Tokens of a stream that has not ended yet."""


class StreamingEncoder(nn.Module):
    """Chunks of samples to encoded tokens and CTC log-probabilities, for a table of streams with states.

    The output lags behind the input by the lookahead. A row's output depends on that row alone.

    Args:
        task: in evaluation mode.
        chunk: tokens a chunk.
    """

    def __init__(self, task: ASRNetwork, chunk: int) -> None:
        super().__init__()
        self.task, self.chunk = task, chunk
        config = task.features
        self.step_samples = chunk * SUBSAMPLING * config.hop_samples
        self.span_samples = self.step_samples - config.hop_samples + config.frame_samples
        # Where a lookahead is no multiple of the chunk, the upper layers begin in the middle of one.
        self._ragged = any(delay % chunk for delay in task.lookahead.menu)
        self.train(task.training)

    def init_state(self, batch: int) -> State:
        """The state before the first sample."""
        task = self.task
        parts = (
            task.subsampling.init_state(batch),
            task.backbone.init_state(batch),
            task.lookahead.init_state(batch),
            {} if task.upper is None else task.upper.init_state(batch),
        )
        return {f"{name}.{k}": v for name, part in zip(STATE_PARTS, parts, strict=True) for k, v in part.items()}

    @torch.no_grad()
    def forward(
        self, samples: Tensor, frames: Tensor, position: Tensor, total: Tensor, choice: Tensor, state: State
    ) -> tuple[Tensor, Tensor]:
        """Advance the rows whose ``position`` is not negative, and their state in place.

        Args:
            samples: (b, span) at the model's rate.
            frames: (b,) of them that are real; fewer than a chunk's at the end of a stream alone.
            position: (b,) tokens read before; -1 for a row that waits.
            total: (b,) tokens of the whole stream, ``OPEN_END`` until they are known.
            choice: (b,) position in the task's ``lookahead_ms``.
            state: of all rows.

        Returns:
            encoded (b, c, d) and log-probabilities (b, c, v). Column i is the token ``position - lookahead + i``, if
            there is one. What comes out of rows that wait means nothing.
        """
        task, device = self.task, samples.device
        split: dict[str, State] = {name: {} for name in STATE_PARTS}
        for key, value in state.items():
            name, _, own = key.partition(".")
            split[name][own] = value
        stem, below, ahead, above = split.values()
        active = position >= 0
        features = fbank(samples, task.features)
        padding = torch.arange(features.shape[1], device=device) >= frames[:, None]
        x, new = task.subsampling(features.masked_fill(padding[..., None], 0), stem)
        _update(stem, new, active)
        x = _advance(task.backbone, x, below, active)
        column = torch.arange(self.chunk, device=device)
        y, new = task.lookahead.advance(x, choice, position[:, None] + column < total[:, None], ahead)
        _update(ahead, new, active)
        if task.upper is not None:
            index = position[:, None] - task.lookahead.delays[choice][:, None] + column  # (b, c) tokens
            begun = (index >= 0).to(torch.int32) if self._ragged else None
            y = _advance(task.upper, y, above, active & (index[:, -1] >= 0), begun)
        return y, task.score(y)


def _advance(backbone: Backbone, x: Tensor, state: State, active: Tensor, seq_idx: Tensor | None = None) -> Tensor:
    """x (b, c, d) through a backbone in the rows that are active, and their state in place; anything in the others."""
    if backbone.rows_are_apart(x) and not active.all():
        rows = active.nonzero()[:, 0]
        out = torch.zeros_like(x)
        if len(rows):
            some = {key: value[rows] for key, value in state.items()}
            out[rows], some = backbone(x[rows], some, seq_idx=None if seq_idx is None else seq_idx[rows])
            for key, value in some.items():
                state[key][rows] = value
        return out
    out, new = backbone(x, state, seq_idx=seq_idx)
    _update(state, new, active)
    return out


def _update(state: State, new: State, active: Tensor) -> None:
    """Write the new state in the rows that are active."""
    everyone = active.device.type == "cpu" and bool(active.all())  # on a GPU, to ask would be to wait
    for key, value in new.items():
        old = state[key]
        old.copy_(value if everyone else torch.where(active.view(-1, *(1,) * (value.dim() - 1)), value, old))


class TableStep:
    """A table's step: :class:`StreamingEncoder` on memory that stays where it is, on a GPU as one CUDA graph.

    Hundreds of launches a step would take longer than what they do. The graph is made in the first call.

    Attributes:
        samples: (slots, span) that the next step reads, to be written to; on the CPU.
        about: (4, slots) likewise: frames, position, total and choice of each row. A row at position -1 waits.
        state: of all slots.
    """

    def __init__(self, encoder: StreamingEncoder, slots: int) -> None:
        self._encoder, self._device = encoder, encoder.task.device
        self._on_gpu = self._device.type == "cuda"
        samples = torch.zeros(slots, encoder.span_samples, pin_memory=self._on_gpu)
        about = torch.zeros(4, slots, dtype=torch.int64, pin_memory=self._on_gpu)
        self.samples, self.about = samples.numpy(), about.numpy()
        self._from = samples, about
        self._inputs = (
            tuple(torch.empty_like(x, device=self._device) for x in self._from) if self._on_gpu else self._from
        )
        self.state = encoder.init_state(slots)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outputs: tuple[Tensor, Tensor] | None = None

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Advance the state; gives encoded (slots, c, d) and log-probabilities (slots, c, v), for now."""
        if not self._on_gpu:
            return self._run()
        for to, source in zip(self._inputs, self._from, strict=True):
            to.copy_(source, non_blocking=True)
        if self._graph is None:
            self._capture()
        assert self._graph is not None
        assert self._outputs is not None
        self._graph.replay()
        return self._outputs

    def _run(self) -> tuple[Tensor, Tensor]:
        samples, about = self._inputs
        return self._encoder(samples, *about, self.state)

    def _capture(self) -> None:
        before = {key: value.clone() for key, value in self.state.items()}
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # whatever is compiled or chosen at first use must be so before
                self._run()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # On a stream of its own: graphs that are captured on one share cuBLAS's workspace, also with other tables', and
        # must then not run side by side, nor outlive one another (github.com/pytorch/pytorch/issues/193402).
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._outputs = self._run()
        for key, value in before.items():
            self.state[key].copy_(value)
