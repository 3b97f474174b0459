"""The recogniser's encoder, losses and training."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from seqssm.backbone import BackboneConfig
from seqssm.data.features import FeatureConfig
from seqssm.data.speech.batches import SpeechBatch
from seqssm.errors import UserError
from seqssm.tasks.asr import StreamingASR
from seqssm.tasks.asr_layers import SUBSAMPLING, spellable
from seqssm.tasks.base import CHECKPOINT_KEY, load_task

TOKENIZER = {"kind": "characters", "characters": " abc"}
FEATURES = FeatureConfig(n_mels=16, mean=-6.0, std=4.0)
MIXERS = {
    "m": {"class_path": "Mamba"},
    "s": {"class_path": "Mamba2", "init_args": {"headdim": 16, "d_state": 8}},
    "a": {"class_path": "Attention", "init_args": {"heads": 2, "window": 8}},
}


def make_task(pattern: str = "m", n_layers: int = 2, **arguments: Any) -> StreamingASR:
    torch.manual_seed(0)
    config = BackboneConfig(d_model=16, n_layers=n_layers, mixers=MIXERS, pattern=pattern)
    return StreamingASR(TOKENIZER, features=FEATURES, backbone=config, stem_channels=4, **arguments)


def batch(lengths: list[int], texts: list[str]) -> SpeechBatch:
    torch.manual_seed(1)
    ids = [[" abc".index(c) + 1 for c in text] for text in texts]
    tokens = torch.zeros(len(ids), max(map(len, ids)), dtype=torch.long)
    for row, one in zip(tokens, ids, strict=True):
        row[: len(one)] = torch.tensor(one, dtype=torch.long)
    features = torch.randn(len(lengths), max(lengths), FEATURES.n_mels)
    return SpeechBatch(features, torch.tensor(lengths), tokens, torch.tensor([len(one) for one in ids]))


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["m", "sma"])
def test_padding_and_neighbours_change_nothing(pattern: str) -> None:
    task = make_task(pattern, 3).eval()
    features, lengths = torch.randn(4, 90, 16), torch.tensor([90, 41, 3, 1])
    for choice in range(4):
        log_probs, tokens = task(features, lengths, choice)
        assert tokens.tolist() == [23, 11, 1, 1]
        for i, length in enumerate(lengths.tolist()):
            alone, _ = task(features[i : i + 1, :length], lengths[i : i + 1], choice)
            torch.testing.assert_close(log_probs[i, : tokens[i]], alone[0], rtol=1e-4, atol=1e-5)
    mixed, _ = task(features, lengths, torch.tensor([3, 1, 0, 2]))
    torch.testing.assert_close(mixed[1], task(features, lengths, 1)[0][1], rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("choice", [0, 1, 2, 3])
def test_a_token_sees_its_lookahead_and_nothing_beyond(choice: int) -> None:
    task = make_task("m", 3).eval()
    delay = task.lookahead.menu[choice]
    features, lengths = torch.randn(1, 160, 16), torch.tensor([160])
    before, _ = task(features, lengths, choice)
    frame = 4 * 25  # the first one of token 25
    features[:, frame:] += 1.0
    after, _ = task(features, lengths, choice)
    changed = (before != after).any(-1)[0].nonzero().squeeze(1)
    assert int(changed[0]) == 25 - delay


def test_losses_are_those_of_the_parts() -> None:
    task = make_task(rnnt_weight=0.5, intermediate_weight=0.3)
    task.eval()
    one = batch([90, 60, 30], ["abc a", "b", ""])
    parts = task.losses(one, 2)
    expected = 0.5 * (0.7 * parts["ctc"] + 0.3 * parts["intermediate"]) + 0.5 * parts["rnnt"]
    torch.testing.assert_close(parts["loss"], expected)
    assert all(math.isfinite(value.item()) for value in parts.values())
    parts["loss"].backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in task.parameters())


@torch.no_grad()
def brute_force_transducer(log_probs: Tensor, tokens: list[int]) -> float:
    """Probability of a transcript by Graves (2012), equation 16: alpha(t, u) (t, u + 1, v)."""
    alpha = {(0, 0): 0.0}
    frames, count = log_probs.shape[0], len(tokens)
    for t in range(frames):
        for u in range(count + 1):
            ways = []
            if t:
                ways.append(alpha[t - 1, u] + float(log_probs[t - 1, u, 0]))
            if u:
                ways.append(alpha[t, u - 1] + float(log_probs[t, u - 1, tokens[u - 1]]))
            if ways:
                alpha[t, u] = float(torch.logsumexp(torch.tensor(ways, dtype=torch.float64), 0))
    return -(alpha[frames - 1, count] + float(log_probs[frames - 1, count, 0]))


def test_the_transducer_loss_is_that_of_all_alignments_also_with_more_tokens_than_positions() -> None:
    task = make_task(rnnt_weight=1.0, intermediate_weight=0.0).eval()
    one = batch([8], ["abc"])  # two positions
    assert task.predictor is not None
    assert task.joiner is not None
    encoding = task.encode(one.features, one.lengths, 1)
    history = task.predictor.history(one.tokens)
    assert history.tolist() == [[[0, 0], [0, 2], [2, 3], [3, 4]]]
    logits = task.joiner(encoding.encoded[:, :, None], task.predictor(history)[:, None])
    expected = brute_force_transducer(logits[0].log_softmax(-1), [2, 3, 4]) / 3
    assert task.losses(one, 1)["rnnt"].item() == pytest.approx(expected, rel=1e-4)
    assert task.losses(one, 1)["ctc"] == 0  # CTC cannot spell it
    assert not spellable(task.subsampling.tokens(one.lengths), one.tokens, one.token_lengths).any()


def test_spellable_counts_the_blank_between_equal_tokens() -> None:
    tokens = torch.tensor([[1, 1, 2, 0], [1, 2, 1, 0], [0, 0, 0, 0]])
    assert spellable(torch.tensor([3, 3, 0]), tokens, torch.tensor([3, 3, 0])).tolist() == [False, True, True]


def test_a_few_utterances_are_learnt_by_heart() -> None:
    task = make_task(dropout=0.0)
    torch.manual_seed(3)
    words = ["ab", "ca b", "bb", "c"]
    templates = {c: torch.randn(12, 16) for c in "abc "}
    features = [torch.cat([templates[c] for c in text]) for text in words]
    lengths = torch.tensor([len(one) for one in features])
    padded = torch.nn.utils.rnn.pad_sequence(features, batch_first=True)
    one = batch(lengths.tolist(), words)._replace(features=padded)
    optimizer = torch.optim.AdamW(task.parameters(), 1e-2)
    for step in range(80):
        loss = task.losses(one, step % 4)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    task.eval()
    with torch.no_grad():
        for choice in range(4):
            assert task.transcribe(*task(one.features, one.lengths, choice)) == words


def test_a_checkpoint_holds_all_that_the_model_is(tmp_path: Path) -> None:
    task = make_task("ms", 3, lookahead_after=1, rnnt_weight=0.3, lookahead_ms=[0, 40, 200], eval_lookahead_ms=40)
    torch.save({CHECKPOINT_KEY: task.describe(), "state_dict": task.state_dict()}, tmp_path / "x.ckpt")
    again = load_task(tmp_path / "x.ckpt", StreamingASR)
    assert again.init_args() == task.init_args()
    assert again.eval_choice == 1
    features, lengths = torch.randn(1, 50, 16), torch.tensor([50])
    with torch.no_grad():
        assert torch.equal(again(features, lengths)[0], task.eval()(features, lengths)[0])


def test_patterns_go_on_above_the_lookahead() -> None:
    task = make_task("mms", 4, lookahead_after=2)
    assert task.upper is not None
    kinds = [type(block.mixer).__name__ for part in (task.backbone, task.upper) for block in part.blocks]
    assert kinds == ["Mamba", "Mamba", "Mamba2", "Mamba"]
    assert make_task("m", 2, lookahead_after=2).upper is None
    assert SUBSAMPLING * FEATURES.hop_ms == 40


BAD = {
    "no multiple": ({"lookahead_ms": [0, 50]}, "multiples of a token's 40 ms"),
    "twice": ({"lookahead_ms": [80, 80]}, "different times"),
    "none": ({"lookahead_ms": [80], "eval_lookahead_ms": 320}, "was trained with 80 ms"),
    "layer": ({"lookahead_after": 3}, "between 1 and 2 layers"),
    "weight": ({"intermediate_weight": 1.0}, "intermediate_weight must lie"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_task(**arguments)


def test_a_model_that_reads_both_ways_is_refused() -> None:
    with pytest.raises(UserError, match="bidirectional: none"):
        StreamingASR(TOKENIZER, backbone=BackboneConfig(d_model=16, n_layers=2, bidirectional="tied"))
