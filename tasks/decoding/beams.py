"""Hypotheses of a beam, what they agree upon, and a stream's bookkeeping: shared by CTC and the transducer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from seqssm.tasks.decoding.emissions import BLANK, Emission, Scorer, emissions_of, plain, tuples

NEVER = -math.inf


def log_add(a: float, b: float) -> float:
    """log(exp a + exp b)."""
    if a < b:
        a, b = b, a
    return a if b == NEVER else a + math.log1p(math.exp(b - a))


@dataclass
class Hypothesis:
    """A token sequence behind what is settled.

    ids: the tokens. emissions: the same with times, along the best alignment found. blank, token: log-probability of
    all alignments that end in a blank and in the last token (a transducer has the first alone). path: that of the best
    alignment. bonus: sum of what the scorers add; states: theirs.
    """

    ids: tuple[int, ...]
    emissions: tuple[Emission, ...]
    blank: float
    token: float
    path: float
    bonus: float
    states: tuple[Any, ...]

    @property
    def score(self) -> float:
        return log_add(self.blank, self.token) + self.bonus


class Beam:
    """The hypotheses of a stream, of which the beginning that all share is settled.

    Args:
        size: hypotheses kept.
        scorers: what adds to their scores.
        pending: tokens that may be unsettled; beyond, the best hypothesis decides about the oldest, so that the state
            and the delay stay bounded.
        margin: hypotheses worse than the best by more nats are given up: in clear speech they would only delay it.
    """

    def __init__(self, size: int, scorers: Sequence[Scorer], pending: int, margin: float) -> None:
        if size < 1 or pending < 1:
            raise ValueError(f"size and pending must be positive, got {size} and {pending}")
        self.size, self.scorers, self.pending, self.margin = size, tuple(scorers), pending, margin
        self.reset()

    def reset(self) -> None:
        """Begin anew; what was settled can still be taken."""
        start = tuple(scorer.start() for scorer in self.scorers)
        self.hypotheses = [Hypothesis((), (), 0.0, NEVER, 0.0, 0.0, start)]
        self.frame = 0
        self.history: tuple[int, ...] = ()  # settled tokens that the next ones depend on, latest last
        self._settled: list[Emission] = getattr(self, "_settled", [])
        self._last_frame = 0

    @property
    def best(self) -> Hypothesis:
        return self.hypotheses[0]

    @property
    def partial(self) -> list[Emission]:
        """Of the best hypothesis; see `Decoder`."""
        return self._in_order(self.best.emissions)

    def take(self) -> list[Emission]:
        """See `Decoder`."""
        taken, self._settled = self._settled, []
        return taken

    def extended(self, hypothesis: Hypothesis, token: int) -> tuple[float, tuple[Any, ...]]:
        """Bonus and scorers' states behind one more token."""
        if not self.scorers:
            return hypothesis.bonus, ()
        bonus, states = hypothesis.bonus, []
        for scorer, state in zip(self.scorers, hypothesis.states, strict=True):
            state, more = scorer.extend(state, token)
            states.append(state)
            bonus += more
        return bonus, tuple(states)

    def keep(self, hypotheses: Sequence[Hypothesis]) -> None:
        """Of the hypotheses behind another frame, keep the best, and settle what they share."""
        # Ties go to the sequence that is less, not to the one that was found first.
        scored = sorted(((-one.score, one.ids, one) for one in hypotheses), key=lambda entry: entry[:2])[: self.size]
        kept = [one for cost, _, one in scored if cost <= scored[0][0] + self.margin]
        if (beyond := max(len(one.ids) for one in kept) - self.pending) > 0:
            oldest = kept[0].ids[:beyond]
            kept = [one for one in kept if one.ids[: len(oldest)] == oldest]
        # Scores of hours stay small, and as exact as those of seconds.
        level, paths, bonus = log_add(kept[0].blank, kept[0].token), kept[0].path, kept[0].bonus
        for one in kept:
            one.blank, one.token, one.path, one.bonus = (
                one.blank - level,
                one.token - level,
                one.path - paths,
                one.bonus - bonus,
            )
        self.hypotheses = kept
        self.frame += 1
        shared = 0
        while all(shared < len(one.ids) and one.ids[shared] == kept[0].ids[shared] for one in kept):
            shared += 1
        self._settle(shared)

    def settle(self) -> None:
        """See `Decoder`."""

        def ended(one: Hypothesis) -> float:
            ends = (scorer.finish(state) for scorer, state in zip(self.scorers, one.states, strict=True))
            return one.score + sum(ends)

        self.hypotheses = [min(self.hypotheses, key=lambda one: (-ended(one), one.ids))]
        self._settle(len(self.best.ids))

    def finish(self) -> None:
        """See `Decoder`."""
        self.settle()
        self.reset()

    def _settle(self, count: int) -> None:
        if not count:
            return
        self._settled += self._in_order(self.best.emissions[:count])
        self._last_frame = self._settled[-1].frame
        self.history = (*self.history, *self.best.ids[:count])[-8:]
        for one in self.hypotheses:
            one.ids, one.emissions = one.ids[count:], one.emissions[count:]

    def _in_order(self, emissions: Sequence[Emission]) -> list[Emission]:
        """Hypotheses align their common beginning differently: no token comes before the one that it follows."""
        out, last = [], self._last_frame
        for one in emissions:
            last = max(last, one.frame)
            out.append(one._replace(frame=last))
        return out

    def last_tokens(self, hypothesis: Hypothesis, count: int) -> tuple[int, ...]:
        """The last tokens of the whole sequence, oldest first, the blank standing for what precedes the first."""
        return ((BLANK,) * count + self.history + hypothesis.ids)[-count:]

    def state(self) -> dict[str, Any]:
        """See `Decoder`."""
        rows = [
            {
                "emissions": plain(one.emissions),
                # JSON has no infinity
                "scores": [x if x != NEVER else None for x in (one.blank, one.token, one.path, one.bonus)],
                "states": list(one.states),
            }
            for one in self.hypotheses
        ]
        return {
            "hypotheses": rows,
            "frame": self.frame,
            "history": list(self.history),
            "settled": plain(self._settled),
            "last_frame": self._last_frame,
        }

    def load(self, state: dict[str, Any]) -> None:
        """See `Decoder`."""
        self.hypotheses = []
        for row in state["hypotheses"]:
            emissions = tuple(emissions_of(row["emissions"]))
            blank, token, path, bonus = (NEVER if x is None else float(x) for x in row["scores"])
            ids = tuple(one.id for one in emissions)
            self.hypotheses.append(Hypothesis(ids, emissions, blank, token, path, bonus, tuples(row["states"])))
        self.frame, self.history = int(state["frame"]), tuple(state["history"])
        self._settled, self._last_frame = emissions_of(state["settled"]), int(state["last_frame"])
