"""Words and phrases that a beam search is to prefer."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from seqssm.errors import UserError


class Hotwords:
    """A `Scorer` that adds to the score with every character of a listed phrase, and takes it back when another
    character follows than the phrase has (an automaton after Aho and Corasick, 1975).

    Phrases count as whole words: `ann` is not preferred in `anna`. The automaton reads characters, so that it works
    with tokens of any kind and however they cut a word.

    Args:
        phrases: normalised phrases, or what each adds a character.
        tokens: the text of each token from id 1 on, with a space where a word begins (`Tokenizer.tokens`).
        boost: nats a character for phrases without a value of their own; negative ones make a phrase less likely.
    """

    def __init__(self, phrases: Sequence[str] | Mapping[str, float], tokens: Sequence[str], boost: float = 1.0) -> None:
        self._tokens = ["", *tokens]
        boosts = phrases if isinstance(phrases, Mapping) else dict.fromkeys(phrases, boost)
        known = set("".join(tokens))
        self._next: list[dict[str, int]] = [{}]
        self._last = [""]  # the character that leads to a node
        self._total = [0.0]  # what the characters up to a node add
        self._kept = [0.0]  # how much of it stays whatever follows: that of the longest phrase that ends on the way
        for phrase in sorted(boosts, key=len):
            text = " ".join(phrase.split())
            if not text:
                raise UserError("hotwords: a phrase is empty: remove it")
            if unknown := sorted(set(text) - known - {" "}):
                raise UserError(
                    f"hotwords: {phrase!r} has characters that the model does not know: {' '.join(map(repr, unknown))}"
                )
            self._add(f" {text} ", float(boosts[phrase]))
        self._fail = self._links()

    def _add(self, text: str, boost: float) -> None:
        at = 0
        for number, character in enumerate(text):
            if character not in self._next[at]:
                self._next[at][character] = len(self._next)
                self._next.append({})
                self._last.append(character)
                # the space that ends the word before is not the phrase's
                self._total.append(self._total[at] + (boost if number else 0.0))
                self._kept.append(self._kept[at])
            at = self._next[at][character]
        self._kept[at] = self._total[at]

    def _links(self) -> list[int]:
        """Where to go on from each node when a character does not fit: the longest suffix that begins a phrase."""
        fail = [0] * len(self._next)
        queue = deque(self._next[0].values())
        while queue:
            at = queue.popleft()
            for character, child in self._next[at].items():
                back = fail[at]
                while back and character not in self._next[back]:
                    back = fail[back]
                fail[child] = self._next[back].get(character, 0)
                queue.append(child)
        return fail

    def start(self) -> int:
        return self._step(0, " ")[0]

    def extend(self, state: int, token: int) -> tuple[int, float]:
        added = 0.0
        for character in self._tokens[token]:
            state, more = self._step(state, character)
            added += more
        return state, added

    def finish(self, state: int) -> float:
        state, added = self._step(state, " ")
        return added - self._total[state] + self._kept[state]

    def _step(self, state: int, character: str) -> tuple[int, float]:
        """The node behind a character, and what changes in the score."""
        if character == self._last[state] == " ":
            return state, 0.0  # one space more or less
        at, added = state, 0.0
        while at and character not in self._next[at]:
            added += self._kept[at] - self._total[at] + self._total[self._fail[at]]
            at = self._fail[at]
        child = self._next[at].get(character, 0)
        return child, added + self._total[child] - self._total[at]
