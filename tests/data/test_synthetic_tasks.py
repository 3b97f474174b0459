"""The synthetic problems: their answers by brute force, seeds, lengths, and what is refused."""

from importlib import resources
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from seqssm.data import synthetic_tasks
from seqssm.data.synthetic_tasks import (
    AssociativeRecall,
    InductionHeads,
    Needle,
    SelectiveCopying,
    SyntheticDataModule,
)
from seqssm.errors import UserError

SHORT: dict[str, Any] = {"train_lengths": [64], "test_lengths": [100, 257], "test_sequences": 12, "eval_tokens": 800}


@pytest.mark.parametrize("length", [4, 5, 64, 257])
def test_induction_heads_ask_for_what_followed_the_trigger(length: int) -> None:
    batch = InductionHeads(vocabulary=5, **SHORT).batch(np.random.default_rng(0), 200, length)
    assert batch.tokens.shape == (200, length)
    for row, (target,) in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        assert row.count(5) == 2
        assert row[-1] == 5
        assert row[row.index(5) + 1] == target < 5
    if length > 5:
        assert set(batch.targets.flatten().tolist()) == set(range(5))


@pytest.mark.parametrize("length", [8, 9, 64])
def test_selective_copying_asks_for_the_tokens_without_the_noise(length: int) -> None:
    batch = SelectiveCopying(vocabulary=6, memorize=4, **SHORT).batch(np.random.default_rng(0), 50, length)
    for row, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        assert row[-4:] == [7] * 4
        assert [token for token in row[:-4] if token < 6] == targets
        assert row[:-4].count(6) == length - 8


@pytest.mark.parametrize("length", [10, 11, 64])
def test_associative_recall_asks_for_the_value_of_a_key(length: int) -> None:
    batch = AssociativeRecall(keys=5, pairs=3, **SHORT).batch(np.random.default_rng(0), 100, length)
    for row, (target,) in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        at = [i for i, token in enumerate(row[:-1]) if token < 5]
        pairs = {row[i]: row[i + 1] for i in at}
        assert len(pairs) == len(at) == 3
        assert all(5 <= value < 10 for value in pairs.values())
        assert pairs[row[-1]] == target
        assert row.count(10) == length - 7


@pytest.mark.parametrize("length", [51, 64, 300])
def test_the_needles_order_is_the_label_and_their_counts_say_nothing(length: int) -> None:
    data = Needle(motif_bp=16, **SHORT)
    batch = data.batch(np.random.default_rng(0), 40, length)
    assert batch.labels.tolist().count(0) == 20
    assert batch.lengths.tolist() == [length] * 40
    a, b = (motif.tobytes() for motif in data.motifs)
    for row, label in zip(batch.tokens.numpy(), batch.labels.tolist(), strict=True):
        text = row.tobytes()
        first, second = (text.find(a), text.find(b)) if label == 0 else (text.find(b), text.find(a))
        assert 0 <= first <= length // 3 - 16
        assert length - length // 3 <= second <= length - 16
        assert text.count(a) == text.count(b) == 1
    again = Needle(motif_bp=16, seed=1, **SHORT)
    assert not np.array_equal(again.motifs, data.motifs)


def test_epochs_are_seeded_and_draw_every_length_at_constant_tokens() -> None:
    def module(**changes: Any) -> SyntheticDataModule:
        return InductionHeads(train_lengths=[16, 32, 64], tokens_per_step=128, steps_per_epoch=30, **changes)

    first, again, other = (list(data.train_dataloader()) for data in (module(), module(), module(seed=1)))
    assert {tuple(batch.tokens.shape) for batch in first} == {(8, 16), (4, 32), (2, 64)}
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(first, again, strict=True))
    assert not all(
        a.tokens.shape == b.tokens.shape and torch.equal(a.tokens, b.tokens) for a, b in zip(first, other, strict=True)
    )
    loader = module().train_dataloader()
    batches = iter(loader)
    seen = [next(batches) for _ in range(7)]
    resumed = module().train_dataloader()
    resumed.load_state_dict(loader.state_dict())
    assert torch.equal(next(iter(resumed)).tokens, first[7].tokens)
    assert torch.equal(seen[6].tokens, first[6].tokens)
    loader.sampler.set_epoch(1)
    assert not torch.equal(next(iter(loader)).tokens, first[0].tokens)


def test_evaluation_goes_over_every_length() -> None:
    data = InductionHeads(**SHORT)
    shapes = [tuple(batch.tokens.shape) for batch in data.test_dataloader()]
    assert shapes == [(8, 100), (4, 100), (3, 257), (3, 257), (3, 257), (3, 257)]
    assert [tuple(batch.tokens.shape) for batch in data.val_dataloader()] == 21 * [(12, 64)] + [(4, 64)]


def test_the_shipped_settings_work() -> None:
    configs = sorted(resources.files("seqssm.configs").joinpath("synthetic").iterdir(), key=lambda path: path.name)
    assert len(configs) == 4
    for config in configs:
        section = yaml.safe_load(config.read_text())["data"]
        data = getattr(synthetic_tasks, section["class_path"])(**section["init_args"])
        assert data.test_lengths[-1] == 2**20
        assert len(next(iter(data.train_dataloader())).tokens) >= 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InductionHeads(vocabulary=256), "vocabulary is 256"),
        (lambda: InductionHeads(train_lengths=[3]), "train_lengths has 3: a sequence of this problem takes 4"),
        (lambda: SelectiveCopying(memorize=16, train_lengths=[31]), "takes 32 tokens"),
        (lambda: AssociativeRecall(keys=4, pairs=5), "pairs is 5, keys 4"),
        (lambda: Needle(motif_bp=3), "motif_bp is 3"),
        (lambda: Needle(test_lengths=[50]), "test_lengths has 50"),
        (lambda: InductionHeads(steps_per_epoch=0), "steps_per_epoch is 0"),
    ],
)
def test_settings_that_do_not_work_are_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_a_single_sequence_has_either_label() -> None:
    data = Needle(motif_bp=16, **SHORT)
    labels = [int(data.batch(np.random.default_rng(seed), 1, 256).labels) for seed in range(40)]
    assert 10 <= sum(labels) <= 30
    assert abs(int(data.batch(np.random.default_rng(0), 7, 256).labels.sum()) - 3.5) == 0.5
