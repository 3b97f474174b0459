"""Classification measures with bootstrap intervals that respect where the windows came from.

Windows cut from one record are not independent samples, so whole records are resampled, and every predictor is scored
on the same resamples, which makes the difference between two of them a paired one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "mcc", "auroc")
CLASS_METRICS = ("precision", "recall", "f1", "auroc")
RANKED = ("map", "average_precision")
"""The measure, and the one of each class, that ``score`` adds where it is asked for average precision."""

MIN_CLUSTERS = 10
"""Fewer records than this say too little about the spread between records."""
MIN_CLUSTERS_PER_CLASS = 3


class Resampler:
    """Draws the resamples of a test set, as weights, the same ones each time it is asked.

    Two methods, and ``describe`` says which one was taken and why:

    - ``"cluster"``: the coarsest units of which there are enough (genomes, say, else records) are resampled with all
      their windows. If every unit holds one class only, they are drawn within their class, as the class sizes are a
      choice of the test set.
    - ``"window"``: where even the finest units are fewer than ``MIN_CLUSTERS``, or a class is found in fewer than
      ``MIN_CLUSTERS_PER_CLASS``, windows are drawn within them. Such intervals hold for these units only: they know
      nothing of how another one would score, and are too narrow where neighbouring windows are alike.

    From a stratum of m units, m - 1 are drawn and weighted m / (m - 1), without which the spread of a small stratum
    comes out too small by that factor (Rao and Wu 1988, "Resampling inference with complex survey data"). A stratum
    of one unit cannot vary and keeps the weight 1.

    Args:
        clusters: what a unit is called -> (n,) the name of the unit each window is from, the coarsest first:
            ``{"genome": ..., "record": ...}``.
        labels: (n,) class of each window, or None where a window has no single class.
        resamples: how many to draw.
        confidence: of the intervals.
        seed: of the draws.
        item: what a window is called.
    """

    def __init__(
        self,
        clusters: Mapping[str, Sequence[str] | NDArray[Any]],
        labels: ArrayLike | None = None,
        *,
        resamples: int = 2000,
        confidence: float = 0.95,
        seed: int = 0,
        item: str = "window",
    ) -> None:
        self.resamples, self.confidence, self.seed, self.item = resamples, confidence, seed, item
        passed_over: list[str] = []
        if not clusters:
            raise ValueError("name at least one unit to resample")
        for self.unit_name, names in clusters.items():
            distinct, cluster = np.unique(np.asarray(names), return_inverse=True)
            self.n_clusters, self.n_windows = len(distinct), len(cluster)
            if not self.n_windows:
                raise ValueError("there are no windows to resample")
            stratum = np.zeros(self.n_clusters, np.int64)
            carriers = self.n_clusters  # units of the class that has the fewest
            self.stratified_by = "none"
            if labels is not None:
                pairs = np.unique(np.stack([cluster, np.asarray(labels, np.int64)]), axis=1)  # (2, distinct pairs)
                carriers = int(np.unique(pairs[1], return_counts=True)[1].min())
                if pairs.shape[1] == self.n_clusters:
                    stratum, self.stratified_by = pairs[1], "class"
            if self.n_clusters >= MIN_CLUSTERS and carriers >= MIN_CLUSTERS_PER_CLASS:
                self.method = "cluster"
                break
            passed_over.append(
                f"{self.unit_name}s ({self.n_clusters} in all)"
                if self.n_clusters < MIN_CLUSTERS
                else f"{self.unit_name}s ({carriers} of one class)"
            )
        else:
            self.method, self.stratified_by = "window", self.unit_name
            stratum, cluster = cluster, np.arange(self.n_windows)
        resampled = f"{self.unit_name}s are resampled"
        if self.method == "window":
            resampled = f"{item}s are resampled within their {self.unit_name}"
        few = " and ".join(passed_over)
        self.note = f"too few {few}: {resampled}, and the intervals leave out the spread between them" if few else ""
        self.unit: NDArray[np.int64] = cluster  # (n,) the column of the weights a window takes its weight from
        self.n_units = len(stratum)
        self._order = np.argsort(stratum, kind="stable")
        self._sizes = np.unique(stratum, return_counts=True)[1]

    def weights(self) -> Iterator[Array]:
        """Yield (r, n_units) weights, a block of resamples at a time, ``resamples`` rows in all."""
        starts = np.cumsum(self._sizes) - self._sizes
        draws = np.maximum(self._sizes - 1, 1)  # one draw out of one unit: the unit itself
        start, size = np.repeat(starts, draws), np.repeat(self._sizes, draws)
        scale = np.empty(self.n_units)
        scale[self._order] = np.repeat(self._sizes / draws, self._sizes)
        block = max(1, min(self.resamples, 2**22 // self.n_units))
        rng = np.random.default_rng(self.seed)
        for first in range(0, self.resamples, block):
            rows = min(block, self.resamples - first)
            drawn = self._order[start + (rng.random((rows, len(start))) * size).astype(np.int64)]
            drawn += np.arange(rows)[:, None] * self.n_units
            counts = np.bincount(drawn.ravel(), minlength=rows * self.n_units).reshape(rows, self.n_units)
            yield counts * scale

    def interval(self, samples: Array) -> tuple[float, float]:
        """Percentile interval of (resamples,) values; NaN twice if most resamples leave the measure undefined."""
        defined = samples[np.isfinite(samples)]
        if 2 * len(defined) < len(samples):
            return float("nan"), float("nan")
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(defined, [tail, 1 - tail])
        return float(low), float(high)

    def describe(self) -> dict[str, Any]:
        """What was resampled, and how, as plain data."""
        return {
            "method": self.method,
            "resampled": self.unit_name if self.method == "cluster" else self.item,
            "stratified_by": self.stratified_by,
            "interval": "percentile",
            "confidence": self.confidence,
            "resamples": self.resamples,
            "seed": self.seed,
            "clusters": self.n_clusters,
            "windows": self.n_windows,
            "note": self.note,
        }


@dataclass(frozen=True)
class Scores:
    """One predictor's measures on a test set, each with its value under every resample.

    Attributes:
        confusion: (c, c) windows, true class by predicted class; None where a window may have several labels.
        support: (c,) windows of each class.
        predicted: (c,) windows said to be of it.
        values: measure -> value; per class, measure -> (c,) in ``class_values``. NaN where undefined.
        samples: measure -> (resamples,); (resamples, c) in ``class_samples``.
    """

    confusion: NDArray[np.int64] | None
    support: NDArray[np.int64]
    predicted: NDArray[np.int64]
    values: dict[str, float]
    samples: dict[str, Array]
    class_values: dict[str, Array]
    class_samples: dict[str, Array]


def score(
    predictions: Mapping[str, ArrayLike], labels: ArrayLike, resampler: Resampler, *, ranked: bool = False
) -> dict[str, Scores]:
    """Score every predictor on the same windows and the same resamples.

    Measures follow scikit-learn: balanced accuracy is the mean recall of the classes that occur, macro-F1 the mean
    over the classes that occur or are predicted, MCC the multi-class one (Gorodkin 2004), AUROC one class against the
    rest averaged over the classes that have windows both in and out, and with two classes that of the second one. A
    class that a resample leaves out is left out of its means.

    Args:
        predictions: predictor -> (n, c) probabilities. In float64: rounding a softmax to float32 makes ties.
        labels: (n,) class indices.
        resampler: over the same n windows.
        ranked: also give the average precision of each class against the rest, and its mean.

    Raises:
        ValueError: shapes disagree, a probability is not finite, or a label is not a class.
    """
    truth = np.asarray(labels, np.int64)
    tables = {name: _checked(name, table, truth, resampler) for name, table in predictions.items()}
    blocks: dict[str, list[dict[str, Array]]] = {name: [] for name in tables}
    counts = {name: _unit_confusion(table, truth, resampler) for name, table in tables.items()}
    ones = np.ones((1, resampler.n_units))
    unit = resampler.unit
    points = {name: _measures(table, truth, unit, counts[name], ones, ranked) for name, table in tables.items()}
    for weights in resampler.weights():
        for name, table in tables.items():
            blocks[name].append(_measures(table, truth, unit, counts[name], weights, ranked))
    keys = (*METRICS, *RANKED[:1]) if ranked else METRICS
    class_keys = (*CLASS_METRICS, *RANKED[1:]) if ranked else CLASS_METRICS
    scores = {}
    for name, table in tables.items():
        samples = {key: np.concatenate([block[key] for block in blocks[name]]) for key in points[name]}
        n_classes = table.shape[1]
        confusion = np.asarray(counts[name].sum(axis=1)).reshape(n_classes, n_classes).astype(np.int64)
        scores[name] = Scores(
            confusion=confusion,
            support=confusion.sum(axis=1),
            predicted=confusion.sum(axis=0),
            values={key: float(points[name][key][0]) for key in keys},
            samples={key: samples[key] for key in keys},
            class_values={key: points[name][f"class_{key}"][0] for key in class_keys},
            class_samples={key: samples[f"class_{key}"] for key in class_keys},
        )
    return scores


def _checked(name: str, table: ArrayLike, labels: NDArray[np.int64], resampler: Resampler) -> Array:
    probabilities = np.asarray(table, np.float64)
    if probabilities.ndim != 2 or len(probabilities) != len(labels) or len(labels) != resampler.n_windows:
        raise ValueError(
            f"{name}: probabilities {probabilities.shape}, labels {labels.shape} and {resampler.n_windows} resampled "
            "windows do not fit together"
        )
    if probabilities.shape[1] < 2:
        raise ValueError(f"{name}: one class cannot be scored")
    if not np.isfinite(probabilities).all():
        raise ValueError(f"{name}: a probability is not finite")
    if labels.min() < 0 or labels.max() >= probabilities.shape[1]:
        raise ValueError(f"{name}: labels reach {labels.max()}, with {probabilities.shape[1]} classes")
    return probabilities


def _unit_confusion(probabilities: Array, labels: NDArray[np.int64], resampler: Resampler) -> Any:
    """Sparse (c*c, units): windows of each unit by true and predicted class."""
    from scipy import sparse

    n_classes = probabilities.shape[1]
    cell = labels * n_classes + probabilities.argmax(axis=1)
    shape = (n_classes * n_classes, resampler.n_units)
    return sparse.coo_matrix((np.ones(len(cell)), (cell, resampler.unit)), shape=shape).tocsr()


def _measures(
    probabilities: Array,
    labels: NDArray[np.int64],
    unit: NDArray[np.int64],
    counts: Any,
    weights: Array,
    ranked: bool,
) -> dict[str, Array]:
    """All measures under (r, units) weights: (r,), and (r, c) for the keys that start with ``class_``."""
    from seqssm.tasks.ranking import weighted_auroc, weighted_average_precision

    n_classes = probabilities.shape[1]
    confusion = (counts @ weights.T).T.reshape(len(weights), n_classes, n_classes)
    measures = confusion_measures(confusion)
    # Of two classes, the second one's curve is that of the first one mirrored: one area says it all.
    distinct = [1] if n_classes == 2 else range(n_classes)
    areas = np.stack([weighted_auroc(probabilities[:, c], labels == c, unit, weights) for c in distinct], axis=1)
    measures["class_auroc"] = np.broadcast_to(areas, (len(weights), n_classes))
    measures["auroc"] = mean_defined(areas)
    if ranked:
        columns = [
            weighted_average_precision(probabilities[:, c], labels == c, unit, weights) for c in range(n_classes)
        ]
        measures["class_average_precision"] = np.stack(columns, axis=1)
        measures["map"] = mean_defined(measures["class_average_precision"])
    return measures


def confusion_measures(confusion: Array) -> dict[str, Array]:
    """The measures that a confusion matrix determines.

    Args:
        confusion: (r, c, c) weights of windows, true class by predicted class.

    Returns:
        accuracy, balanced_accuracy, macro_f1, mcc: (r,); class_precision (0 for a class never predicted),
        class_recall (NaN for a class that does not occur), class_f1 (NaN for one neither occurring nor predicted):
        (r, c).
    """
    confusion = confusion / confusion.sum(axis=(1, 2), keepdims=True)
    hits = np.diagonal(confusion, axis1=1, axis2=2)
    actual, predicted, correct = confusion.sum(axis=2), confusion.sum(axis=1), np.trace(confusion, axis1=1, axis2=2)
    recall = ratio(hits, actual, np.nan)
    f1 = ratio(2 * hits, actual + predicted, np.nan)
    # Rounded to zero when one class holds all the windows, or all the predictions.
    spread_actual = np.round(1 - (actual**2).sum(axis=1), 12)
    spread_predicted = np.round(1 - (predicted**2).sum(axis=1), 12)
    return {
        "accuracy": correct,
        "balanced_accuracy": mean_defined(recall),
        "macro_f1": mean_defined(f1),
        "mcc": ratio(correct - (actual * predicted).sum(axis=1), np.sqrt(spread_actual * spread_predicted), 0.0),
        "class_precision": ratio(hits, predicted, 0.0),
        "class_recall": recall,
        "class_f1": f1,
    }


def ratio(numerator: Array, denominator: Array, otherwise: float) -> Array:
    return np.divide(numerator, denominator, out=np.full_like(numerator, otherwise), where=denominator > 0)


def mean_defined(values: Array) -> Array:
    """Mean over the last axis of what is not NaN; NaN where nothing is."""
    return ratio(np.nansum(values, axis=-1), np.isfinite(values).sum(axis=-1).astype(float), np.nan)
