"""Word and character error rates: counts of substitutions, insertions and deletions, and intervals over utterances."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ErrorCounts:
    """How a hypothesis differs from a reference of so many words or characters."""

    substitutions: int = 0
    insertions: int = 0
    deletions: int = 0
    reference: int = 0

    @property
    def errors(self) -> int:
        return self.substitutions + self.insertions + self.deletions

    @property
    def rate(self) -> float:
        """Errors for each unit of the reference; 0 for two empty texts, infinite when only the reference is empty."""
        if not self.reference:
            return float("inf") if self.errors else 0.0
        return self.errors / self.reference

    def __add__(self, other: ErrorCounts) -> ErrorCounts:
        return ErrorCounts(
            self.substitutions + other.substitutions,
            self.insertions + other.insertions,
            self.deletions + other.deletions,
            self.reference + other.reference,
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "rate": self.rate,
            "errors": self.errors,
            "substitutions": self.substitutions,
            "insertions": self.insertions,
            "deletions": self.deletions,
            "reference": self.reference,
        }


class Pair(NamedTuple):
    """A place of an alignment: the unit of the reference (None: inserted) and of the hypothesis (None: deleted)."""

    reference: str | None
    hypothesis: str | None


def word_errors(reference: str, hypothesis: str) -> ErrorCounts:
    """Count by words, as white space separates them."""
    return count_errors(reference.split(), hypothesis.split())


def character_errors(reference: str, hypothesis: str) -> ErrorCounts:
    """Count by characters; a run of white space is one space, at the ends none."""
    return count_errors(" ".join(reference.split()), " ".join(hypothesis.split()))


def count_errors(reference: Sequence[str], hypothesis: Sequence[str]) -> ErrorCounts:
    """Fewest errors (Levenshtein distance); among those the fewest insertions and deletions, as sclite prefers."""
    ids: dict[str, int] = {}
    first, second = (np.array([ids.setdefault(one, len(ids)) for one in text], np.int64)
                     for text in (reference, hypothesis))  # fmt: skip
    n, m = len(first), len(second)
    # The cost of a cell in one number: errors, then insertions. Deletions follow: n - m = deletions - insertions.
    unit = max(n, m) + 2
    steps = np.arange(m + 1) * (unit + 1)  # errors and insertions of a row's beginning
    row = steps.copy()
    for at in range(n):
        change = row[:-1] + unit * (second != first[at])
        best = np.minimum(row + unit, np.concatenate([[row[0] + unit], change]))
        # insertions from the left: the least of best[k] + (j - k) insertions
        row = np.minimum.accumulate(best - steps) + steps
    errors, insertions = divmod(int(row[-1]), unit)
    deletions = n - m + insertions
    return ErrorCounts(errors - insertions - deletions, insertions, deletions, n)


def align(reference: Sequence[str], hypothesis: Sequence[str]) -> list[Pair]:
    """An alignment with the counts of `count_errors`: which unit became which. Memory n·m."""
    n, m = len(reference), len(hypothesis)
    unit = max(n, m) + 2
    cost = np.zeros((n + 1, m + 1), np.int64)
    steps = np.arange(m + 1) * (unit + 1)
    cost[0] = steps
    said = np.array(hypothesis, object)
    for i, word in enumerate(reference):
        change = cost[i, :-1] + unit * (said != word)
        best = np.minimum(cost[i] + unit, np.concatenate([[cost[i, 0] + unit], change]))
        cost[i + 1] = np.minimum.accumulate(best - steps) + steps
    pairs: list[Pair] = []
    i, j = n, m
    while i or j:
        if i and j and cost[i, j] == cost[i - 1, j - 1] + unit * (reference[i - 1] != hypothesis[j - 1]):
            i, j = i - 1, j - 1
            pairs.append(Pair(reference[i], hypothesis[j]))
        elif i and cost[i, j] == cost[i - 1, j] + unit:
            i -= 1
            pairs.append(Pair(reference[i], None))
        else:
            j -= 1
            pairs.append(Pair(None, hypothesis[j]))
    return pairs[::-1]


def total(counts: Iterable[ErrorCounts]) -> ErrorCounts:
    """Sum."""
    return sum(counts, ErrorCounts())


def bootstrap_interval(
    counts: Sequence[ErrorCounts],
    seed: int = 0,
    *,
    groups: Sequence[str] | None = None,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """The error rate of all utterances and its percentile interval, utterances (or whole groups of them, such as
    speakers, where given) being drawn with replacement (Bisani and Ney, 2004)."""
    rates = _resampled([counts], seed, groups, resamples)[0]
    low, high = _quantiles(rates, confidence)
    return total(counts).rate, low, high


def bootstrap_difference(
    first: Sequence[ErrorCounts],
    second: Sequence[ErrorCounts],
    seed: int = 0,
    *,
    groups: Sequence[str] | None = None,
    resamples: int = 2000,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """How much the first error rate is above the second, on the same utterances, and its interval: the same draws for
    both."""
    rates = _resampled([first, second], seed, groups, resamples)
    low, high = _quantiles(rates[0] - rates[1], confidence)
    return total(first).rate - total(second).rate, low, high


def _resampled(
    systems: Sequence[Sequence[ErrorCounts]], seed: int, groups: Sequence[str] | None, resamples: int
) -> NDArray[np.float64]:
    """(systems, resamples) error rates."""
    size = len(systems[0])
    if not size or any(len(one) != size for one in systems) or (groups is not None and len(groups) != size):
        raise ValueError("there must be utterances, and as many counts of each system, and groups")
    unit = np.arange(size) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    units = int(unit.max()) + 1
    table = np.zeros((len(systems), 2, units))
    for row, counts in zip(table, systems, strict=True):
        np.add.at(row[0], unit, [one.errors for one in counts])
        np.add.at(row[1], unit, [one.reference for one in counts])
    rng = np.random.default_rng(seed)
    draws = [table[..., rng.integers(units, size=units)].sum(-1) for _ in range(resamples)]  # (systems, 2) each
    errors, reference = np.stack(draws, -1).transpose(1, 0, 2)
    return np.divide(errors, reference, out=np.full_like(errors, np.nan), where=reference > 0)


def _quantiles(rates: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    if not np.isfinite(rates).any():
        return float("nan"), float("nan")
    low, high = np.nanquantile(rates, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
