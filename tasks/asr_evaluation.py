"""What to measure of a recogniser in use: errors, delays, stability, and whether hours change anything."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from seqssm.data.features import fbank
from seqssm.tasks.asr_network import ASRNetwork
from seqssm.tasks.asr_stream import Transcriber
from seqssm.tasks.decoding.words import Word
from seqssm.tasks.transcripts import Result
from seqssm.tasks.wer import ErrorCounts, align, bootstrap_interval, character_errors, count_errors, total, word_errors

Samples = NDArray[np.float32]


@dataclass(frozen=True)
class Heard:
    """One recording through a transcriber, packet by packet at real time.

    Attributes:
        text: all that was said.
        words: with their times.
        results: all of them, as they came.
        seconds: of the recording.
        spent_s: of computing.
        first_s: when the first text was there, on the recording's clock, computing included; None without text.
        final_s: seconds from the recording's end to its last result.
        revised: words of partial results that later ones changed.
    """

    text: str
    words: list[Word]
    results: list[Result]
    seconds: float
    spent_s: float
    first_s: float | None
    final_s: float
    revised: int

    def to_bytes(self) -> bytes:
        """Everything that the packets must not change."""
        return json.dumps([result.to_dict() for result in self.results]).encode()


def hear(transcriber: Transcriber, samples: Samples, packet: int) -> Heard:
    """Send samples (n,) in packets; a packet is there when its last sample is."""
    rate = transcriber.session.input_rate
    results: list[Result] = []
    spent_s, first_s, free_s = 0.0, None, 0.0
    for at in range(0, len(samples), packet):
        part = samples[at : at + packet]
        begin = time.perf_counter()
        new = transcriber.accept(part)
        took = time.perf_counter() - begin
        spent_s += took
        # Answers come when the packet is there and those before it have been worked on.
        free_s = max(free_s, (at + len(part)) / rate) + took
        if first_s is None and any(result.text for result in new):
            first_s = free_s
        results += new
    begin = time.perf_counter()
    last = transcriber.finish()
    took = time.perf_counter() - begin
    seconds = len(samples) / rate
    free_s = max(free_s, seconds) + took
    if first_s is None and any(result.text for result in last):
        first_s = free_s
    results += last
    final = [result for result in results if result.is_final]
    return Heard(
        " ".join(result.text for result in final),
        [word for result in final for word in result.words],
        results,
        seconds,
        spent_s + took,
        first_s,
        free_s - seconds,
        revised_words(results),
    )


def revised_words(results: Sequence[Result]) -> int:
    """Words that were shown and then changed; one that only grows is not changed."""
    count, before = 0, ""
    for result in results:
        # A segment that is cut between words hands its last one over to the next.
        if not result.text.startswith(before) and not (result.is_final and before.startswith(result.text)):
            old, new = before.split(), result.text.split()
            same = sum(1 for _ in _same_words(old, new))
            count += len(old) - same
        before = "" if result.is_final else result.text
    return count


def _same_words(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """The words that both begin with; the last of the old ones may be the beginning of one."""
    same = []
    for i, word in enumerate(old):
        if i >= len(new) or not (new[i] == word or (i == len(old) - 1 and new[i].startswith(word))):
            break
        same.append(word)
    return same


# ---- delays against a forced alignment -------------------------------------------------------------------------------


@torch.no_grad()
def forced_word_times(aligner: ASRNetwork, samples: Samples, text: str) -> list[tuple[float, float]]:
    """Start and end in seconds of each word of the normalised text, by the best CTC alignment of a model.

    An empty list where the text cannot be aligned: it is empty, or has more tokens than the recording has positions.
    """
    from torchaudio.functional import forced_align

    ids = aligner.tokenizer.encode(text)
    features = fbank(torch.from_numpy(np.array(samples, np.float32)), aligner.features)[None].to(aligner.device)
    log_probs, lengths = aligner(features, torch.tensor([features.shape[1]], device=features.device))
    repeats = sum(a == b for a, b in pairwise(ids))
    if not ids or len(ids) + repeats > int(lengths[0]):
        return []
    targets = torch.tensor([ids], dtype=torch.int32)
    labels, _ = forced_align(log_probs.cpu(), targets, blank=0)
    row = labels[0].tolist()
    spans: list[list[int]] = []  # first and last position of each token
    for position, label in enumerate(row):
        if label and position and label == row[position - 1]:
            spans[-1][1] = position
        elif label:
            spans.append([position, position])
    times: list[tuple[float, float]] = []
    open_word = False
    for token, (first, last) in zip(ids, spans, strict=True):
        piece = aligner.tokenizer.tokens[token - 1]
        open_word = open_word and not piece.startswith(" ")
        if not piece.strip():
            continue
        start_s, end_s = first * aligner.token_s, (last + 1) * aligner.token_s
        times = [*times[:-1], (times[-1][0], end_s)] if open_word else [*times, (start_s, end_s)]
        open_word = True
    return times


def emission_delays(
    heard: Heard, text: str, times: Sequence[tuple[float, float]], lookahead_s: float, token_s: float
) -> list[float]:
    """Seconds from the end of each rightly recognised word to the sample that let its last token be emitted."""
    words = [word for result in heard.results if result.is_final for word in _last_tokens(result)]
    delays, i, j = [], 0, 0
    for pair in align(text.split(), [word for word, _ in words]):
        if pair.reference is not None and pair.reference == pair.hypothesis and i < len(times):
            delays.append(words[j][1] + token_s + lookahead_s - times[i][1])
        i += pair.reference is not None
        j += pair.hypothesis is not None
    return delays


def _last_tokens(result: Result) -> list[tuple[str, float]]:
    """Each word of a result and when its last token was emitted."""
    found: list[tuple[str, float]] = []
    begun = False
    for token in result.tokens:
        begun = begun and not token.text.startswith(" ")
        if token.text.strip():
            before = found.pop()[0] if begun else ""
            found.append((before + token.text.strip(), token.start_s))
            begun = True
    return found


# ---- the report ------------------------------------------------------------------------------------------------------


@dataclass
class Scores:
    """What is gathered over the utterances of a split."""

    references: list[str] = field(default_factory=list)
    heard: list[Heard] = field(default_factory=list)
    first_latencies: list[float] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)

    def summary(self, speakers: Sequence[str], seed: int) -> dict[str, Any]:
        """Plain data: error rates with intervals over utterances and over speakers, and delays in milliseconds."""
        texts = [one.text for one in self.heard]
        words = [word_errors(r, h) for r, h in zip(self.references, texts, strict=True)]
        characters = [character_errors(r, h) for r, h in zip(self.references, texts, strict=True)]
        seconds = sum(one.seconds for one in self.heard)
        said = max(sum(len(text.split()) for text in texts), 1)
        return {
            "utterances": len(texts),
            "speakers": len(set(speakers) - {""}),
            "minutes": seconds / 60,
            "wer": error_rate(words, speakers, seed),
            "cer": error_rate(characters, speakers, seed),
            "exact_utterances": sum(one.errors == 0 for one in words),
            "real_time_factor": sum(one.spent_s for one in self.heard) / max(seconds, 1e-9),
            "first_text_ms": percentiles(self.first_latencies),
            "final_ms": percentiles([one.final_s for one in self.heard]),
            "emission_delay_ms": percentiles(self.delays),
            "revised_words_ratio": sum(one.revised for one in self.heard) / said,
        }


def error_rate(counts: Sequence[ErrorCounts], speakers: Sequence[str], seed: int) -> dict[str, Any]:
    """Rate and counts, and 95% intervals by utterance and, where speakers are known, by speaker."""
    _, low, high = bootstrap_interval(counts, seed)
    rate = {**total(counts).to_dict(), "low": low, "high": high}
    if len(set(speakers) - {""}) > 1:
        _, low, high = bootstrap_interval(counts, seed, groups=speakers)
        rate |= {"low_by_speaker": low, "high_by_speaker": high}
    return rate


def percentiles(values_s: Sequence[float]) -> dict[str, float] | None:
    """P50 and P90 in milliseconds."""
    if not values_s:
        return None
    p50, p90 = np.percentile(values_s, [50, 90])
    return {"p50": float(1000 * p50), "p90": float(1000 * p90)}


# ---- long streams ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LongStream:
    """Utterances one after another with gaps between them.

    Attributes:
        order: positions of the utterances in their split.
        gaps_s: in front of each, and one behind the last.
        starts_s: where each begins.
        seconds: of the whole.
    """

    order: list[int]
    gaps_s: list[float]
    starts_s: list[float]
    seconds: float

    @classmethod
    def plan(cls, seconds_of: Sequence[float], minutes: float, gap_s: tuple[float, float], seed: int) -> LongStream:
        """Draw utterances, all of them before any comes again, until the stream is so long."""
        rng = np.random.default_rng(seed)
        order: list[int] = []
        gaps, starts, at = [], [], 0.0
        waiting: list[int] = []
        while at < 60 * minutes:
            waiting = waiting or rng.permutation(len(seconds_of)).tolist()
            gap = round(float(rng.uniform(*gap_s)), 2)
            one = waiting.pop()
            gaps.append(gap)
            starts.append(at + gap)
            order.append(one)
            at += gap + seconds_of[one]
        gaps.append(round(float(rng.uniform(*gap_s)), 2))
        return cls(order, gaps, starts, at + gaps[-1])


def score_long_stream(
    transcriber: Transcriber,
    stream: LongStream,
    samples_of: Callable[[int], Samples],
    references: Sequence[str],
    alone: Sequence[str],
    *,
    stretch_minutes: float,
    seed: int,
    advance: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """Hear a long stream and score it.

    Args:
        transcriber: a fresh one at the samples' rate.
        stream: its plan.
        samples_of: samples (n,) of an utterance.
        references: normalised texts of all utterances.
        alone: what was recognised of each utterance by itself.
        stretch_minutes: to report apart.
        seed: of the noise in the gaps, 60 dB below full scale.
        advance: told the seconds that were heard.

    Returns:
        Plain data.
    """
    rate, rng = transcriber.session.input_rate, np.random.default_rng([seed, 1])
    words: list[Word] = []
    sizes: list[int] = []
    begin = time.perf_counter()

    def take(results: Sequence[Result]) -> None:
        words.extend(word for result in results if result.is_final for word in result.words)

    for i, one in enumerate([*stream.order, None]):
        gap = 1e-3 * rng.standard_normal(round(stream.gaps_s[i] * rate)).astype(np.float32)
        take(transcriber.accept(gap))
        if one is not None:
            take(transcriber.accept(samples_of(one)))
        sizes.append(len(transcriber.snapshot()))
        advance(round(stream.gaps_s[i]))
    take(transcriber.finish())
    spent_s = time.perf_counter() - begin

    said: list[list[str]] = [[] for _ in stream.order]
    # A word belongs to the utterance that began last; one that is emitted early, to the one that is about to begin.
    starts = np.array(stream.starts_s) - 0.1
    for word in words:
        said[max(int(np.searchsorted(starts, word.start_s, side="right")) - 1, 0)].append(word.text)
    counts = [count_errors(references[one].split(), text) for one, text in zip(stream.order, said, strict=True)]
    stretch = (np.array(stream.starts_s) // (60 * stretch_minutes)).astype(int)
    by_stretch = [total([c for c, s in zip(counts, stretch, strict=True) if s == n]) for n in sorted(set(stretch))]
    whole = count_errors(
        [word for one in stream.order for word in references[one].split()], [word.text for word in words]
    )
    single = total([word_errors(references[one], alone[one]) for one in stream.order])
    return {
        "minutes": stream.seconds / 60,
        "utterances": len(stream.order),
        "wer": whole.to_dict(),
        "utterance_wise_wer": single.to_dict(),
        "difference_points": 100 * (whole.rate - single.rate),
        "stretch_minutes": stretch_minutes,
        "wer_by_stretch": [one.rate for one in by_stretch],
        "snapshot_bytes": {"first": sizes[0], "largest": max(sizes), "last": sizes[-1]},
        "real_time_factor": spent_s / stream.seconds,
    }
