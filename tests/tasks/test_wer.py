import math

import numpy as np
import pytest
from torchmetrics.functional.text import char_error_rate, word_error_rate

from seqssm.tasks.wer import (
    ErrorCounts,
    align,
    bootstrap_difference,
    bootstrap_interval,
    character_errors,
    count_errors,
    total,
    word_errors,
)


def test_counts_by_hand() -> None:
    assert word_errors("a b c d", "a x c d e") == ErrorCounts(1, 1, 0, 4)
    assert word_errors("a b c", "c") == ErrorCounts(0, 0, 2, 3)
    assert word_errors("a b c d", "b c d a") == ErrorCounts(0, 1, 1, 4)
    assert word_errors("", "") == ErrorCounts()
    assert word_errors("", "a b") == ErrorCounts(0, 2, 0, 0)
    assert word_errors("a b", "") == ErrorCounts(0, 0, 2, 2)
    assert character_errors("  ab  c", "ab c ") == ErrorCounts(0, 0, 0, 4)
    assert character_errors("abc", "adbc") == ErrorCounts(0, 1, 0, 3)
    assert word_errors("", "").rate == 0.0
    assert word_errors("", "a").rate == math.inf
    assert word_errors("a b", "a c").to_dict() == {
        "rate": 0.5, "errors": 1, "substitutions": 1, "insertions": 0, "deletions": 0, "reference": 2
    }  # fmt: skip


def test_counts_are_those_of_the_alignment_and_rates_those_of_torchmetrics() -> None:
    rng = np.random.default_rng(0)
    references = [" ".join(rng.choice(list("abcd"), rng.integers(1, 12))) for _ in range(60)]
    hypotheses = [" ".join(rng.choice(list("abcd"), rng.integers(0, 12))) for _ in range(60)]
    words = [word_errors(r, h) for r, h in zip(references, hypotheses, strict=True)]
    characters = [character_errors(r, h) for r, h in zip(references, hypotheses, strict=True)]
    assert total(words).rate == pytest.approx(float(word_error_rate(hypotheses, references)), abs=1e-6)
    assert total(characters).rate == pytest.approx(float(char_error_rate(hypotheses, references)), abs=1e-6)
    for reference, hypothesis, counts in zip(references, hypotheses, words, strict=True):
        pairs = align(reference.split(), hypothesis.split())
        assert [p.reference for p in pairs if p.reference is not None] == reference.split()
        assert [p.hypothesis for p in pairs if p.hypothesis is not None] == hypothesis.split()
        assert counts.substitutions == sum(None not in p and p.reference != p.hypothesis for p in pairs)
        assert counts.insertions == sum(p.reference is None for p in pairs)
        assert counts.deletions == sum(p.hypothesis is None for p in pairs)


def test_an_hour_of_words_needs_little_memory() -> None:
    rng = np.random.default_rng(0)
    words = [str(n) for n in rng.integers(0, 500, 8000)]
    said = [w for i, w in enumerate(words) if i % 100]  # 80 left out
    said[::1000] = ["wrong"] * len(said[::1000])
    assert count_errors(words, said) == ErrorCounts(8, 0, 80, 8000)


def test_intervals_are_those_of_the_spread_between_utterances() -> None:
    rng = np.random.default_rng(1)
    counts = [ErrorCounts(int(rng.binomial(10, 0.1)), 0, 0, 10) for _ in range(200)]
    rate, low, high = bootstrap_interval(counts)
    errors = np.array([one.errors for one in counts]) / 10
    spread = 1.96 * errors.std() / math.sqrt(len(counts))
    assert rate == pytest.approx(errors.mean())
    assert (rate - low, high - rate) == pytest.approx((spread, spread), rel=0.15)
    assert bootstrap_interval(counts) == (rate, low, high)
    assert bootstrap_interval(counts, seed=1) != (rate, low, high)


def test_speakers_are_drawn_whole() -> None:
    """Ten speakers who are all right or all wrong say less than a hundred independent utterances."""
    counts = [ErrorCounts(0, 0, int(i // 10 % 2), 1) for i in range(100)]
    alone = bootstrap_interval(counts)
    grouped = bootstrap_interval(counts, groups=[str(i // 10) for i in range(100)])
    assert grouped[0] == alone[0] == 0.5
    assert grouped[2] - grouped[1] > 2.5 * (alone[2] - alone[1])


def test_a_paired_difference_is_sharper_than_two_intervals() -> None:
    rng = np.random.default_rng(2)
    hard = rng.random(150) < 0.3
    first = [ErrorCounts(int(h) * 5 + int(i % 10 == 0), 0, 0, 10) for i, h in enumerate(hard)]
    second = [ErrorCounts(int(h) * 5, 0, 0, 10) for h in hard]
    difference, low, high = bootstrap_difference(first, second)
    assert difference == pytest.approx(0.01)
    assert 0 < low < difference < high < 0.02
    with pytest.raises(ValueError, match="as many counts"):
        bootstrap_difference(first, second[1:])
    with pytest.raises(ValueError, match="utterances"):
        bootstrap_interval([])
