import gzip
import itertools
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from seqssm.errors import UserError
from seqssm.tasks.decoding.ctc import BeamConfig, BeamCTC, decode
from seqssm.tasks.decoding.emissions import Emission, Scorer
from seqssm.tasks.decoding.hotwords import Hotwords
from seqssm.tasks.decoding.ngram import LN_10, NGram, NGramScorer
from seqssm.tasks.decoding.words import timed_tokens, words

TOKENS = list(" abcdefghijklmnopqrstuvwxyz")


def added(scorer: Scorer, text: str, tokens: list[str] = TOKENS) -> float:
    """What a scorer adds to a text with its end."""
    state, sum_ = scorer.start(), 0.0
    for piece in text if tokens is TOKENS else text.split("|"):
        state, more = scorer.extend(state, tokens.index(piece) + 1)
        sum_ += more
    return sum_ + scorer.finish(state)


def spoken(text: str, doubts: dict[int, tuple[str, float]] | None = None) -> np.ndarray:
    """Log-probabilities that spell a text, a blank after each character; doubts: at a place another character too."""
    rows = np.full((2 * len(text), len(TOKENS) + 1), -12.0, np.float32)
    for at, character in enumerate(text):
        rows[2 * at, TOKENS.index(character) + 1] = 0
        rows[2 * at + 1, 0] = 0
    for at, (character, log_prob) in (doubts or {}).items():
        rows[2 * at, TOKENS.index(character) + 1] = log_prob
    return rows


def text_of(emissions: list[Emission]) -> str:
    return "".join(TOKENS[one.id - 1] for one in emissions)


# ---- hotwords --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "count"),  # characters that are paid for, each phrase with the space behind it
    [
        ("ann", 4),
        ("said ann now", 4),
        ("  ann  ", 4),
        ("anna", 0),
        ("banner", 0),
        ("an", 0),
        ("ann bee", 8),  # the longer phrase, not both
        ("ann be", 4),
        ("ann ann", 8),
        ("ann bell", 4),
        ("joan ann x", 4),
        ("", 0),
    ],
)
def test_hotwords_pay_for_whole_phrases_only(text: str, count: int) -> None:
    assert added(Hotwords(["ann", "ann bee"], TOKENS, 0.5), text) == pytest.approx(0.5 * count)


def test_hotwords_of_their_own_value_and_tokens_of_several_characters() -> None:
    assert added(Hotwords({"ann": 2.0, "bob": -1.0}, TOKENS), "ann bob") == pytest.approx(2 * 4 - 4)
    pieces = [" an", "n", " ann", "a", " b"]
    assert added(Hotwords(["ann"], pieces), " an|n", pieces) == pytest.approx(4)
    assert added(Hotwords(["ann"], pieces), " ann| b", pieces) == pytest.approx(4)
    assert added(Hotwords(["ann"], pieces), " ann|a", pieces) == pytest.approx(0)


def test_hotwords_decide_doubtful_words() -> None:
    rows = spoken("call joan now", {6: ("e", -3.0)})
    assert text_of(decode(BeamCTC(), rows)) == "call joan now"
    boosted = BeamCTC(scorers=[Hotwords(["jean", "john"], TOKENS, 0.8)])
    rows = spoken("call joan now", {6: ("e", -3.0)})
    assert text_of(decode(boosted, rows)) == "call jean now"
    boosted.advance(rows)
    boosted.settle()  # an endpoint loses no hotwords
    boosted.advance(spoken(" joan", {2: ("e", -3.0)}))
    boosted.finish()
    assert text_of(boosted.take()) == "call jean now jean"


def test_bad_hotwords_are_named() -> None:
    with pytest.raises(UserError, match=r"'Ann' has characters that the model does not know: 'A'"):
        Hotwords(["Ann"], TOKENS)
    with pytest.raises(UserError, match="empty"):
        Hotwords([" "], TOKENS)


# ---- n-grams ---------------------------------------------------------------------------------------------------------

ARPA = r"""written by hand

\data\
ngram 1=5
ngram 2=3

\1-grams:
-1.0	<unk>
-99	<s>	-0.5
-0.9	</s>
-0.6	a	-0.2
-0.7	b	-0.1

\2-grams:
-0.3	<s> a
-0.4	a b
-0.2	b </s>

\end\
"""


@pytest.fixture
def arpa(tmp_path: Path) -> Path:
    (tmp_path / "m.arpa").write_text(ARPA)
    return tmp_path / "m.arpa"


def test_arpa_scores_back_off(arpa: Path) -> None:
    model = NGram.read(arpa)
    assert model.order == 2
    assert model.sentence(["a", "b"]) / LN_10 == pytest.approx(-0.3 - 0.4 - 0.2)
    assert model.sentence(["b", "a"]) / LN_10 == pytest.approx((-0.5 - 0.7) + (-0.1 - 0.6) + (-0.2 - 0.9))
    assert model.sentence(["a", "x", "a"]) / LN_10 == pytest.approx(-0.3 + (-0.2 - 1.0) - 0.6 + (-0.2 - 0.9))
    with gzip.open(arpa.with_suffix(".gz"), "wt") as file:
        file.write(ARPA)
    assert NGram.read(arpa.with_suffix(".gz")).sentence(["b"]) == model.sentence(["b"])


def test_fusion_adds_a_words_score_when_it_is_complete(arpa: Path) -> None:
    model = NGram.read(arpa)
    scorer = NGramScorer(model, TOKENS, weight=0.5, bonus=0.25, unknown=-2.0)
    assert added(scorer, "a b") == pytest.approx(0.5 * model.sentence(["a", "b"]) + 2 * 0.25)
    assert added(scorer, " a  b ") == pytest.approx(added(scorer, "a b"))
    # an unknown word costs more: as soon as it is one, and with every further letter
    letter = 0.5 * math.log(1 / len(TOKENS))
    assert added(scorer, "a xy") == pytest.approx(0.5 * model.sentence(["a", "xy"]) + 2 * 0.25 - 2.0 + letter)
    assert scorer.extend(scorer.start(), TOKENS.index("x") + 1)[1] == -2.0
    words = NGramScorer(NGram.estimate([["three"]]), TOKENS, weight=0.0, unknown=-2.0)
    assert added(words, "thr") == added(words, "thr three") == -2.0
    state, more = scorer.extend(scorer.start(), TOKENS.index("a") + 1)
    assert more == 0.0
    assert scorer.extend(state, 1)[1] == pytest.approx(0.5 * -0.3 * LN_10 + 0.25)
    letters = NGramScorer(model, TOKENS, unit="token", weight=1.0)
    assert added(letters, "ab") == pytest.approx(model.sentence(["a", "b"]))


def test_a_model_of_words_decides_doubtful_ones() -> None:
    model = NGram.estimate([line.split() for line in ["see the cat", "see the dog", "pet the cat"]])
    rows = spoken("see the cot", {9: ("a", -2.0)})
    assert text_of(decode(BeamCTC(), rows)) == "see the cot"
    assert text_of(decode(BeamCTC(scorers=[NGramScorer(model, TOKENS, weight=1.0)]), rows)) == "see the cat"
    none = BeamCTC(BeamConfig(size=4), [NGramScorer(model, TOKENS, weight=0.0, unknown=0.0)])
    assert text_of(decode(none, rows)) == "see the cot"


@pytest.mark.parametrize("order", [1, 2, 3])
def test_an_estimated_model_is_a_distribution_and_survives_its_file(order: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    text = [list(rng.choice(list("abcde"), rng.integers(1, 7), p=[0.4, 0.3, 0.15, 0.1, 0.05])) for _ in range(40)]
    model = NGram.estimate(text, order)
    vocabulary = [number for word, number in model.words.items() if word != "<s>"]
    contexts = {model.start(), ()}
    for sentence in text:
        context = model.start()
        for word in sentence:
            context, _ = model.score(context, model.word(word))
            contexts.add(context)
    for context in contexts:
        assert sum(math.exp(model.score(context, n)[1]) for n in vocabulary) == pytest.approx(1)
    model.write(tmp_path / "m.arpa")
    again = NGram.read(tmp_path / "m.arpa")
    for sentence in [*text[:5], ["z"], []]:
        assert again.sentence(sentence) == pytest.approx(model.sentence(sentence), abs=1e-4)
    model.write(tmp_path / "m.arpa.gz")
    assert gzip.decompress((tmp_path / "m.arpa.gz").read_bytes()) == (tmp_path / "m.arpa").read_bytes()
    if order > 1:  # what was seen is likelier than the same words in another order
        flat = NGram.estimate(text, 1)
        assert sum(map(model.sentence, text)) > sum(map(flat.sentence, text))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_sentences_are_drawn_with_the_probabilities_of_the_model(order: int) -> None:
    texts = np.random.default_rng(0)
    model = NGram.estimate([list(texts.choice(list("abc"), texts.integers(1, 4))) for _ in range(200)], order)
    rng = random.Random(0)
    drawn = Counter(tuple(model.draw(rng)) for _ in range(20_000))
    often = {text: count for text, count in drawn.items() if count > 400}
    assert len(often) > 3
    for text, count in often.items():  # unknown words, which are not drawn, have hardly a share
        assert count / 20_000 == pytest.approx(math.exp(model.sentence(text)), rel=0.15)
    assert max(map(len, drawn)) > 3
    assert len(model.draw(rng, longest=1)) <= 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ngram 2=3", "ngram 2=4", "has 3 2-grams, its header says 4"),
        ("a b\n", "a q\n", "line 16: 'q' is not among the 1-grams"),
        ("-0.4\ta b", "-0.4\ta", "line 16: 2 fields"),
        ("-0.4\ta b", "x\ta b", "line 16: could not convert"),
        ("\\end\\", "", "not a whole ARPA file"),
        ("\\2-grams:", "\\3-grams:", "3-grams:' where"),
        ("\\data\\", "", "not a whole ARPA file"),
    ],
)
def test_a_broken_arpa_file_is_named(arpa: Path, old: str, new: str, message: str) -> None:
    arpa.write_text(ARPA.replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        NGram.read(arpa)


def test_other_files_are_no_models(tmp_path: Path, arpa: Path) -> None:
    (tmp_path / "m.bin").write_bytes(b"\xff\xfe\x00mmap")
    for name, message in (("m.bin", "not an ARPA file"), ("none.arpa", "cannot read")):
        with pytest.raises(UserError, match=message):
            NGram.read(tmp_path / name)
    (tmp_path / "m.gz").write_text(ARPA)
    with pytest.raises(UserError, match="cannot read"):
        NGram.read(tmp_path / "m.gz")
    with pytest.raises(UserError, match="knows none of the tokens"):
        NGramScorer(NGram.read(arpa), ["x", "y"], unit="token")
    with pytest.raises(UserError, match="no words"):
        NGram.estimate([])


# ---- times -----------------------------------------------------------------------------------------------------------


def said(text: str, every: int = 5) -> list[Emission]:
    return [Emission(TOKENS.index(one) + 1, every * at, 0.5 + 0.5 * (one != "b")) for at, one in enumerate(text)]


def test_words_have_times_and_confidences() -> None:
    first, second = words(said("ab  c"), TOKENS, 0.04)
    assert (first.text, second.text) == ("ab", "c")
    assert (first.start_s, first.end_s) == pytest.approx((0.0, 0.4))
    assert second.start_s == pytest.approx(0.8)
    assert first.confidence == pytest.approx(math.sqrt(0.5))
    assert second.confidence == 1.0
    assert words([], TOKENS, 0.04) == []
    assert words(said("  "), TOKENS, 0.04) == []


def test_pieces_of_words() -> None:
    pieces = [" th", "e", " cat s", "at"]
    emissions = [Emission(n, 10 * n, 1.0) for n in (1, 2, 3, 4)]
    assert [word.text for word in words(emissions, pieces, 0.04)] == ["the", "cat", "sat"]


def test_no_time_lies_past_the_end_nor_goes_back() -> None:
    emissions = [*said("abc abc abc"), Emission(2, 90, 1.0), Emission(3, 90, 1.0)]
    for duration_s in (0.0, 1.0, 2.5, 3.6, 100.0):
        times = timed_tokens(emissions, TOKENS, 0.04, duration_s)
        assert all(0 <= one.start_s <= one.end_s <= duration_s for one in times)
        assert all(a.end_s <= b.start_s for a, b in itertools.pairwise(times))
        assert times[-1].to_dict()["text"] == "b"
