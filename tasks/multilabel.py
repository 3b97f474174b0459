"""Measures of predictors that may give a clip any number of labels, with the bootstrap of ``evaluation``."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray

from seqssm.tasks.evaluation import Array, Resampler, Scores, mean_defined, ratio

METRICS = ("map", "mauc", "d_prime", "macro_f1")
CLASS_METRICS = ("average_precision", "auroc", "precision", "recall", "f1")


def score_multilabel(
    predictions: Mapping[str, ArrayLike],
    targets: ArrayLike,
    thresholds: Mapping[str, ArrayLike],
    resampler: Resampler,
) -> dict[str, Scores]:
    """Score every predictor on the same clips and the same resamples.

    mAP and mAUC are means over the classes that have clips (mAUC: clips without them, too); d' is sqrt(2) times the
    standard normal quantile of mAUC. Precision, recall and F1 hold at the thresholds.

    Args:
        predictions: predictor -> (n, c) probabilities.
        targets: (n, c) zeros and ones.
        thresholds: predictor -> (c,) probabilities from which a class is said to be present; 0.5 where none are given.
        resampler: over the same n clips.

    Raises:
        ValueError: shapes disagree, or a probability is not finite.
    """
    truth = np.asarray(targets, bool)
    ones = np.ones((1, resampler.n_units))
    scores = {}
    for name, given in predictions.items():
        table = np.asarray(given, np.float64)
        if table.shape != truth.shape or len(truth) != resampler.n_windows:
            raise ValueError(f"{name}: probabilities {table.shape} and targets {truth.shape} do not fit together")
        if not np.isfinite(table).all():
            raise ValueError(f"{name}: a probability is not finite")
        said = table >= np.asarray(thresholds.get(name, 0.5), np.float64)
        point = _measures(table, truth, said, resampler, ones)
        blocks = [_measures(table, truth, said, resampler, weights) for weights in resampler.weights()]
        samples = {key: np.concatenate([block[key] for block in blocks]) for key in point}
        scores[name] = Scores(
            confusion=None,
            support=truth.sum(0),
            predicted=said.sum(0),
            values={key: float(point[key][0]) for key in METRICS},
            samples={key: samples[key] for key in METRICS},
            class_values={key: point[f"class_{key}"][0] for key in CLASS_METRICS},
            class_samples={key: samples[f"class_{key}"] for key in CLASS_METRICS},
        )
    return scores


def _measures(
    table: Array, truth: NDArray[np.bool_], said: NDArray[np.bool_], resampler: Resampler, weights: Array
) -> dict[str, Array]:
    """All measures under (r, units) weights: (r,), and (r, c) for the keys that start with ``class_``."""
    from scipy.special import ndtri

    from seqssm.tasks.ranking import weighted_auroc, weighted_average_precision

    unit, classes = resampler.unit, range(truth.shape[1])
    precision = np.stack([weighted_average_precision(table[:, c], truth[:, c], unit, weights) for c in classes], 1)
    area = np.stack([weighted_auroc(table[:, c], truth[:, c], unit, weights) for c in classes], 1)
    hits, actual, predicted = (weights @ _by_unit(x, resampler) for x in (truth & said, truth, said))
    f1 = ratio(2 * hits, actual + predicted, np.nan)
    mean_area = mean_defined(area)
    return {
        "class_average_precision": precision,
        "class_auroc": area,
        "class_precision": ratio(hits, predicted, 0.0),
        "class_recall": ratio(hits, actual, np.nan),
        "class_f1": f1,
        "map": mean_defined(precision),
        "mauc": mean_area,
        "d_prime": np.sqrt(2) * ndtri(np.clip(mean_area, 1e-6, 1 - 1e-6)),
        "macro_f1": mean_defined(f1),
    }


def _by_unit(marks: NDArray[np.bool_], resampler: Resampler) -> Array:
    """(units, c) sums of (n, c) marks over the clips of each unit."""
    sums = np.zeros((resampler.n_units, marks.shape[1]))
    np.add.at(sums, resampler.unit, marks)
    return sums
