"""Measures of several labels a clip, against scikit-learn, and their bootstrap."""

import json

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from seqssm.tasks.evaluation import Resampler, score
from seqssm.tasks.multilabel import score_multilabel
from seqssm.tasks.plots import precision_recall_png
from seqssm.tasks.ranking import weighted_average_precision
from seqssm.tasks.report import evaluate, save, to_markdown


def example(n: int = 90, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    targets = (rng.random((n, classes)) < [0.5, 0.3, 0.15][:classes]).astype(int)
    return np.round(np.clip(targets * 0.25 + rng.random((n, classes)) * 0.75, 0, 1), 2), targets  # with ties


def test_weighted_average_precision_is_scikit_learns() -> None:
    table, targets = example()
    weights = np.random.default_rng(1).integers(0, 4, (5, 30)).astype(float)
    unit = np.arange(90) % 30
    found = weighted_average_precision(table[:, 0], targets[:, 0] == 1, unit, weights)
    expected = [average_precision_score(targets[:, 0], table[:, 0], sample_weight=row[unit]) for row in weights]
    np.testing.assert_allclose(found, expected, atol=1e-12)
    assert np.isnan(weighted_average_precision(table[:, 0], targets[:, 0] == 1, unit, np.zeros((1, 30)))[0])


def test_measures_are_scikit_learns() -> None:
    table, targets = example()
    resampler = Resampler({"source": np.arange(90) // 3}, resamples=200)
    thresholds = [0.4, 0.5, 0.6]
    scores = score_multilabel({"model": table}, targets, {"model": thresholds}, resampler)["model"]
    averages = [average_precision_score(targets[:, c], table[:, c]) for c in range(3)]
    areas = [roc_auc_score(targets[:, c], table[:, c]) for c in range(3)]
    assert scores.values["map"] == pytest.approx(np.mean(averages))
    assert scores.values["mauc"] == pytest.approx(np.mean(areas))
    np.testing.assert_allclose(scores.class_values["average_precision"], averages)
    f1 = [f1_score(targets[:, c], table[:, c] >= thresholds[c]) for c in range(3)]
    np.testing.assert_allclose(scores.class_values["f1"], f1)
    assert scores.values["macro_f1"] == pytest.approx(np.mean(f1))
    low, high = resampler.interval(scores.samples["map"])
    assert low < scores.values["map"] < high
    assert scores.samples["map"].shape == (200,)


def test_one_label_a_clip_has_average_precision_when_asked() -> None:
    table, _ = example()
    table = table / table.sum(1, keepdims=True)
    labels = np.arange(90) % 3
    resampler = Resampler({"source": np.arange(90) // 2}, labels, resamples=100)
    scores = score({"model": table}, labels, resampler, ranked=True)["model"]
    expected = [average_precision_score(labels == c, table[:, c]) for c in range(3)]
    np.testing.assert_allclose(scores.class_values["average_precision"], expected)
    assert scores.values["map"] == pytest.approx(np.mean(expected))
    assert "map" not in score({"model": table}, labels, resampler)["model"].values


def test_report_of_several_labels(tmp_path) -> None:
    table, targets = example()
    weak, _ = example(seed=5)
    report = evaluate(
        table,
        targets,
        {"source": np.arange(90) // 3},
        ["rain", "wind", "thunder"],
        baselines={"mean spectrum": weak},
        thresholds={"model": [0.4, 0.5, 0.6]},
        resamples=100,
        item="clip",
    )
    json.dumps(report, allow_nan=False)
    assert report["confusion"] is None
    assert list(report["metrics"]) == ["map", "mauc", "d_prime", "macro_f1"]
    assert report["per_class"]["rain"]["support"] == targets[:, 0].sum()
    assert report["per_class"]["wind"]["predicted"] == (table[:, 1] >= 0.5).sum()
    difference = report["differences"]["mean spectrum"]["map"]
    expected = report["metrics"]["map"]["value"] - report["baselines"]["mean spectrum"]["map"]["value"]
    assert difference["value"] == pytest.approx(expected, abs=1e-8)
    text = to_markdown(report)
    assert "| mAP" in text
    assert "| class   | clips |" in text
    assert "100 bootstrap resamples of sources" in text
    assert "Confusion" not in text
    figure = precision_recall_png({"model": table, "mean spectrum": weak}, targets, ["rain", "wind", "thunder"])
    files = save(report, tmp_path, {"precision_recall.png": figure})
    assert [file.name for file in files] == ["metrics.json", "evaluation.md", "precision_recall.png"]
    assert files[2].read_bytes().startswith(b"\x89PNG")
