import pickle
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from seqssm.data.dna.alphabet import PAD, N, decode, encode, reverse_complement
from seqssm.data.dna.indexing import Sequences
from seqssm.data.dna.library import Library
from seqssm.data.dna.sampling import (
    Sample,
    TrainingDataset,
    WindowDataset,
    Windows,
    collate,
    grid_windows,
    within_n_cap,
)
from seqssm.data.loading import EpochSampler, ResumableLoader, ShardSampler
from seqssm.errors import UserError


def make(letters: list[str], labels: list[int]) -> tuple[Library, Windows]:
    """A library and its records as whole regions."""
    library = Library()
    names = [f"r{i}" for i in range(len(letters))]
    library.add(Sequences.from_records((n, s.encode()) for n, s in zip(names, letters, strict=True)), names)
    count = np.arange(len(letters))
    return library, Windows(
        record_id=count,
        start_bp=np.zeros(len(letters), np.int64),
        length=np.array([len(s) for s in letters]),
        label=np.array(labels),
        group_id=count,
        minus=np.zeros(len(letters), bool),
        record_names=np.array(names),
        group_names=np.array(names),
    )


def spans(windows: Windows) -> list[tuple[str, int, int]]:
    return list(zip(windows.record.tolist(), windows.start_bp.tolist(), windows.end_bp.tolist(), strict=True))


def test_grid_holds_whole_windows_at_every_stride() -> None:
    _, regions = make(["A" * 10, "A" * 3, "A" * 4], [0, 0, 1])
    assert spans(grid_windows(regions, 4, None, None)) == [("r0", 0, 4), ("r0", 4, 8), ("r2", 0, 4)]
    assert spans(grid_windows(regions, 4, 3, None)) == [("r0", 0, 4), ("r0", 3, 7), ("r0", 6, 10), ("r2", 0, 4)]
    assert spans(grid_windows(regions, 4, None, 3))[2] == ("r1", 0, 3)
    assert spans(grid_windows(regions, None, None, None)) == [("r0", 0, 10), ("r1", 0, 3), ("r2", 0, 4)]
    assert grid_windows(regions, 4, None, None).label.tolist() == [0, 0, 1]


def test_n_cap_counts_ambiguous_letters_and_never_passes_n_alone() -> None:
    library, regions = make(["ACGT", "ACNN", "ACRN", "ANNN", "NNNN"], [0] * 5)
    assert within_n_cap(regions, library, 0.5).tolist() == [True, True, True, False, False]
    assert within_n_cap(regions, library, 1.0).tolist() == [True, True, True, True, False]
    assert within_n_cap(regions, library, 0.0).tolist() == [True, False, False, False, False]


@pytest.fixture
def training(random_dna: Callable[..., str]) -> Callable[..., TrainingDataset]:
    letters = [random_dna(5000, 1), "N" * 3000 + random_dna(2000, 2), random_dna(300, 3)]
    library, regions = make(letters, [0, 1, 1])

    def build(**changes) -> TrainingDataset:  # type: ignore[no-untyped-def]
        arguments = {
            "windows_per_epoch": 200,
            "seed": 5,
            "window_bp": 100,
            "random_start": True,
            "balance": True,
            "rc_probability": 0.5,
            "max_n_fraction": 0.2,
            **changes,
        }
        return TrainingDataset(library, regions, **arguments)

    return build


def test_random_windows_are_balanced_in_bounds_and_under_the_n_cap(training: Callable[..., TrainingDataset]) -> None:
    dataset = training()
    assert Counter(dataset.windows.label.tolist()) == {0: 100, 1: 100}
    starts = dataset.windows.start_bp
    assert ((starts >= 0) & (dataset.windows.end_bp <= np.array([5000, 5000, 300])[dataset.windows.record_id])).all()
    for i in range(200):
        sample = dataset[i]
        expected = dataset.library.tokens(int(dataset.windows.record_id[i]), int(starts[i]), int(starts[i]) + 100)
        assert np.array_equal(sample.tokens, expected)
        assert (sample.tokens == N).mean() <= 0.2
        assert sample.label == dataset.windows.label[i]
    # of class 1, r1 offers about 2,000 starts and r2 201
    from_short = (dataset.windows.record_id == 2).sum()
    assert 1 <= from_short <= 30


def test_items_depend_on_seed_and_index_alone(training: Callable[..., TrainingDataset]) -> None:
    one, other = training(), training()
    order = np.random.default_rng(0).permutation(600)
    forward = {i: one[i] for i in range(600)}
    for i in order[:100].tolist():
        again = other[i]
        assert np.array_equal(again.tokens, forward[i].tokens)
        assert again[1:] == forward[i][1:]
    epochs = [tuple(one[i + e * 200].tokens.tobytes() for i in range(20)) for e in range(3)]
    assert len(set(epochs)) == 3
    assert not np.array_equal(training(seed=6)[0].tokens, one[0].tokens)
    assert 60 < sum(forward[i].flip for i in range(200)) < 140


@pytest.mark.parametrize("case", [False, True])
def test_a_batch_read_at_once_holds_what_its_items_hold(training: Callable[..., TrainingDataset], case: bool) -> None:
    one, many = (training(windows_per_epoch=10, rc_probability=0.5, case=case) for _ in range(2))
    for indices in ([3, 0, 7, 7], [12], [8, 9, 10, 11]):  # the last from two epochs
        for alone, together in zip([one[i] for i in indices], many.__getitems__(indices), strict=True):
            np.testing.assert_array_equal(alone.tokens, together.tokens)
            assert (alone.label, alone.flip, alone.lower is None) == (together.label, together.flip, not case)
    library, regions = make(["ACGTA", "ACG", "GGGTT"], [0, 1, 2])  # of two lengths
    dataset = WindowDataset(library, regions)
    for indices in ([2, 1, 0], [2, 0]):
        for i, together in zip(indices, dataset.__getitems__(indices), strict=True):
            np.testing.assert_array_equal(dataset[i].tokens, together.tokens)
            assert dataset[i].label == together.label


def test_fixed_windows_come_once_before_any_comes_again(training: Callable[..., TrainingDataset]) -> None:
    library = training().library
    regions = grid_windows(training().candidates, 100, None, None)  # 50 + 50 + 3 windows
    dataset = TrainingDataset(library, regions, windows_per_epoch=103, seed=1)
    for epoch in range(2):
        assert sorted(spans(dataset.draw(epoch)[0])) == sorted(spans(regions))
    assert spans(dataset.draw(0)[0]) != spans(dataset.draw(1)[0])
    partial = TrainingDataset(library, regions, windows_per_epoch=40, seed=1)
    seen = [span for epoch in range(5) for span in spans(partial.draw(epoch)[0])]
    assert set(Counter(seen[:103]).values()) == {1}
    assert max(Counter(seen).values()) == 2
    balanced = TrainingDataset(library, regions, windows_per_epoch=100, seed=1, balance=True)
    assert Counter(balanced.windows.label.tolist()) == {0: 50, 1: 50}


def test_windows_of_n_only_end_in_an_error_not_in_a_loop() -> None:
    library, regions = make(["N" * 1000, "N" * 1000], [0, 1])
    with pytest.raises(UserError, match="raise max_n_fraction"):
        TrainingDataset(library, regions, windows_per_epoch=4, seed=0, window_bp=10, random_start=True)


def test_collate_pads_right_and_turns_marked_rows() -> None:
    batch = collate([Sample(encode("ACGTT"), 1, True), Sample(encode("GGA"), 0, True), Sample(encode("AC"), 2, False)])
    assert [decode(row) for row in batch.tokens] == ["AACGT", "TCC..", "AC..."]
    assert batch.tokens.dtype == torch.uint8
    assert batch.tokens[2, 4] == PAD
    assert batch.lengths.tolist() == [5, 3, 2]
    assert batch.labels.tolist() == [1, 0, 2]


def test_flipped_samples_are_the_other_strand_of_the_same_window(training: Callable[..., TrainingDataset]) -> None:
    flipped, plain = training(rc_probability=1.0), training(rc_probability=0.0)
    turned = collate([flipped[i] for i in range(8)])
    straight = collate([plain[i] for i in range(8)])
    assert torch.equal(turned.tokens, reverse_complement(straight.tokens))


def loader_of(dataset: TrainingDataset, ranks: int = 1, rank: int = 0, workers: int = 0) -> ResumableLoader:
    sampler = EpochSampler(dataset, 16, ranks, rank)
    return ResumableLoader(dataset, batch_size=16, sampler=sampler, collate_fn=collate, num_workers=workers)


def test_ranks_share_an_epoch_without_overlap(training: Callable[..., TrainingDataset]) -> None:
    dataset = training()
    samplers = [EpochSampler(dataset, 16, 3, rank) for rank in range(3)]
    for sampler in samplers:
        sampler.set_epoch(2)
    items = [list(sampler) for sampler in samplers]
    assert [len(own) for own in items] == [64, 64, 64]  # of 66, four batches
    assert sorted(i for own in items for i in own) == list(range(400, 592))


def test_workers_change_nothing(training: Callable[..., TrainingDataset]) -> None:
    dataset = training(windows_per_epoch=64)
    alone, helped = loader_of(dataset), loader_of(dataset, workers=2)
    for epoch in (0, 1):
        alone.sampler.set_epoch(epoch)
        helped.sampler.set_epoch(epoch)
        for a, b in zip(alone, helped, strict=True):
            assert torch.equal(a.tokens, b.tokens)
            assert torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("after", [0, 5, 12])
def test_a_loader_resumes_behind_the_last_batch(training: Callable[..., TrainingDataset], after: int) -> None:
    def read(loader: ResumableLoader, epochs: list[int]) -> list[torch.Tensor]:
        batches = []
        for epoch in epochs:
            loader.sampler.set_epoch(epoch)
            batches += [batch.tokens for batch in loader]
        return batches

    whole = read(loader_of(training()), [0, 1, 2])
    assert len(whole) == 36
    first = loader_of(training())
    first.sampler.set_epoch(1)
    iterator = iter(first)
    for _ in range(after):
        next(iterator)
    state = pickle.loads(pickle.dumps(first.state_dict())) if after else {"epoch": 1, "batches": 0}
    second = loader_of(training())
    second.load_state_dict(state)
    rest = read(second, [2] if after == 12 else [1, 2])
    assert len(rest) == 36 - 12 - after
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[12 + after :], strict=True))


def test_shards_cover_every_window_once_in_order(training: Callable[..., TrainingDataset]) -> None:
    library = training().library
    dataset = WindowDataset(library, grid_windows(training().candidates, 100, None, None))
    assert list(ShardSampler(dataset)) == list(range(103))
    shards = [list(ShardSampler(dataset, 4, rank)) for rank in range(4)]
    assert sorted(i for own in shards for i in own) == list(range(103))
    assert [len(ShardSampler(dataset, 4, rank)) for rank in range(4)] == [26, 26, 26, 25]
    batches = list(DataLoader(dataset, batch_size=16, sampler=ShardSampler(dataset), collate_fn=collate))
    assert torch.cat([b.labels for b in batches]).tolist() == dataset.windows.label.tolist()
