"""CTC: greedy decoding, whose output only ever grows, and prefix beam search (Hannun et al., 2014), in streams.

Whole recordings are decoded by the same code: `decode`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from seqssm.tasks.decoding.beams import NEVER, Beam, Hypothesis, log_add
from seqssm.tasks.decoding.emissions import BLANK, Decoder, Emission, Scorer, emissions_of, frame_rows, plain


@dataclass
class GreedyState:
    """The last label, a blank included, and the frames seen; plain data."""

    last: int = BLANK
    frame: int = 0


BestLabels = Sequence[tuple[int, float]]
"""Of each frame: the best label, and its log-probability."""


def best_labels(log_probs: Tensor | NDArray[np.float32]) -> BestLabels:
    """Of frames (t, v)."""
    rows = frame_rows(log_probs)
    return list(zip(rows.argmax(1).tolist(), rows.max(1).tolist(), strict=True)) if len(rows) else []


def greedy_advance(best: BestLabels, state: GreedyState) -> list[Emission]:
    """New tokens of the next frames: repeats merged, blanks dropped.

    The state, advanced in place, makes the tokens independent of how frames come in packets.
    """
    emissions, last, frame = [], state.last, state.frame
    for label, log_prob in best:
        if math.isnan(log_prob):
            raise ValueError("the log-probabilities hold NaN: the model or its input is broken")
        if label != BLANK and label != last:
            emissions.append(Emission(label, frame, math.exp(log_prob)))
        last = label
        frame += 1
    state.last, state.frame = last, frame
    return emissions


class GreedyCTC:
    """Greedy decoding as a `Decoder`: everything is settled at once."""

    reads: Literal["log_probs", "encoded", "best"] = "best"

    def __init__(self) -> None:
        self._state = GreedyState()
        self._settled: list[Emission] = []

    def advance(self, frames: Tensor | NDArray[np.float32] | BestLabels) -> None:
        """Decode the best labels, or log-probabilities (t, v)."""
        best = best_labels(frames) if isinstance(frames, Tensor | np.ndarray) else frames
        self._settled += greedy_advance(best, self._state)

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
        self._state = GreedyState()

    def state(self) -> dict[str, Any]:
        return {"last": self._state.last, "frame": self._state.frame, "settled": plain(self._settled)}

    def load(self, state: dict[str, Any]) -> None:
        self._state = GreedyState(int(state["last"]), int(state["frame"]))
        self._settled = emissions_of(state["settled"])


@dataclass(frozen=True)
class BeamConfig:
    """Of CTC prefix beam search.

    Args:
        size: hypotheses kept.
        tokens: tokens tried in a frame, the best ones.
        token_margin: tokens less likely by so many nats than the best label of a frame are not tried.
        margin: hypotheses worse than the best by more nats are given up.
        pending: tokens that may be unsettled.
    """

    size: int = 8
    tokens: int = 20
    token_margin: float = 8.0
    margin: float = 14.0
    pending: int = 64


@dataclass
class _Next:
    """Hypotheses behind a frame, by their tokens."""

    found: dict[tuple[int, ...], Hypothesis] = field(default_factory=dict)

    def at(self, ids: tuple[int, ...], bonus: float, states: tuple[Any, ...]) -> Hypothesis:
        one = self.found.get(ids)
        if one is None:
            one = self.found[ids] = Hypothesis(ids, (), NEVER, NEVER, NEVER, bonus, states)
        return one


class BeamCTC(Beam):
    """Prefix beam search as a `Decoder`: the probability of a token sequence is that of all its alignments.

    Args:
        config: sizes.
        scorers: a language model, words to prefer.
    """

    reads: Literal["log_probs", "encoded", "best"] = "log_probs"

    def __init__(self, config: BeamConfig | None = None, scorers: Sequence[Scorer] = ()) -> None:
        self.config = config or BeamConfig()
        super().__init__(self.config.size, scorers, self.config.pending, self.config.margin)

    def advance(self, frames: Tensor | NDArray[np.float32]) -> None:
        """Decode log-probabilities (t, v)."""
        for row in frame_rows(frames):
            self.keep(list(self._behind(row).found.values()))

    def _tried(self, row: NDArray[np.float32]) -> list[tuple[int, float]]:
        """Tokens to extend hypotheses by, and their log-probabilities."""
        likely = np.flatnonzero(row >= row.max() - self.config.token_margin)
        likely = likely[likely != BLANK]
        if len(likely) > self.config.tokens:
            likely = likely[np.argsort(-row[likely], kind="stable")[: self.config.tokens]]
        return [(int(token), float(row[token])) for token in likely]

    def _behind(self, row: NDArray[np.float32]) -> _Next:
        blank, tried, behind = float(row[BLANK]), self._tried(row), _Next()
        for one in self.hypotheses:
            total = log_add(one.blank, one.token)
            last = one.ids[-1] if one.ids else self.last_tokens(one, 1)[0]
            said = float(row[last]) if last != BLANK else NEVER
            # the same tokens: a blank, or the last one going on
            same = behind.at(one.ids, one.bonus, one.states)
            same.blank = log_add(same.blank, total + blank)
            same.token = log_add(same.token, one.token + said)
            _align(same, one.path + max(blank, said if one.token > NEVER else NEVER), one.emissions)
            for token, log_prob in tried:
                # a token follows its like only behind a blank
                before = one.blank if token == last else total
                if before == NEVER:
                    continue
                ids = (*one.ids, token)
                known = behind.found.get(ids)
                bonus, states = self.extended(one, token) if known is None else (known.bonus, known.states)
                more = behind.at(ids, bonus, states)
                more.token = log_add(more.token, before + log_prob)
                emission = Emission(token, self.frame, math.exp(log_prob))
                _align(more, one.path + log_prob, (*one.emissions, emission))
        return behind


def _align(one: Hypothesis, path: float, emissions: tuple[Emission, ...]) -> None:
    """Keep the better alignment."""
    if path >= one.path:
        one.path, one.emissions = path, emissions


def decode(decoder: Decoder, frames: Tensor | NDArray[np.float32]) -> list[Emission]:
    """The tokens of a whole recording; the decoder is as new afterwards."""
    decoder.advance(frames)
    decoder.finish()
    return decoder.take()
