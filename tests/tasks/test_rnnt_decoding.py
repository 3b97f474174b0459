import itertools
import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from seqssm.tasks.decoding.ctc import decode
from seqssm.tasks.decoding.emissions import Decoder
from seqssm.tasks.decoding.hotwords import Hotwords
from seqssm.tasks.decoding.rnnt import BeamRNNT, GreedyRNNT, RNNTBeamConfig, Transducer

LABELS, WIDTH = 4, 8


def model(seed: int = 0, sharp: float = 1.0, context: int = 2) -> Transducer:
    torch.manual_seed(seed)
    embedding, mix, head = nn.Embedding(LABELS, WIDTH), nn.Linear(context * WIDTH, WIDTH), nn.Linear(WIDTH, LABELS)
    with torch.no_grad():
        head.bias[0] += 0.7

    def joiner(encoded: Tensor, predicted: Tensor) -> Tensor:
        return sharp * 3 * head(torch.tanh(encoded + predicted))

    return Transducer(lambda tokens: mix(embedding(tokens).flatten(1)), joiner, context)


def frames(count: int, seed: int = 0) -> Tensor:
    return 1.5 * torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def score(transducer: Transducer, encoded: Tensor, ids: tuple[int, ...]) -> float:
    """Log-probability of all alignments, by the training loss."""
    from torchaudio.functional import rnnt_loss

    history = [((0,) * transducer.context + ids[:n])[-transducer.context :] for n in range(len(ids) + 1)]
    predicted = transducer.predictor(torch.tensor(history))
    t, u = len(encoded), len(history)
    logits = transducer.joiner(
        encoded[:, None].expand(t, u, WIDTH).reshape(-1, WIDTH), predicted[None].expand(t, u, WIDTH).reshape(-1, WIDTH)
    ).reshape(1, t, u, LABELS)
    lengths = torch.tensor([t], dtype=torch.int32), torch.tensor([len(ids)], dtype=torch.int32)
    return -float(rnnt_loss(logits, torch.tensor([ids], dtype=torch.int32).reshape(1, -1), *lengths, blank=0))


@pytest.mark.parametrize("seed", range(3))
def test_a_wide_beam_sums_all_alignments(seed: int) -> None:
    transducer, encoded = model(seed), frames(3, seed)
    beam = BeamRNNT(transducer, RNNTBeamConfig(size=1000, symbols=4, margin=1e9))
    beam.advance(encoded)
    assert beam.take() == []
    found = {one.ids: one.score for one in beam.hypotheses}
    with torch.no_grad():
        truth = {ids: score(transducer, encoded, ids) for n in range(1, 5) for ids in
                 itertools.product(range(1, LABELS), repeat=n)}  # fmt: skip
    truth = dict(sorted(truth.items(), key=lambda item: -item[1])[:25])
    level = truth[next(iter(truth))] - found[next(iter(truth))]
    for ids, value in truth.items():
        assert found[ids] + level == pytest.approx(value, abs=3e-3)
    beam.finish()
    assert tuple(one.id for one in beam.take()) == max(found, key=lambda ids: found[ids])


def test_greedy_follows_the_best_label() -> None:
    transducer, encoded = model(1), frames(60, 1)
    emissions = decode(GreedyRNNT(transducer, symbols=3), encoded)
    context, expected = [0, 0], []
    with torch.no_grad():
        for at, frame in enumerate(encoded):
            for _ in range(3):
                row = transducer.joiner(frame[None], transducer.predictor(torch.tensor([context])))[0].softmax(-1)
                token = int(row.argmax())
                if not token:
                    break
                expected.append((token, at, pytest.approx(float(row[token]))))
                context = [context[1], token]
    assert len(expected) > 10
    assert emissions == expected


def forgetful(sharp: float) -> Transducer:
    """Frames are logits themselves; a token is not said twice in a row."""
    eye = torch.eye(LABELS)
    eye[0] = 0
    return Transducer(lambda tokens: eye[tokens[:, -1]], lambda encoded, last: sharp * (encoded - 40 * last))


def speech_like(count: int, seed: int = 0) -> Tensor:
    """Mostly blanks with a token now and then, some of them doubtful."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((count, LABELS))
    logits[:, 0] += 3
    for at in np.flatnonzero(rng.random(count) < 0.4):
        logits[at, rng.integers(1, LABELS)] += rng.choice([4.0, 6.0, 9.0])
    return torch.from_numpy(logits).float()


def test_a_confident_model_decodes_alike_with_both() -> None:
    transducer, encoded = (
        forgetful(30.0),
        torch.eye(LABELS)[torch.randint(LABELS, (200,))] + torch.tensor([0.5, 0, 0, 0]),
    )
    greedy = decode(GreedyRNNT(transducer, symbols=8), encoded)
    beam = decode(BeamRNNT(transducer, RNNTBeamConfig(symbols=8)), encoded)
    assert len(greedy) > 20
    assert [(one.id, one.frame) for one in beam] == [(one.id, one.frame) for one in greedy]


DECODERS: dict[str, Callable[[], Decoder]] = {
    "greedy": lambda: GreedyRNNT(forgetful(1.0)),
    "beam": lambda: BeamRNNT(forgetful(1.0)),
    "narrow": lambda: BeamRNNT(forgetful(1.0), RNNTBeamConfig(size=2, pending=3)),
    "hotwords": lambda: BeamRNNT(forgetful(1.0), scorers=[Hotwords(["ab"], [" ", "a", "b"])]),
}


@pytest.mark.parametrize("name", DECODERS)
def test_packets_and_snapshots_change_nothing(name: str) -> None:
    make, encoded = DECODERS[name], speech_like(120, 3)
    whole = decode(make(), encoded)
    assert len(whole) > 10
    assert [one.frame for one in whole] == sorted(one.frame for one in whole)
    rng = np.random.default_rng(0)
    decoder, taken, at = make(), [], 0
    while at < len(encoded):
        size = int(rng.integers(0, 9))
        decoder.advance(encoded[at : at + size])
        if rng.random() < 0.5:
            taken += decoder.take()
        blob = json.dumps(decoder.state())
        decoder = make()
        decoder.load(json.loads(blob))
        at += size
    decoder.finish()
    assert taken + decoder.take() == whole


def test_a_frame_says_so_many_tokens_and_no_more() -> None:
    never_blank = Transducer(
        lambda tokens: torch.zeros(len(tokens), 1), lambda e, p: torch.tensor([[-20.0, 0.0]]) + 0 * p
    )
    assert len(decode(GreedyRNNT(never_blank, symbols=2), torch.zeros(5, 1))) == 10
    assert len(decode(BeamRNNT(never_blank, RNNTBeamConfig(size=2, symbols=2)), torch.zeros(5, 1))) <= 10
    with pytest.raises(ValueError, match="symbols"):
        GreedyRNNT(never_blank, symbols=0)


def test_nan_and_other_shapes_are_refused() -> None:
    for decoder in (GreedyRNNT(model()), BeamRNNT(model())):
        with pytest.raises(ValueError, match="NaN"):
            decoder.advance(torch.full((1, WIDTH), torch.nan))
        with pytest.raises(ValueError, match="shape"):
            decoder.advance(torch.zeros(WIDTH))
