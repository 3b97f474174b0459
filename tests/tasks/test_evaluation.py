import numpy as np
import pytest
from sklearn import metrics

from seqssm.tasks.evaluation import METRICS, Resampler, confusion_measures, score
from seqssm.tasks.ranking import weighted_auroc


def predictions(n_classes, n, seed=0, skill=0.5, decimals=2):
    """Imperfect probabilities with ties, and their labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes, n)
    table = rng.dirichlet(np.ones(n_classes), n)
    table[np.arange(n), labels] += skill
    table = (table / table.sum(1, keepdims=True)).round(decimals)
    if n_classes == 2:
        table[:, 0] = 1 - table[:, 1]
    return table, labels


def scored(table, labels, clusters=None, **settings):
    clusters = np.arange(len(labels)) if clusters is None else clusters
    resampler = Resampler({"record": clusters}, labels, resamples=200, **settings)
    return score({"it": table}, labels, resampler)["it"], resampler


@pytest.mark.parametrize("n_classes", [2, 3, 7])
def test_values_equal_scikit_learn(n_classes):
    table, labels = predictions(n_classes, 300)
    scores, _ = scored(table, labels)
    guess = table.argmax(1)
    areas = [metrics.roc_auc_score(labels == c, table[:, c]) for c in range(n_classes)]
    expected = {
        "accuracy": metrics.accuracy_score(labels, guess),
        "balanced_accuracy": metrics.balanced_accuracy_score(labels, guess),
        "macro_f1": metrics.f1_score(labels, guess, average="macro"),
        "mcc": metrics.matthews_corrcoef(labels, guess),
        "auroc": areas[1] if n_classes == 2 else np.mean(areas),
    }
    assert scores.values == pytest.approx(expected, abs=1e-12)
    precision, recall, f1, support = metrics.precision_recall_fscore_support(labels, guess)
    np.testing.assert_allclose(scores.class_values["precision"], precision)
    np.testing.assert_allclose(scores.class_values["recall"], recall)
    np.testing.assert_allclose(scores.class_values["f1"], f1)
    np.testing.assert_allclose(scores.class_values["auroc"], areas)
    np.testing.assert_array_equal(scores.confusion, metrics.confusion_matrix(labels, guess))
    np.testing.assert_array_equal(scores.confusion.sum(1), support)


def test_values_equal_torchmetrics():
    import torch
    from torchmetrics.functional import classification as torch_metrics

    table, labels = predictions(4, 300)
    scores, _ = scored(table, labels)
    p, y = torch.from_numpy(table), torch.from_numpy(labels)
    expected = {
        "accuracy": torch_metrics.multiclass_accuracy(p, y, 4, average="micro"),
        "balanced_accuracy": torch_metrics.multiclass_accuracy(p, y, 4, average="macro"),
        "macro_f1": torch_metrics.multiclass_f1_score(p, y, 4, average="macro"),
        "mcc": torch_metrics.multiclass_matthews_corrcoef(p, y, 4),
        "auroc": torch_metrics.multiclass_auroc(p, y, 4, average="macro"),
    }
    assert scores.values == pytest.approx({k: float(v) for k, v in expected.items()}, abs=1e-5)


def test_every_resample_equals_scikit_learn_with_the_same_weights():
    table, labels = predictions(3, 120)
    clusters = np.repeat(np.arange(12), 10)
    scores, resampler = scored(table, labels, clusters)
    weights = np.concatenate(list(resampler.weights()))[:, resampler.unit]  # (200, n)
    guess = table.argmax(1)
    for row in range(0, 200, 20):
        w = weights[row]
        assert scores.samples["accuracy"][row] == pytest.approx(metrics.accuracy_score(labels, guess, sample_weight=w))
        assert scores.samples["mcc"][row] == pytest.approx(metrics.matthews_corrcoef(labels, guess, sample_weight=w))
        f1 = metrics.f1_score(labels, guess, average="macro", sample_weight=w)
        assert scores.samples["macro_f1"][row] == pytest.approx(f1)
        areas = [metrics.roc_auc_score(labels == c, table[:, c], sample_weight=w) for c in range(3)]
        np.testing.assert_allclose(scores.class_samples["auroc"][row], areas)


def test_area_of_a_hand_made_ranking():
    # Of the four pairs, the positives win two, tie one and lose one.
    scores, positive = np.array([0.2, 0.5, 0.5, 0.9]), np.array([False, True, False, True])
    weights = np.array([[1.0, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1]])
    areas = weighted_auroc(scores, positive, np.arange(4), weights)
    np.testing.assert_array_equal(areas[:2], [3.5 / 4, 1.0])
    assert np.isnan(areas[2])  # no negative has a weight


def test_a_class_that_is_missing_is_left_out_of_the_means():
    table, labels = predictions(4, 200)
    labels[labels == 2] = 0
    scores, resampler = scored(table, labels)
    recall = metrics.recall_score(labels, table.argmax(1), labels=[0, 1, 3], average="macro")
    assert scores.values["balanced_accuracy"] == pytest.approx(recall)
    assert np.isnan(scores.class_values["recall"][2])
    assert np.isnan(scores.class_values["auroc"][2])
    assert all(np.isfinite(scores.samples[key]).all() for key in METRICS)
    assert np.isnan(resampler.interval(scores.class_samples["recall"][:, 2])).all()


def test_a_class_that_resamples_lose_leaves_no_nan():
    # Mixed records, of which three hold the rare class: it is often not drawn at all.
    table, labels = predictions(3, 200)
    clusters = np.repeat(np.arange(20), 10)
    labels[labels == 2] = 0
    labels[[5, 55, 105]] = 2
    scores, resampler = scored(table, labels, clusters)
    assert resampler.method == "cluster"
    assert resampler.stratified_by == "none"
    assert np.isnan(scores.class_samples["recall"][:, 2]).any()
    for key in METRICS:
        assert np.isfinite(scores.samples[key]).all(), key
        low, high = resampler.interval(scores.samples[key])
        assert low <= scores.values[key] <= high


def test_one_predicted_class_has_no_correlation():
    confusion = np.array([[[5.0, 0], [3, 0]], [[8, 0], [0, 0]]]) * 7 / 6
    measures = confusion_measures(confusion)
    np.testing.assert_array_equal(measures["mcc"], [0, 0])
    np.testing.assert_allclose(measures["accuracy"], [5 / 8, 1])


def simulated(rng, records=16, windows=40):
    """Windows whose chance of being right (0.7 on average) is their record's, and one class a record."""
    chance = np.repeat(rng.beta(3.5, 1.5, records), windows)
    record = np.repeat(np.arange(records), windows)
    labels = record % 2
    right = rng.random(len(record)) < chance
    return np.eye(2)[np.where(right, labels, 1 - labels)], labels, record


def test_intervals_by_record_cover_the_truth_and_naive_ones_do_not():
    rng = np.random.default_rng(0)
    covered, widths = {"record": 0, "window": 0}, {"record": 0.0, "window": 0.0}
    runs = 150
    for _ in range(runs):
        table, labels, record = simulated(rng)
        for unit, names in {"record": record, "window": np.arange(len(record))}.items():
            scores, resampler = scored(table, labels, names)
            low, high = resampler.interval(scores.samples["accuracy"])
            covered[unit] += low <= 0.7 <= high
            widths[unit] += (high - low) / runs
    assert covered["record"] / runs > 0.86
    assert covered["window"] / runs < 0.7
    assert widths["record"] > 1.5 * widths["window"]


def test_small_strata_have_the_spread_of_their_mean():
    # The variance of the mean of m values is s^2 / m with s^2 over m - 1: a plain bootstrap gives (m - 1) / m of it.
    resampler = Resampler({"record": np.repeat(np.arange(12), 1)}, np.repeat([0, 1, 2], 4), resamples=20000)
    weights = np.concatenate(list(resampler.weights()))
    assert resampler.stratified_by == "class"
    np.testing.assert_allclose(weights[:, :4].sum(1), 4)  # the class keeps its size
    x = np.array([0.0, 0.1, 0.5, 1.0])
    assert np.var(weights[:, :4] @ x / 4) == pytest.approx(np.var(x, ddof=1) / 4, rel=0.05)


def test_too_few_units_fall_back_to_finer_ones_and_say_so():
    labels = np.repeat(np.arange(4), 40)
    genomes, records = [f"g{i}" for i in labels], [f"r{i}" for i in np.arange(160) // 10]
    by_record = Resampler({"genome": genomes, "record": records}, labels)
    assert (by_record.method, by_record.unit_name, by_record.n_units) == ("cluster", "record", 16)
    assert by_record.describe()["resampled"] == "record"
    assert by_record.note.startswith("too few genomes (4 in all): records are resampled")
    by_window = Resampler({"genome": genomes}, labels)
    assert (by_window.method, by_window.n_units, by_window.stratified_by) == ("window", 160, "genome")
    assert by_window.describe()["resampled"] == "window"
    assert "windows are resampled within their genome" in by_window.note
    weights = next(by_window.weights())
    np.testing.assert_allclose(weights.reshape(len(weights), 4, 40).sum(2), 40)  # each genome keeps its windows
    assert Resampler({"record": np.arange(160)}, labels).note == ""
    rare = np.array([0] * 158 + [1] * 2)
    assert "records (2 of one class)" in Resampler({"record": np.arange(160)}, rare).note


def test_resamples_depend_on_the_seed_alone():
    table, labels = predictions(3, 90)
    same = [scored(table, labels, seed=5)[0].samples["auroc"] for _ in range(2)]
    np.testing.assert_array_equal(*same)
    assert not np.array_equal(same[0], scored(table, labels, seed=6)[0].samples["auroc"])


def test_wrong_shapes_and_values_are_refused():
    table, labels = predictions(3, 90)
    resampler = Resampler({"record": np.arange(90)}, labels)
    for broken in (table[:80], table[:, :2], table * np.nan, table[:, :1]):
        with pytest.raises(ValueError, match="it: "):
            score({"it": broken}, labels, resampler)
    with pytest.raises(ValueError, match="no windows"):
        Resampler({"record": []})
