"""Tokens to words with times and confidences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from seqssm.tasks.decoding.emissions import Emission

LONGEST_TOKEN_S = 0.4  # that a word's last token is taken to last


@dataclass(frozen=True)
class Word:
    """text, start_s and end_s in the recording, and confidence: the geometric mean of the tokens' probabilities."""

    text: str
    start_s: float
    end_s: float
    confidence: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class TimedToken:
    """A token's text with a space where a word begins, its time and its confidence."""

    text: str
    start_s: float
    end_s: float
    confidence: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def timed_tokens(
    emissions: Sequence[Emission], tokens: Sequence[str], token_s: float, duration_s: float = math.inf
) -> list[TimedToken]:
    """When each token was said: from its frame on until the next one's, and 0.4 s at most. Never past the end.

    Args:
        emissions: in order.
        tokens: the text of each token from id 1 on (`Tokenizer.tokens`).
        token_s: seconds from one encoder frame to the next.
        duration_s: of the recording, as far as it is known.
    """
    starts = [min(one.frame * token_s, duration_s) for one in emissions]
    timed = []
    for number, (one, start_s) in enumerate(zip(emissions, starts, strict=True)):
        after_s = starts[number + 1] if number + 1 < len(starts) else math.inf
        end_s = min(max(after_s, start_s), start_s + LONGEST_TOKEN_S, duration_s)
        timed.append(TimedToken(tokens[one.id - 1], start_s, end_s, min(one.confidence, 1.0)))
    return timed


def words(
    emissions: Sequence[Emission], tokens: Sequence[str], token_s: float, duration_s: float = math.inf
) -> list[Word]:
    """The words that tokens spell, as spaces separate them; arguments as of `timed_tokens`.

    Joined by spaces they are the decoded text, runs of spaces being one.
    """
    found: list[Word] = []
    spelled: list[TimedToken] = []
    for token in timed_tokens(emissions, tokens, token_s, duration_s):
        first, *rest = token.text.split(" ")
        if first:
            spelled.append(_part(token, first))
        for part in rest:
            found += _word(spelled)
            spelled = [_part(token, part)] if part else []
    return found + _word(spelled)


def span(
    emissions: Sequence[Emission], tokens: Sequence[str], token_s: float, duration_s: float = math.inf
) -> tuple[float, float] | None:
    """When the first of `words` begins and the last one ends, without all that lies between; None without words."""
    said = (i for i, one in enumerate(emissions) if tokens[one.id - 1].strip())
    first = next(said, None)
    if first is None:
        return None
    last = next(i for i in range(len(emissions) - 1, -1, -1) if tokens[emissions[i].id - 1].strip())
    end = timed_tokens(emissions[last : last + 2], tokens, token_s, duration_s)[0].end_s
    return min(emissions[first].frame * token_s, duration_s), end


def _part(token: TimedToken, text: str) -> TimedToken:
    return TimedToken(text, token.start_s, token.end_s, token.confidence)


def _word(spelled: Sequence[TimedToken]) -> list[Word]:
    if not spelled:
        return []
    log_probs = [math.log(max(token.confidence, 1e-30)) for token in spelled]
    confidence = math.exp(sum(log_probs) / len(log_probs))
    return [Word("".join(t.text for t in spelled), spelled[0].start_s, spelled[-1].end_s, min(confidence, 1.0))]
