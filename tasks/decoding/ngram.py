"""N-gram language models: ARPA files, their scores in a beam search (shallow fusion), and small ones from texts."""

from __future__ import annotations

import bisect
import functools
import gzip
import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from seqssm.errors import UserError
from seqssm.files import atomic_write

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
LN_10 = math.log(10)
MISSING_LOG10 = -7.0  # of a word that a model without <unk> does not know
OUTSIDE = "\0"  # in place of a word that no known word begins like

Grams = dict[tuple[int, ...], tuple[float, float]]


class NGram:
    """A back-off model (Katz, 1987) as an ARPA file holds it.

    Args:
        words: ids by word.
        grams: for each n-gram of ids its log-probability and back-off weight, in nats.
        order: the longest n.
    """

    def __init__(self, words: Mapping[str, int], grams: Grams, order: int) -> None:
        self.words, self._grams, self.order = dict(words), grams, order
        self.unknown = self.words.get(UNKNOWN, self.words.get("<UNK>", -1))

    def word(self, text: str) -> int:
        """The id of a word; that of unknown words, which may be -1, for others."""
        return self.words.get(text, self.unknown)

    def start(self) -> tuple[int, ...]:
        """The context at the beginning of a sentence."""
        return (self.words[BEGIN],) if BEGIN in self.words and self.order > 1 else ()

    def score(self, context: tuple[int, ...], word: int) -> tuple[tuple[int, ...], float]:
        """The context behind a word, and log P(word | context) in nats."""
        penalty, history = 0.0, context
        while True:
            found = self._grams.get((*history, word))
            if found is not None or not history:
                break
            penalty += self._grams.get(history, (0.0, 0.0))[1]
            history = history[1:]
        log_prob = MISSING_LOG10 * LN_10 if found is None else found[0]
        behind = (*context, word)[-(self.order - 1) :] if self.order > 1 else ()
        # the shortest context that says the same: fewer states, and equal ones meet
        while behind and behind not in self._grams:
            behind = behind[1:]
        return behind, penalty + log_prob

    def sentence(self, words: Iterable[str]) -> float:
        """Log-probability in nats of a sentence and its end."""
        context, total = self.start(), 0.0
        for text in [*words, *([END] if END in self.words else [])]:
            context, more = self.score(context, self.word(text))
            total += more
        return total

    def draw(self, rng: random.Random, longest: int = 100) -> list[str]:
        """The words of a sentence drawn from the model, known ones alone; cut behind ``longest``."""
        names = {number: word for word, number in self.words.items()}
        sentence: list[str] = []
        context, end = self.start(), self.words.get(END, -1)
        while len(sentence) < longest:
            word = self._draw_word(context, rng)
            if word == end:
                break
            sentence.append(names[word])
            context = self.score(context, word)[0]
        return sentence

    def _draw_word(self, context: tuple[int, ...], rng: random.Random) -> int:
        words, sums = self._followers.get(context, ([], []))
        if not context:
            return rng.choices(words, cum_weights=sums)[0]
        place = bisect.bisect_right(sums, rng.random())
        if place < len(words):
            return words[place]
        # The rest of the probability is that of the shorter context, among the words that are not here.
        here = set(words)
        for _ in range(1000):
            word = self._draw_word(context[1:], rng)
            if word not in here:
                return word
        return words[-1]  # rounding alone was left

    @functools.cached_property
    def _followers(self) -> dict[tuple[int, ...], tuple[list[int], list[float]]]:
        """The words that are listed behind each context, and the running sums of their probabilities."""
        never = {self.words.get(BEGIN), self.unknown}
        followers: dict[tuple[int, ...], tuple[list[int], list[float]]] = {}
        for gram, (log_prob, _) in self._grams.items():
            if gram[-1] not in never:
                words, sums = followers.setdefault(gram[:-1], ([], []))
                words.append(gram[-1])
                sums.append((sums[-1] if sums else 0.0) + math.exp(log_prob))
        return followers

    # ---- files -------------------------------------------------------------------------------------------------------

    @classmethod
    def read(cls, path: str | Path) -> NGram:
        """Read an ARPA file, plain or gzipped.

        Raises:
            UserError: naming the line that is broken, or the order that does not have as many n-grams as the header
                says.
        """
        path = Path(path)
        try:
            lines = _lines(path)
            return cls(*_parse(lines, path))
        except (OSError, EOFError) as error:
            raise UserError(
                f"cannot read the n-gram model {path}: {getattr(error, 'strerror', '') or error}"
            ) from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not an ARPA file in UTF-8 (binary models are not read): {error}") from error

    def write(self, path: str | Path) -> None:
        """Write an ARPA file, in order of the words; gzipped where the name ends in .gz."""
        names = {number: word for word, number in self.words.items()}
        by_order = [sorted(gram for gram in self._grams if len(gram) == n) for n in range(1, self.order + 1)]
        lines = ["\\data\\", *(f"ngram {n}={len(grams)}" for n, grams in enumerate(by_order, 1))]
        for n, grams in enumerate(by_order, 1):
            lines += ["", f"\\{n}-grams:"]
            for gram in grams:
                log_prob, back_off = (value / LN_10 for value in self._grams[gram])
                text = " ".join(names[number] for number in gram)
                lines.append(f"{log_prob:.6f}\t{text}" + (f"\t{back_off:.6f}" if n < self.order else ""))
        content = "\n".join([*lines, "", "\\end\\", ""]).encode()
        with atomic_write(path, "wb") as file:
            # Without the time: the same model gives the same bytes.
            file.write(gzip.compress(content, mtime=0) if Path(path).suffix == ".gz" else content)

    @classmethod
    def estimate(cls, sentences: Iterable[Sequence[str]], order: int = 3, discount: float = 0.75) -> NGram:
        """A model of sentences of words: interpolated Kneser-Ney with one discount (Chen and Goodman, 1999).

        Unknown words get the share of a word that is seen nowhere.

        Raises:
            UserError: there are no words.
        """
        words: dict[str, int] = {UNKNOWN: 0, BEGIN: 1, END: 2}
        counts: list[Counter[tuple[int, ...]]] = [Counter() for _ in range(order)]
        for sentence in sentences:
            ids = [1, *(words.setdefault(word, len(words)) for word in sentence), 2]
            for n in range(1, order + 1):
                counts[n - 1].update(tuple(ids[i : i + n]) for i in range(len(ids) - n + 1))
        if len(words) == 3:
            raise UserError("there are no words to make an n-gram model of")
        for n in range(order - 1, 0, -1):  # lower orders count the words that precede, but for sentences' beginnings
            before: Counter[tuple[int, ...]] = Counter(gram[1:] for gram in counts[n])
            counts[n - 1] = Counter({g: c if g[0] == 1 else before[g] for g, c in counts[n - 1].items()})
        del counts[0][(1,)]
        grams: Grams = {}
        total, kinds = sum(counts[0].values()), len(counts[0])
        uniform = discount * kinds / total / (kinds + 1)  # what is discounted goes to all words and the unknown one
        probability = {gram: (count - discount) / total + uniform for gram, count in counts[0].items()}
        probability[(0,)] = uniform
        back_off: dict[tuple[int, ...], float] = {}
        for n in range(2, order + 1):
            sums: Counter[tuple[int, ...]] = Counter()
            followers: Counter[tuple[int, ...]] = Counter()
            for gram, count in counts[n - 1].items():
                sums[gram[:-1]] += count
                followers[gram[:-1]] += 1
            for context, count in sums.items():
                back_off[context] = discount * followers[context] / count
            for gram, count in counts[n - 1].items():
                lower = probability[gram[1:]]
                probability[gram] = (count - discount) / sums[gram[:-1]] + back_off[gram[:-1]] * lower
        for gram, value in probability.items():
            grams[gram] = (math.log(value), math.log(back_off[gram]) if gram in back_off else 0.0)
        grams[(1,)] = (-99 * LN_10, math.log(back_off[(1,)]) if (1,) in back_off else 0.0)
        return cls(words, grams, order)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, line.strip()


def _parse(lines: Iterator[tuple[int, str]], path: Path) -> tuple[dict[str, int], Grams, int]:
    promised: dict[int, int] = {}
    words: dict[str, int] = {}
    grams: Grams = {}
    order, ended, begun = 0, False, False
    found: Counter[int] = Counter()
    for number, line in lines:
        where = f"{path} line {number}"
        if line == "\\data\\":
            begun = True
        elif not begun:
            continue  # free text may precede
        elif line == "\\end\\":
            ended = True
            break
        elif line.startswith("ngram ") and not order:
            n, _, count = line.removeprefix("ngram ").partition("=")
            if not (n.strip().isdigit() and count.strip().isdigit()):
                raise UserError(f"{where} is not `ngram n=count`: {line!r}")
            promised[int(n)] = int(count)
        elif line.startswith("\\") and line.endswith("-grams:"):
            order += 1
            if line != f"\\{order}-grams:" or order not in promised:
                raise UserError(f"{where}: {line!r} where \\{order}-grams: should be, as the header says")
        elif order:
            parts = line.split()
            if len(parts) not in (order + 1, order + 2):
                raise UserError(f"{where}: {len(parts)} fields, an n-gram of order {order} has {order + 1} or one more")
            if order == 1:
                words.setdefault(parts[1], len(words))
            try:
                ids = tuple(words[word] for word in parts[1 : order + 1])
                back_off = float(parts[order + 1]) if len(parts) > order + 1 else 0.0
                grams[ids] = (float(parts[0]) * LN_10, back_off * LN_10)
            except KeyError as error:
                raise UserError(f"{where}: {error.args[0]!r} is not among the 1-grams") from error
            except ValueError as error:
                raise UserError(f"{where}: {error}") from error
            found[order] += 1
    if not begun or not ended or not words:
        raise UserError(f"{path} is not a whole ARPA file (\\data\\ ... \\end\\)")
    for size, wanted in promised.items():
        if found[size] != wanted:
            raise UserError(f"{path} has {found[size]} {size}-grams, its header says {wanted}: it is damaged")
    return words, grams, order


class NGramScorer:
    """Shallow fusion: a `Scorer` that adds weight · log P(word | words before) + bonus when a word is complete.

    A model of words scores a word when a space or the text's end follows, but sees at once when no known word begins
    like it: words that run together would otherwise come off well for long. A model of tokens (characters) scores each,
    its text being its word, with `<space>` or `▁` for the space where the model has one of these.

    Args:
        model: the n-gram model.
        tokens: the text of each token from id 1 on, with a space where a word begins (`Tokenizer.tokens`).
        unit: of the model.
        weight: of its log-probabilities.
        bonus: nats a word (or token), against the preference for few of them.
        unknown: nats more for a word that the model does not know, beside weight · log(1 / tokens) for each character
            that goes on behind what a known word has.
    """

    def __init__(
        self,
        model: NGram,
        tokens: Sequence[str],
        unit: Literal["word", "token"] = "word",
        weight: float = 0.5,
        bonus: float = 0.0,
        unknown: float = -10.0,
    ) -> None:
        if unit not in ("word", "token"):
            raise UserError(f"the n-gram model's unit is {unit!r}: choose word or token")
        self.model, self.unit, self.weight, self.bonus, self.unknown = model, unit, weight, bonus, unknown
        self._tokens = ["", *tokens]
        self._letter = -weight * math.log(len(tokens))
        self._beginnings = (
            {word[:n] for word in model.words for n in range(1, len(word) + 1)} if unit == "word" else set()
        )
        spaces = [one for one in ("<space>", "\u2581", "|") if one in model.words]
        self._space = spaces[0] if spaces else " "
        if unit == "token" and not any(self._spelled(token) in model.words for token in tokens):
            raise UserError("the n-gram model knows none of the tokens: give one of characters, or set unit to word")

    def _spelled(self, token: str) -> str:
        return self._space if token == " " else token.replace(" ", "\u2581")

    def start(self) -> tuple[tuple[int, ...], str]:
        return self.model.start(), ""

    def extend(self, state: tuple[tuple[int, ...], str], token: int) -> tuple[tuple[tuple[int, ...], str], float]:
        context, word = state
        if self.unit == "token":
            context, added = self._said(context, self._spelled(self._tokens[token]))
            return (context, ""), added
        added = 0.0
        for character in self._tokens[token]:
            if character == " ":
                context, more = self._said(context, word) if word else (context, 0.0)
                word = ""
            elif word == OUTSIDE:
                more = self._letter
            else:
                word += character
                more = 0.0
                if word not in self._beginnings:
                    word, more = OUTSIDE, self.unknown
            added += more
        return (context, word), added

    def finish(self, state: tuple[tuple[int, ...], str]) -> float:
        context, word = state
        added = 0.0
        if word:
            context, added = self._said(context, word)
        if END in self.model.words:
            added += self.weight * self.model.score(context, self.model.words[END])[1]
        return added

    def _said(self, context: tuple[int, ...], word: str) -> tuple[tuple[int, ...], float]:
        number = self.model.word(word)
        context, log_prob = self.model.score(context, number)
        known = number not in (-1, self.model.unknown) or word == OUTSIDE  # which has been charged
        return context, self.weight * log_prob + self.bonus + (0.0 if known else self.unknown)
