"""Measures of a recogniser in use."""

import numpy as np
import pytest
import torch

from seqssm.data.features import FeatureConfig
from seqssm.tasks.asr_evaluation import (
    Heard,
    LongStream,
    emission_delays,
    error_rate,
    forced_word_times,
    percentiles,
    revised_words,
)
from seqssm.tasks.decoding.words import TimedToken
from seqssm.tasks.transcripts import Result
from seqssm.tasks.wer import word_errors


def result(text: str, is_final: bool = False, tokens: list[TimedToken] | None = None) -> Result:
    return Result(0, is_final, text, "", 0.0, 1.0, [], tokens or [])


def test_words_that_were_shown_and_changed_are_counted() -> None:
    assert revised_words([result(text) for text in ("a", "ab", "ab c", "ab cd")]) == 0  # they only grow
    assert revised_words([result(text) for text in ("ab c", "ab d", "ab d e")]) == 1
    assert revised_words([result(text) for text in ("a b c", "d b c")]) == 3
    # The next segment begins with the word that the last one did not hold.
    assert revised_words([result("a b c"), result("a b", True), result("c")]) == 0


class Aligner:
    """A model that hears token 1 in a recording's first quarter, then a space, then the tokens 2 and 3."""

    features = FeatureConfig()
    token_s = 0.04
    device = torch.device("cpu")

    class tokenizer:
        tokens = ("a", " ", "b", "c")

        @staticmethod
        def encode(text: str) -> list[int]:
            return [["a", " ", "b", "c"].index(c) + 1 for c in text]

    def __call__(self, features: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.tensor([0, 0, 1, 1, 0, 2, 0, 3, 0, 4, 4, 0])
        return torch.nn.functional.one_hot(labels, 5).float().mul(8).log_softmax(-1)[None], torch.tensor([12])


def test_forced_word_times() -> None:
    samples = np.zeros(16000, np.float32)
    times = forced_word_times(Aligner(), samples, "a bc")  # type: ignore[arg-type]
    assert times == [(pytest.approx(0.08), pytest.approx(0.16)), (pytest.approx(0.28), pytest.approx(0.44))]
    assert forced_word_times(Aligner(), samples, "a" * 12) == []  # type: ignore[arg-type]


def test_delays_count_rightly_recognised_words_alone() -> None:
    tokens = [TimedToken(text, start, start, 1.0) for text, start in (("a", 0.2), (" ", 0.3), ("b", 0.4), ("c", 0.6))]
    heard = Heard("a bc", [], [result("a bc", True, tokens)], 1.0, 0.1, 0.3, 0.01, 0)
    times = [(0.08, 0.16), (0.28, 0.44)]
    delays = emission_delays(heard, "a bc", times, lookahead_s=0.08, token_s=0.04)
    assert delays == [pytest.approx(0.2 + 0.12 - 0.16), pytest.approx(0.6 + 0.12 - 0.44)]
    assert emission_delays(heard, "x bc", times, 0.08, 0.04) == delays[1:]
    assert emission_delays(heard, "bc", times[1:], 0.08, 0.04) == delays[1:]


def test_a_long_stream_has_every_utterance_before_any_comes_again() -> None:
    seconds = [2.0, 3.0, 4.0]
    plan = LongStream.plan(seconds, 1.0, (0.5, 1.0), seed=1)
    assert sorted(plan.order[:3]) == [0, 1, 2]
    assert sorted(plan.order[3:6]) == [0, 1, 2]
    assert plan.seconds == pytest.approx(sum(plan.gaps_s) + sum(seconds[i] for i in plan.order))
    assert plan.seconds > 60
    assert all(0.5 <= gap <= 1 for gap in plan.gaps_s)
    assert plan.starts_s[1] == pytest.approx(plan.gaps_s[0] + seconds[plan.order[0]] + plan.gaps_s[1])
    assert LongStream.plan(seconds, 1.0, (0.5, 1.0), seed=1) == plan


def test_rates_and_percentiles() -> None:
    counts = [word_errors("a b", "a c"), word_errors("a b", "a b")] * 10
    rate = error_rate(counts, ["x", "y"] * 10, 0)
    assert (rate["rate"], rate["substitutions"], rate["reference"]) == (0.25, 10, 40)
    assert rate["low"] < 0.25 < rate["high"]
    assert (rate["low_by_speaker"], rate["high_by_speaker"]) == (0.0, 0.5)
    assert "low_by_speaker" not in error_rate(counts, [""] * 20, 0)
    assert percentiles([0.1, 0.2, 0.3]) == {"p50": pytest.approx(200), "p90": pytest.approx(280)}
    assert percentiles([]) is None
