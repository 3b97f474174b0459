from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from Bio.Seq import Seq

from seqssm.data.dna import report as module
from seqssm.data.dna.indexing import Sequences
from seqssm.data.dna.library import Library
from seqssm.data.dna.report import overlapping, shared_kmers, shared_sequences
from seqssm.data.dna.sampling import Windows


def make(letters: list[str]) -> tuple[Library, Windows]:
    library = Library()
    names = [f"r{i}" for i in range(len(letters))]
    library.add(Sequences.from_records((n, s.encode()) for n, s in zip(names, letters, strict=True)), names)
    zeros = np.zeros(len(letters), np.int64)
    lengths = np.array([len(s) for s in letters])
    return library, Windows(
        np.arange(len(letters)), zeros, lengths, zeros, zeros, zeros > 0, np.array(names), np.array(["g"])
    )


def spans(rows: list) -> Windows:
    record, start, end = np.array(rows).reshape(-1, 3).T
    zeros = np.zeros(len(rows), np.int64)
    return Windows(record, start, end - start, zeros, zeros, zeros > 0, np.array(["a", "b"]), np.array(["g"]))


def test_shared_sequences_are_found_on_either_strand_whatever_their_case(random_dna: Callable[..., str]) -> None:
    a, b, c, d = (random_dna(200, seed) for seed in range(4))
    turned = str(Seq(c).reverse_complement())
    library, windows = make([a, b, c, d[:150], a.lower(), turned, d[:100], b[:199] + ("A" if b[199] != "A" else "C")])
    train, test = windows[np.arange(4)], windows[np.arange(4, 8)]
    shared = shared_sequences(library, {"train": train, "test": test})
    assert shared["train", "test"].tolist() == [True, False, True, False]
    assert shared["test", "train"].tolist() == [True, True, False, False]


def test_long_sequences_are_hashed_in_blocks_alike(
    random_dna: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = random_dna(5000, 1), random_dna(5000, 2)
    library, windows = make([a, b, str(Seq(b).reverse_complement()), random_dna(5000, 3)])
    halves = {"train": windows[np.arange(2)], "test": windows[np.arange(2, 4)]}
    monkeypatch.setattr(module, "BLOCK_BP", 32)
    assert shared_sequences(library, halves)["train", "test"].tolist() == [False, True]


def test_overlaps_equal_a_count_by_hand() -> None:
    rng = np.random.default_rng(0)
    first, second = (
        np.stack([rng.integers(0, 2, 40), start := rng.integers(0, 900, 40), start + rng.integers(1, 12, 40)], 1)
        for _ in range(2)
    )
    by_hand = sum(any(r == q and s < f and t < e for q, t, f in second) for r, s, e in first)
    assert 0 < by_hand < 40
    assert overlapping(spans(first.tolist()), spans(second.tolist())) == by_hand
    assert overlapping(spans([(0, 0, 10)]), spans([(0, 10, 20), (1, 0, 10)])) == 0
    assert overlapping(spans([(0, 0, 10)]), spans([])) == 0
    # a long region that begins early reaches past later short ones
    assert overlapping(spans([(0, 80, 90)]), spans([(0, 0, 100), (0, 10, 20)])) == 1


def kmers_of(letters: str, both_strands: bool) -> set[str]:
    strands = (letters, str(Seq(letters).reverse_complement())) if both_strands else (letters,)
    return {s[i : i + 31] for s in strands for i in range(len(s) - 30) if "N" not in s[i : i + 31]}


@pytest.mark.parametrize("block_bp", [50, 1 << 16])
def test_shared_kmers_estimate_the_true_share(
    random_dna: Callable[..., str], monkeypatch: pytest.MonkeyPatch, block_bp: int
) -> None:
    common = random_dna(30_000, 1)
    train = [random_dna(20_000, 2), str(Seq(common[:20_000]).reverse_complement()), common[20_000:] + "N" * 50]
    test = [random_dna(30_000, 3), common[:15_000] + "N" + common[15_000:]]
    library, windows = make(train + test)
    wanted = set.union(*(kmers_of(s, False) for s in test))
    truth = len(wanted & set.union(*(kmers_of(s, True) for s in train))) / len(wanted)
    monkeypatch.setattr(module, "BLOCK_BP", block_bp)
    got = shared_kmers(library, windows[np.arange(3)], {"test": windows[np.arange(3, 5)]})["test"]
    assert 0.4 < truth < 0.6
    assert got == pytest.approx(truth, abs=0.05)  # about 900 k-mers: a standard error of 0.017
    none = shared_kmers(library, windows[np.arange(1)], {"test": windows[np.arange(3, 4)]})
    assert none["test"] == 0.0


def test_every_kmer_is_seen_whatever_the_block(random_dna: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    library, windows = make([random_dna(20_000, 1)])
    for block_bp in (40, 1000, 1 << 16):
        monkeypatch.setattr(module, "BLOCK_BP", block_bp)
        assert shared_kmers(library, windows, {"test": windows})["test"] == 1.0
    inner = replace(windows, start_bp=np.array([777]), length=np.array([5000]))
    assert shared_kmers(library, windows, {"test": inner})["test"] == 1.0


def test_splits_longer_than_the_cap_are_scanned_in_part(
    random_dna: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK_BP", 500)
    monkeypatch.setattr(module, "SCANNED_BP", 20_000)
    library, windows = make([random_dna(40_000, 1)])
    half = replace(windows, start_bp=np.array([0]), length=np.array([19_999]))
    share = shared_kmers(library, windows, {"test": half})["test"]
    assert 0.35 < share < 0.65  # every other block of train: a lower bound
