import itertools
import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from seqssm.tasks.decoding.beams import Beam
from seqssm.tasks.decoding.ctc import BeamConfig, BeamCTC, GreedyCTC, GreedyState, best_labels, decode, greedy_advance
from seqssm.tasks.decoding.emissions import Decoder, Emission
from seqssm.tasks.decoding.hotwords import Hotwords

EXACT = BeamConfig(size=10_000, tokens=100, token_margin=1e9, margin=1e9)


def log_probs(frames: int, labels: int, seed: int = 0, sharp: float = 1.5) -> np.ndarray:
    logits = sharp * np.random.default_rng(seed).standard_normal((frames, labels))
    return torch.from_numpy(logits).log_softmax(-1).float().numpy()


def speech_like(frames: int, labels: int, seed: int = 0) -> np.ndarray:
    """Mostly blanks with a token now and then, some of them doubtful."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((frames, labels))
    logits[:, 0] += 6
    for at in np.flatnonzero(rng.random(frames) < 0.25):
        logits[at, rng.integers(1, labels)] += rng.choice([6.0, 9.0, 14.0])
    return torch.from_numpy(logits).log_softmax(-1).float().numpy()


def collapse(labels: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(label for label, _ in itertools.groupby(labels) if label)


def sequence_scores(rows: np.ndarray) -> dict[tuple[int, ...], float]:
    """Log-probability of every token sequence, by all its alignments."""
    scores: dict[tuple[int, ...], float] = {}
    for path in itertools.product(range(rows.shape[1]), repeat=len(rows)):
        score = float(sum(float(row[label]) for row, label in zip(rows, path, strict=True)))
        ids = collapse(path)
        scores[ids] = float(np.logaddexp(scores.get(ids, -np.inf), score))
    return scores


class Prefers:
    """Adds to the score of each token, and to the end."""

    def __init__(self, values: dict[int, float], end: float) -> None:
        self.values, self.end = values, end

    def start(self) -> int:
        return 0

    def extend(self, state: int, token: int) -> tuple[int, float]:
        return token, self.values[token] * (1 + (state == token))

    def finish(self, state: int) -> float:
        return self.end * state


# ---- greedy ----------------------------------------------------------------------------------------------------------


def test_greedy_merges_repeats_and_drops_blanks() -> None:
    rows = log_probs(200, 5)
    emissions = greedy_advance(best_labels(rows), GreedyState())
    best = rows.argmax(1)
    assert tuple(one.id for one in emissions) == collapse(tuple(best))
    for one in emissions:
        assert best[one.frame] == one.id
        assert one.frame == 0 or best[one.frame - 1] != one.id
        assert one.confidence == pytest.approx(math.exp(rows[one.frame, one.id]))


# ---- beam ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("scored", [False, True])
def test_the_beam_sums_all_alignments(seed: int, scored: bool) -> None:
    rows = log_probs(6, 4, seed)
    scorer = Prefers({1: 0.7, 2: -0.4, 3: 0.2}, end=0.3)
    truth = sequence_scores(rows)
    beam = BeamCTC(EXACT, [scorer] if scored else [])
    beam.advance(rows)
    settled = tuple(one.id for one in beam.take())
    found = {(*settled, *one.ids): one.score for one in beam.hypotheses}
    for ids in truth if scored else ():
        state = 0
        for token in ids:
            state, more = scorer.extend(state, token)
            truth[ids] += more
    assert set(found) <= set(truth)
    level = truth[(*settled, *beam.best.ids)] - beam.best.score  # the beam keeps differences only
    for ids, score in found.items():
        assert score + level == pytest.approx(truth[ids], abs=1e-4)
    assert len(found) == sum(ids[: len(settled)] == settled for ids in truth)
    if scored:
        truth = {ids: score + scorer.finish(ids[-1] if ids else 0) for ids, score in truth.items()}
    beam.settle()
    assert (*settled, *(one.id for one in beam.take())) == max(truth, key=lambda ids: truth[ids])


def test_sequence_scores_are_those_of_the_ctc_loss() -> None:
    rows = log_probs(5, 4, 3)
    for ids, score in sequence_scores(rows).items():
        args = torch.from_numpy(rows)[:, None], torch.tensor([ids], dtype=torch.long), [5], [len(ids)]
        assert float(F.ctc_loss(*args, reduction="sum")) == pytest.approx(-score, abs=1e-4)


def test_a_beam_finds_what_greedy_decoding_misses() -> None:
    rows = torch.tensor([[0.6, 0.4], [0.6, 0.4]]).log().numpy()  # P(a) = 0.64, yet the best label is the blank, twice
    assert decode(GreedyCTC(), rows) == []
    assert [one.id for one in decode(BeamCTC(), rows)] == [1]


def test_a_beam_of_confident_labels_is_greedy() -> None:
    labels = np.random.default_rng(0).integers(0, 6, 300)
    rows = np.where(np.arange(6) == labels[:, None], 0.0, -30.0).astype(np.float32)
    greedy, beam = decode(GreedyCTC(), rows), decode(BeamCTC(), rows)
    assert [(one.id, one.frame) for one in beam] == [(one.id, one.frame) for one in greedy]


# ---- streams ---------------------------------------------------------------------------------------------------------

DECODERS: dict[str, Callable[[], Decoder]] = {
    "greedy": GreedyCTC,
    "beam": BeamCTC,
    "narrow": lambda: BeamCTC(BeamConfig(size=3, pending=2)),
    "hotwords": lambda: BeamCTC(scorers=[Hotwords(["ab", "cab c"], [" ", "a", "b", "c"])]),
}


@pytest.mark.parametrize("name", DECODERS)
def test_packets_and_snapshots_change_nothing(name: str) -> None:
    make = DECODERS[name]
    rows = speech_like(400, 5, 1)
    whole = decode(make(), rows)
    assert len(whole) > 20
    rng = np.random.default_rng(0)
    decoder, taken, at = make(), [], 0
    while at < len(rows):
        size = int(rng.integers(0, 9))
        decoder.advance(torch.from_numpy(rows[at : at + size]))
        if rng.random() < 0.5:
            taken += decoder.take()
        blob = json.dumps(decoder.state())  # as if in another process
        decoder = make()
        decoder.load(json.loads(blob))
        at += size
    decoder.finish()
    assert taken + decoder.take() == whole


@pytest.mark.parametrize("name", DECODERS)
def test_settled_tokens_stay_and_the_rest_is_partial(name: str) -> None:
    decoder, settled = DECODERS[name](), []
    for row in speech_like(400, 5, 2):
        decoder.advance(row[None])
        settled += decoder.take()
        said = settled + decoder.partial
        frames = [one.frame for one in said]
        assert frames == sorted(frames)
    before = settled + decoder.partial
    decoder.settle()
    settled += decoder.take()
    assert decoder.partial == []
    assert len(settled) >= len(before) - 1


def test_clear_speech_settles_at_once() -> None:
    rows = np.full((50, 3), -30.0, np.float32)
    rows[:, 0] = 0
    rows[10] = [-30, 0, -30]
    beam = BeamCTC()
    beam.advance(rows[:12])
    assert beam.take() == [Emission(1, 10, 1.0)]


@pytest.mark.parametrize("name", ["greedy", "beam"])
@pytest.mark.parametrize(("labels", "count"), [([1, 1], 1), ([1, 0, 1], 2)])
def test_an_endpoint_neither_drops_nor_doubles_a_repeated_token(name: str, labels: list[int], count: int) -> None:
    decoder, said = DECODERS[name](), []
    for label in labels:
        decoder.advance(np.where(np.arange(5) == label, -1e-3, -9.0).astype(np.float32)[None])
        decoder.settle()
        said += decoder.take()
    assert [one.id for one in said] == [1] * count


def test_state_and_scores_stay_small_for_hours() -> None:
    beam = BeamCTC(BeamConfig(pending=16))
    rows = log_probs(3000, 6, 4)  # never clear: the worst case
    sizes = []
    for at in range(0, len(rows), 100):
        beam.advance(rows[at : at + 100])
        beam.take()
        sizes.append(len(json.dumps(beam.state())))
        assert abs(beam.best.score) < 50
        assert all(len(one.ids) <= 16 for one in beam.hypotheses)
    assert max(sizes[10:]) < 1.5 * max(sizes[:10])


def test_finish_begins_anew() -> None:
    rows = speech_like(100, 5, 3)
    for make in DECODERS.values():
        decoder = make()
        assert decode(decoder, rows) == decode(decoder, rows)


def test_nan_and_other_shapes_are_refused() -> None:
    for decoder in (GreedyCTC(), BeamCTC()):
        with pytest.raises(ValueError, match="NaN"):
            decoder.advance(np.full((1, 4), np.nan, np.float32))
        with pytest.raises(ValueError, match="shape"):
            decoder.advance(np.zeros(4, np.float32))
        decoder.advance(np.zeros((0, 4), np.float32))
        assert decoder.take() == []
    with pytest.raises(ValueError, match="positive"):
        Beam(0, (), 1, 1.0)
