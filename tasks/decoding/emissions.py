"""What decoders have in common: what they give out, what may add to their scores, and how streams use them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

BLANK = 0


class Emission(NamedTuple):
    """A token: its id, the encoder frame that it was said at, counted from the stream's beginning, and the probability
    that it had there."""

    id: int
    frame: int
    confidence: float


class Decoder(Protocol):
    """Frames to tokens, as they come. The frames' packets do not matter: frame after frame is decoded by itself.

    reads: `log_probs` (t, v), float32, blank 0, as of CTC; `encoded` (t, d), as a transducer's joiner reads; or `best`,
    the best label of each frame and its log-probability, in place of log-probabilities.
    """

    reads: Literal["log_probs", "encoded", "best"]

    def advance(self, frames: Tensor | NDArray[np.float32]) -> None:
        """Decode the next frames."""

    def take(self) -> list[Emission]:
        """The tokens that will not change any more and have not been taken yet; they are forgotten."""

    @property
    def partial(self) -> list[Emission]:
        """The tokens of the best hypothesis behind the settled ones; the next frames may change them."""

    def settle(self) -> None:
        """Decide for the best hypothesis: all of its tokens are settled. The state goes on: nothing that follows is
        lost, a repeated token neither."""

    def finish(self) -> None:
        """Settle, and begin anew."""

    def state(self) -> dict[str, Any]:
        """All that the future depends on, and what has not been taken: plain data for JSON."""

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state of a decoder with the same settings."""


class Scorer(Protocol):
    """Adds to the scores of hypotheses, token by token: a language model, a list of words.

    States are plain: numbers, strings and tuples of them. Equal token sequences have equal states and sums.
    """

    def start(self) -> Any:
        """The state before the first token."""

    def extend(self, state: Any, token: int) -> tuple[Any, float]:
        """The state behind a token, and what it adds to the score, in nats."""

    def finish(self, state: Any) -> float:
        """What it would add if the text ended here."""


def frame_rows(frames: Tensor | NDArray[np.float32]) -> NDArray[np.float32]:
    """(t, v) float32 of a tensor on any device, or an array; raises ValueError for NaN and other shapes."""
    rows = frames.detach().float().cpu().numpy() if isinstance(frames, Tensor) else np.asarray(frames, np.float32)
    if rows.ndim != 2:
        raise ValueError(f"expected frames (t, v), got the shape {rows.shape}")
    if np.isnan(rows).any():
        raise ValueError("the log-probabilities hold NaN: the model or its input is broken")
    return rows


def plain(emissions: Sequence[Emission]) -> list[list[float]]:
    """For JSON; `emissions_of` reads it."""
    return [[int(one.id), int(one.frame), float(one.confidence)] for one in emissions]


def emissions_of(stored: Sequence[Sequence[float]]) -> list[Emission]:
    return [Emission(int(number), int(frame), float(confidence)) for number, frame, confidence in stored]


def tuples(value: Any) -> Any:
    """Lists to tuples, at any depth: what JSON makes of scorers' states."""
    return tuple(map(tuples, value)) if isinstance(value, list | tuple) else value
