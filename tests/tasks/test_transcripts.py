"""Emissions to words, segments that pauses end, and subtitles."""

import io
import json
import random

import pytest

from seqssm.errors import UserError
from seqssm.tasks.decoding.emissions import Emission
from seqssm.tasks.decoding.words import timed_tokens, words
from seqssm.tasks.transcripts import EndpointRules, Result, Segmenter, TranscriptWriter, clock

TOKENS = list(" abc")
TOKEN_S = 0.1


def emit(text: str, start: int = 0, step: int = 1) -> list[Emission]:
    return [Emission(TOKENS.index(c) + 1, start + i * step, 0.5) for i, c in enumerate(text)]


def segmenter(**rules: float) -> Segmenter:
    return Segmenter(TOKENS, TOKEN_S, EndpointRules(**rules))


def final(results: list[Result]) -> list[str]:
    return [result.text for result in results if result.is_final]


def test_a_pause_behind_text_ends_a_segment() -> None:
    one = segmenter(after_text_s=1.2)
    assert final(one.advance(emit("ab c"), [], 4)) == []
    assert final(one.advance([], [], 15)) == []  # 1.1 s behind the last token
    (result,) = one.advance([], [], 16)
    assert (result.segment, result.is_final, result.text, result.stable) == (0, True, "ab c", "ab c")
    assert [(w.text, w.start_s) for w in result.words] == [("ab", 0.0), ("c", pytest.approx(0.3))]
    assert final(one.advance(emit("a", 40), [], 41)) == []
    (last,) = one.finish([], 4.05)
    assert (last.segment, last.text, last.start_s, last.end_s) == (1, "a", 4.0, 4.05)


def test_silence_without_text_gives_no_result_but_a_new_beginning() -> None:
    one = segmenter(longest_s=4.0)
    assert one.advance([], [], 30) == []
    # The silence does not count towards the longest segment.
    assert final(one.advance(emit("ab", 58), [], 60)) == []
    assert final(one.finish([], 6.0)) == ["ab"]


def test_a_long_segment_is_cut_between_words_and_nothing_is_lost() -> None:
    one = segmenter(longest_s=1.0)
    texts, frame = [], 0
    for word in ["ab ", "ca ", "b a", "bc ", "aa ", "c b", "cc ", "a a"]:
        results = one.advance(emit(word, frame), [], frame + len(word))
        texts += final(results)
        frame += len(word)
    texts += final(one.finish([], frame * TOKEN_S))
    assert " ".join(texts) == "ab ca b abc aa c bcc a a"
    assert texts[0] == "ab ca b abc"
    assert len(texts) >= 3
    # A word that is longer than a segment may be is cut where it is.
    assert final(segmenter(longest_s=1.0).advance(emit("a" * 10), [], 10)) == ["a" * 10]


def test_partial_results_only_when_something_is_new_and_stable_text_only_grows() -> None:
    one = segmenter()
    results = one.advance(emit("a"), emit("b", 1), 2)
    assert [(r.stable, r.text) for r in results] == [("a", "ab")]
    assert one.advance([], emit("b", 1), 3) == []
    results = one.advance(emit("c", 1), [], 4)
    assert [(r.stable, r.text) for r in results] == [("ac", "ac")]
    assert one.advance(emit(" ", 4), [], 5) == []  # a space alone says nothing new


def test_an_endpoint_asks_the_decoder_to_settle() -> None:
    one = segmenter()
    assert not one.must_settle([], emit("ab"), 3)
    assert one.must_settle([], emit("ab"), 14)
    assert not one.must_settle(emit("ab"), [], 14)


def test_state_goes_on_elsewhere() -> None:
    one, other = segmenter(), segmenter()
    one.advance(emit("ab "), emit("c", 3), 4)
    other.load(json.loads(json.dumps(one.state())))
    assert one.advance(emit("c", 3), [], 20) == other.advance(emit("c", 3), [], 20)
    assert one.state() == other.state()


@pytest.mark.parametrize("bad", [{"silence_s": 0.0}, {"longest_s": -1.0}])
def test_endpoint_rules_are_checked(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match="positive times"):
        EndpointRules(**bad)


def test_formats() -> None:
    one = segmenter()
    results = one.advance(emit("ab c", 36000), [], 36020)
    files = {}
    for form in ("text", "json", "srt", "vtt"):
        file = io.StringIO()
        writer = TranscriptWriter(file, form, "x.wav")
        for result in results:
            writer.write(result)
        files[form] = file.getvalue()
    assert files["text"] == "ab c\n"
    row = json.loads(files["json"])
    assert (row["file"], row["text"], row["words"][1]["text"], row["words"][1]["start_s"]) == (
        "x.wav",
        "ab c",
        "c",
        3600.3,
    )
    assert files["srt"] == "1\n01:00:00,000 --> 01:00:00,700\nab c\n\n"
    assert files["vtt"] == "WEBVTT\n\n01:00:00.000 --> 01:00:00.700\nab c\n\n"
    with pytest.raises(UserError, match="unknown format"):
        TranscriptWriter(io.StringIO(), "doc")  # type: ignore[arg-type]


def test_clock_carries() -> None:
    assert clock(59.9996, ",") == "00:01:00,000"
    assert clock(3599.5, ".") == "00:59:59.500"


@pytest.mark.parametrize("tokens", [list(" abc"), [" ", " a", "b", "c d", "ab ", " a b"]])
def test_partial_results_tell_of_their_words_what_the_whole_text_says(tokens: list[str]) -> None:
    rng = random.Random(0)
    for _ in range(20):
        one = Segmenter(tokens, TOKEN_S, EndpointRules(silence_s=99, after_text_s=99, longest_s=99))
        frame, told, said = 0, [], []
        for _ in range(12):
            new = []
            for _ in range(rng.randint(0, 3)):
                frame += rng.randint(0, 6)
                new.append(Emission(rng.randint(1, len(tokens)), frame, rng.random()))
            said += new
            partial = [Emission(rng.randint(1, len(tokens)), frame + i, 0.5) for i in range(rng.randint(0, 2))]
            frame += len(partial)
            heard_s = (frame + 1) * TOKEN_S
            told += [(result, [*said, *partial], heard_s) for result in one.advance(new, partial, frame + 1)]
        assert len(told) > 5
        for result, emissions, heard_s in told:  # asked later, and the same
            about = emissions, tokens, TOKEN_S, heard_s
            assert result.text == " ".join("".join(tokens[one.id - 1] for one in emissions).split())
            assert (result.words, result.tokens) == (words(*about), timed_tokens(*about))
            if result.words:
                assert (result.start_s, result.end_s) == (result.words[0].start_s, result.words[-1].end_s)
            assert result.to_dict()["words"] == [word.to_dict() for word in result.words]
        with pytest.raises(AttributeError, match="sentence"):
            _ = told[0][0].sentence  # type: ignore[attr-defined]
