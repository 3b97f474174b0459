from collections import Counter
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from seqssm.errors import UserError
from seqssm.tasks import cnn
from seqssm.tasks.baselines import (
    CompositionRegression,
    Majority,
    Windows,
    default_baselines,
    run_baselines,
    select_baselines,
)
from seqssm.tasks.cnn import ConvolutionalNetwork, SmallCNN
from seqssm.tasks.kmers import canonical_kmers

COMPLEMENT = str.maketrans("ACGT", "TGCA")


def tokens(text):
    return np.array(["ACGTN.".index(letter) for letter in text], np.uint8)


def letters(sequence):
    return "".join("ACGTN."[token] for token in sequence)


def turned(sequence):
    return np.where(sequence < 4, 3 - sequence, sequence)[::-1].astype(np.uint8)


def random_windows(n, length, seed=0, n_share=0.0):
    rng = np.random.default_rng(seed)
    sequences = rng.integers(0, 4, (n, length)).astype(np.uint8)
    sequences[rng.random(sequences.shape) < n_share] = 4
    return sequences


def counted_by_hand(text, k):
    """Canonical k-mer -> share."""
    counts = Counter()
    for i in range(len(text) - k + 1):
        kmer = text[i : i + k]
        if set(kmer) <= set("ACGT"):
            counts[min(kmer, kmer.translate(COMPLEMENT)[::-1])] += 1
    return {kmer: count / sum(counts.values()) for kmer, count in counts.items()}


@pytest.mark.parametrize("k", [1, 2, 3, 4, 6])
def test_kmers_equal_a_brute_force_count(k):
    sequences = [*random_windows(4, 150, n_share=0.05), tokens("ACGTNNACG.."), tokens("A" * 30)]
    names = sorted({min(w, w.translate(COMPLEMENT)[::-1]) for w in map("".join, product("ACGT", repeat=k))})
    shares = canonical_kmers(sequences, k)
    assert shares.shape == (len(sequences), len(names))
    for sequence, row in zip(sequences, shares, strict=True):
        expected = counted_by_hand(letters(sequence), k)
        np.testing.assert_allclose(row, [expected.get(name, 0) for name in names], atol=1e-7)


def test_both_strands_have_the_same_kmers():
    sequences = random_windows(3, 500, n_share=0.02)
    for k in (1, 2, 3, 5, 6):
        both = canonical_kmers([sequences[0], turned(sequences[0])], k)
        np.testing.assert_array_equal(both[0], both[1])


def test_a_sequence_without_a_kmer_gives_zeros():
    np.testing.assert_array_equal(canonical_kmers([tokens("ACNAC"), tokens("")], 3), np.zeros((2, 32)))
    with pytest.raises(ValueError, match="k is 9"):
        canonical_kmers([tokens("ACGT")], 9)


def composition_windows(n, seed, length=200, rare=0.5):
    """Two classes whose GC shares are 0.455 and 0.545: the best of all classifiers is right for 89.9% of them."""
    rng = np.random.default_rng(seed)
    labels = (rng.random(n) < rare).astype(np.int64)
    strong = rng.random((n, length)) < np.where(labels, 0.545, 0.455)[:, None]
    side = rng.random((n, length)) < 0.5
    return Windows(np.where(strong, np.where(side, 1, 2), np.where(side, 0, 3)).astype(np.uint8), labels)


def motif_windows(n, seed, length=60, at=None, turn=False):
    """Class 1 holds a motif, anywhere or at one place, on either strand or one; the rest is random."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    sequences = rng.integers(0, 4, (n, length)).astype(np.uint8)
    for row in np.flatnonzero(labels):
        start = rng.integers(0, length - 10) if at is None else at
        sequences[row, start : start + 10] = tokens("TATAAAGCGC")
        if turn and rng.random() < 0.5:
            sequences[row] = turned(sequences[row])
    return Windows(sequences, labels)


def accuracy(baseline, windows):
    return (baseline.predict_proba(windows).argmax(1) == windows.labels).mean()


def test_majority_predicts_the_shares_of_training():
    train = Windows(random_windows(10, 20), np.array([1, 1, 1, 1, 1, 1, 0, 0, 0, 0]))
    probabilities = Majority(3).fit(train, train).predict_proba(train)
    np.testing.assert_allclose(probabilities, np.tile([0.4, 0.6, 0], (10, 1)))


@pytest.mark.parametrize("candidates", [[(1, 2)], [(3,), (4,)]])
def test_regression_comes_near_the_best_possible(candidates):
    train, validation, test = (composition_windows(n, seed) for seed, n in enumerate((1500, 400, 3000)))
    baseline = CompositionRegression("composition", candidates, 2).fit(train, validation)
    assert 0.87 < accuracy(baseline, test) < 0.92


def test_regression_chooses_on_the_validation_windows():
    train, validation, test = (motif_windows(400, seed, length=200) for seed in range(3))
    seen = []
    baseline = CompositionRegression("k-mers", [(2,), (3,), (5,)], 2).fit(train, validation, seen.append)
    assert baseline.settings["k"] == [5]
    assert seen == sorted(seen)
    assert seen[-1] == 1
    losses = {}
    for k in (2, 3, 5):
        alone = CompositionRegression("k-mers", [(k,)], 2).fit(train, validation)
        losses[k] = alone.settings["validation_log_loss"]
        assert losses[k] == pytest.approx(alone.log_loss(alone.predict_proba(validation), validation.labels))
    assert baseline.settings["validation_log_loss"] == min(losses.values()) == losses[5]
    assert accuracy(baseline, test) > 0.7


def test_classes_absent_from_training_get_no_probability():
    train = composition_windows(200, 0)
    shifted = Windows(train.sequences, train.labels * 2)
    probabilities = CompositionRegression("GC", [(1,)], 3).fit(shifted, shifted).predict_proba(shifted)
    np.testing.assert_array_equal(probabilities[:, 1], 0)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert (probabilities.argmax(1) == shifted.labels).mean() > 0.8


@pytest.mark.parametrize("balance", [False, True])
def test_balance_weighs_the_classes_equally(balance):
    train, test = composition_windows(1200, 0, length=60, rare=0.1), composition_windows(1000, 1, length=60)
    baseline = CompositionRegression("GC", [(1,)], 2, balance=balance).fit(train, train)
    found = baseline.predict_proba(test).argmax(1)[test.labels == 1].mean()
    assert (found > 0.6) == balance
    weights = baseline.sample_weights(train.labels)
    assert weights.mean() == pytest.approx(1)
    shares = [weights[train.labels == c].sum() / weights.sum() for c in (0, 1)]
    assert shares == pytest.approx([0.5, 0.5] if balance else [0.9, 0.1], abs=0.03)


@pytest.fixture(scope="module")
def aligned():
    """A network trained on a motif at one place."""
    train, validation = motif_windows(160, 0, at=20), motif_windows(64, 1, at=20)
    return SmallCNN(2, reverse_complement=False, epochs=3).fit(train, validation)


def test_network_learns_a_motif_at_its_place(aligned):
    assert aligned.network.bins == 8
    assert accuracy(aligned, motif_windows(200, 2, at=20)) > 0.95
    assert aligned.settings["epoch"] in range(1, 4)
    assert aligned.settings["parameters"] == sum(p.numel() for p in aligned.network.parameters())
    assert 230_000 < aligned.settings["parameters"] < 280_000


def test_network_learns_a_motif_anywhere_on_either_strand():
    def windows(n, seed):
        made = motif_windows(n, seed, turn=True)
        return Windows(
            [s[: 40 + i % 21] if not made.labels[i] else s for i, s in enumerate(made.sequences)], made.labels
        )

    network = SmallCNN(2, epochs=3).fit(windows(400, 0), windows(64, 1))
    test = windows(100, 2)
    assert network.network.bins == 1
    assert accuracy(network, test) > 0.9
    other = Windows([turned(sequence) for sequence in test.sequences], test.labels)
    np.testing.assert_allclose(network.predict_proba(other), network.predict_proba(test), atol=1e-6)


def test_predictions_do_not_depend_on_the_neighbours(aligned):
    windows = motif_windows(70, 3, at=20)
    mixed = Windows([*windows.sequences, *random_windows(5, 100)], np.append(windows.labels, [0] * 5))
    np.testing.assert_allclose(aligned.predict_proba(mixed)[:70], aligned.predict_proba(windows), atol=1e-6)


def test_padding_changes_no_logit():
    torch.manual_seed(0)
    network = ConvolutionalNetwork(3, pool=4).eval()
    sequence = torch.from_numpy(random_windows(1, 77))
    alone = network(sequence, torch.tensor([77]))
    padded = torch.cat([sequence, torch.full((1, 50), 5, dtype=torch.uint8)], 1)
    beside = torch.cat([padded, torch.from_numpy(random_windows(1, 127, seed=1))])
    torch.testing.assert_close(network(beside, torch.tensor([77, 127]))[:1], alone)


def test_turns_change_neither_logits_nor_gradients(monkeypatch):
    torch.manual_seed(0)
    network = ConvolutionalNetwork(3, pool=2, widths=(1, 1, 1), dropout=0.0)  # no context: no seams
    tokens_in = torch.from_numpy(random_windows(5, 100))
    lengths = torch.tensor([100, 33, 64, 1, 99])
    outcomes = []
    for segment_bp, max_tokens in ((2**17, 2**18), (2**17, 200), (32, 64)):
        monkeypatch.setattr(cnn, "SEGMENT_BP", segment_bp)
        network.zero_grad()
        logits = network(tokens_in, lengths, max_tokens=max_tokens)
        logits.square().sum().backward()
        outcomes.append([logits.detach(), *(p.grad.clone() for p in network.parameters())])
    for other in outcomes[1:]:
        for ours, theirs in zip(other, outcomes[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_seed_gives_the_same_network_and_leaves_the_generator_alone():
    train = motif_windows(64, 0)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, again, other = (SmallCNN(2, epochs=1, seed=s).fit(train, train).predict_proba(train) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


def test_all_baselines_run_on_the_same_windows():
    train, validation, test = (motif_windows(n, seed, at=20) for seed, n in enumerate((64, 64, 64)))
    baselines = default_baselines(2, reverse_complement=False)
    fitted = run_baselines(baselines, train, validation, test)
    assert list(fitted) == ["majority", "GC + dinucleotides", "k-mers", "small CNN"]
    for name, outcome in fitted.items():
        assert outcome.probabilities.shape == (64, 2), name
        np.testing.assert_allclose(outcome.probabilities.sum(1), 1)
        assert outcome.settings["seconds"] >= 0
    for baseline in baselines:
        np.testing.assert_array_equal(baseline.predict_proba(test), fitted[baseline.name].probabilities)


def test_windows_are_read_from_a_data_set_and_checked():
    data = [SimpleNamespace(tokens=tokens("ACGT"), label=1), SimpleNamespace(tokens=tokens("AC"), label=0)]
    windows = Windows.read(data)
    np.testing.assert_array_equal(windows.labels, [1, 0])
    np.testing.assert_array_equal(windows.lengths, [4, 2])
    with pytest.raises(ValueError, match="2 sequences with 1 labels"):
        Windows(windows.sequences, windows.labels[:1])
    with pytest.raises(ValueError, match="two classes"):
        run_baselines([Majority(2)], windows[np.array([0])], windows, windows)


@pytest.mark.gpu
def test_network_learns_on_a_gpu():
    train, validation, test = (motif_windows(n, seed, turn=True) for seed, n in enumerate((400, 64, 100)))
    network = SmallCNN(2, epochs=3, device="cuda").fit(train, validation)
    assert accuracy(network, test) > 0.9
    settings = network.settings
    assert settings["validation_log_loss"] == pytest.approx(
        network.log_loss(network.predict_proba(validation), validation.labels), rel=1e-3
    )


def test_baselines_are_chosen_by_name():
    baselines = default_baselines(2)
    assert select_baselines(baselines, "all") == baselines
    assert [b.name for b in select_baselines(baselines, "k-mers, majority")] == ["k-mers", "majority"]
    with pytest.raises(UserError, match="no baseline 'kmers'; there are majority, GC"):
        select_baselines(baselines, "kmers")
