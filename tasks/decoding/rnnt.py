"""Transducers (Graves, 2012): greedy decoding and beam search of encoder frames, in streams.

Decoding knows the model by two functions: the predictor, tokens (b, context) int64 -> (b, d), with blanks for what
precedes the first token, and the joiner, encoder frames (b, d_enc) and the predictor's (b, d) -> logits (b, v).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from seqssm.tasks.decoding.beams import NEVER, Beam, Hypothesis, log_add
from seqssm.tasks.decoding.emissions import BLANK, Emission, Scorer, emissions_of, plain

Predictor = Callable[[Tensor], Tensor]
Joiner = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Transducer:
    """The parts of a model that decoding calls, and how many tokens back the predictor sees."""

    predictor: Predictor
    joiner: Joiner
    context: int = 2


def _frames(frames: Tensor | NDArray[np.float32]) -> Tensor:
    encoded = frames if isinstance(frames, Tensor) else torch.from_numpy(frames)
    if encoded.ndim != 2:
        raise ValueError(f"expected encoder frames (t, d), got the shape {tuple(encoded.shape)}")
    if torch.isnan(encoded).any():
        raise ValueError("the encoder's output holds NaN: the model or its input is broken")
    return encoded


class GreedyRNNT:
    """The best label again and again, until it is the blank: everything is settled at once.

    Args:
        model: predictor and joiner.
        symbols: tokens that one frame may say.
    """

    reads: Literal["log_probs", "encoded", "best"] = "encoded"

    def __init__(self, model: Transducer, symbols: int = 5) -> None:
        if symbols < 1:
            raise ValueError(f"symbols must be positive, got {symbols}")
        self.model, self.symbols = model, symbols
        self._settled: list[Emission] = []
        self._start()

    def _start(self) -> None:
        self._context = (BLANK,) * self.model.context
        self._predicted: Tensor | None = None
        self._frame = 0

    @torch.inference_mode()
    def advance(self, frames: Tensor | NDArray[np.float32]) -> None:
        """Decode encoder frames (t, d)."""
        for frame in _frames(frames):
            for _ in range(self.symbols):
                if self._predicted is None:
                    self._predicted = self.model.predictor(torch.tensor([self._context], device=frame.device))
                row = self.model.joiner(frame[None], self._predicted)[0].float().log_softmax(-1)
                token = int(row.argmax())
                if token == BLANK:
                    break
                self._settled.append(Emission(token, self._frame, math.exp(float(row[token]))))
                self._context, self._predicted = (*self._context[1:], token), None
            self._frame += 1

    def take(self) -> list[Emission]:
        taken, self._settled = self._settled, []
        return taken

    @property
    def partial(self) -> list[Emission]:
        """Always empty."""
        return []

    def settle(self) -> None:
        """All is settled."""

    def finish(self) -> None:
        self._start()

    def state(self) -> dict[str, Any]:
        return {"context": list(self._context), "frame": self._frame, "settled": plain(self._settled)}

    def load(self, state: dict[str, Any]) -> None:
        self._context, self._predicted = tuple(int(token) for token in state["context"]), None
        self._frame, self._settled = int(state["frame"]), emissions_of(state["settled"])


@dataclass(frozen=True)
class RNNTBeamConfig:
    """Of the transducer's beam search.

    Args:
        size: hypotheses kept.
        symbols: tokens that one frame may say.
        margin: hypotheses worse than the best by more nats are given up.
        pending: tokens that may be unsettled.
    """

    size: int = 4
    symbols: int = 3
    margin: float = 14.0
    pending: int = 64


class BeamRNNT(Beam):
    """Time-synchronous beam search (Saon et al., 2020, algorithm 1) as a `Decoder`: in each frame hypotheses say up to
    `symbols` tokens and then a blank; alignments of the same tokens are summed.

    Args:
        model: predictor and joiner.
        config: sizes.
        scorers: a language model, words to prefer.
    """

    reads: Literal["log_probs", "encoded", "best"] = "encoded"

    def __init__(self, model: Transducer, config: RNNTBeamConfig | None = None, scorers: Sequence[Scorer] = ()) -> None:
        self.model, self.config = model, config or RNNTBeamConfig()
        if self.config.symbols < 1:
            raise ValueError(f"symbols must be positive, got {self.config.symbols}")
        super().__init__(self.config.size, scorers, self.config.pending, self.config.margin)

    @torch.inference_mode()
    def advance(self, frames: Tensor | NDArray[np.float32]) -> None:
        """Decode encoder frames (t, d)."""
        for frame in _frames(frames):
            self.keep(self._behind(frame))

    def _behind(self, frame: Tensor) -> list[Hypothesis]:
        ended: dict[tuple[int, ...], Hypothesis] = {}
        going = self.hypotheses
        for said in range(self.config.symbols + 1):
            rows = self._log_probs(frame, going)
            for one, row in zip(going, rows, strict=True):
                _merge(ended, _with(one, one.ids, one.emissions, one.bonus, one.states, float(row[BLANK])))
            if said == self.config.symbols:
                break
            going = self._said(going, rows)
            # what says more only loses probability, but for what the scorers add
            level = sorted((one.score for one in ended.values()), reverse=True)[: self.size]
            least = level[-1] if len(level) == self.size else level[0] - self.margin
            going = [one for one in going if self.scorers or one.score > least]
            if not going:
                break
        return list(ended.values())

    def _said(self, going: Sequence[Hypothesis], rows: NDArray[np.float32]) -> list[Hypothesis]:
        """The best hypotheses behind one more token."""
        found: dict[tuple[int, ...], Hypothesis] = {}
        for one, row in zip(going, rows, strict=True):
            for token in np.argsort(-row, kind="stable")[: self.size + 1].tolist():
                if token == BLANK:
                    continue
                log_prob = float(row[token])
                bonus, states = self.extended(one, token)
                emissions = (*one.emissions, Emission(token, self.frame, math.exp(log_prob)))
                _merge(found, _with(one, (*one.ids, token), emissions, bonus, states, log_prob))
        return sorted(found.values(), key=lambda one: (-one.score, one.ids))[: self.size]

    def _log_probs(self, frame: Tensor, hypotheses: Sequence[Hypothesis]) -> NDArray[np.float32]:
        """(h, v): in a batch of a fixed shape, as products of other shapes round differently."""
        contexts = [self.last_tokens(one, self.model.context) for one in hypotheses]
        contexts += contexts[:1] * (self.size - len(contexts))
        predicted = self.model.predictor(torch.tensor(contexts, device=frame.device))
        logits = self.model.joiner(frame.expand(self.size, -1), predicted)
        return logits.float().log_softmax(-1).cpu().numpy()[: len(hypotheses)]


def _with(
    one: Hypothesis,
    ids: tuple[int, ...],
    emissions: tuple[Emission, ...],
    bonus: float,
    states: tuple[Any, ...],
    log_prob: float,
) -> Hypothesis:
    return Hypothesis(ids, emissions, one.blank + log_prob, NEVER, one.path + log_prob, bonus, states)


def _merge(found: dict[tuple[int, ...], Hypothesis], one: Hypothesis) -> None:
    """Add up alignments of the same tokens; the times are the better one's."""
    known = found.setdefault(one.ids, one)
    if known is not one:
        known.blank = log_add(known.blank, one.blank)
        if one.path > known.path:
            known.path, known.emissions = one.path, one.emissions
