"""Ranking measures under many weightings of the same windows, compiled because a bootstrap asks thousands of times."""

import numba
import numpy as np
from numpy.typing import NDArray


def weighted_auroc(
    scores: NDArray[np.floating], positive: NDArray[np.bool_], unit: NDArray[np.int64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Area under the receiver operating characteristic, once for each row of weights.

    The probability that a positive outscores a negative, ties counting half (Mann-Whitney U over its maximum).

    Args:
        scores: (n,) the higher, the more positive.
        positive: (n,) the truth.
        unit: (n,) which column of ``weights`` an item takes its weight from.
        weights: (r, units) one weighting a row.

    Returns:
        (r,) areas; NaN where a row leaves the positives or the negatives no weight.
    """
    order = np.argsort(scores, kind="stable")
    ascending = scores[order]
    ends_tie = np.append(ascending[1:] != ascending[:-1], True)[: len(order)]
    return _weighted_auroc(positive[order], unit[order], ends_tie, np.ascontiguousarray(weights))


@numba.njit(nogil=True)
def _weighted_auroc(
    positive: NDArray[np.bool_], unit: NDArray[np.int64], ends_tie: NDArray[np.bool_], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    out = np.empty(weights.shape[0])
    for row in range(weights.shape[0]):
        area = 0.0
        below = 0.0  # weight of the negatives scored lower than the present tie
        total = 0.0
        tied_positive = 0.0
        tied_negative = 0.0
        for i in range(unit.shape[0]):
            weight = weights[row, unit[i]]
            if positive[i]:
                tied_positive += weight
            else:
                tied_negative += weight
            if ends_tie[i]:
                area += tied_positive * (below + 0.5 * tied_negative)
                below += tied_negative
                total += tied_positive
                tied_positive = 0.0
                tied_negative = 0.0
        out[row] = area / (total * below) if total * below > 0.0 else np.nan
    return out


def weighted_average_precision(
    scores: NDArray[np.floating], positive: NDArray[np.bool_], unit: NDArray[np.int64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Average precision, once for each row of weights: precision summed over the steps of recall, ties one step.

    Args:
        scores, positive, unit, weights: as in ``weighted_auroc``.

    Returns:
        (r,) values; NaN where a row leaves the positives no weight.
    """
    order = np.argsort(-scores, kind="stable")
    descending = scores[order]
    ends_tie = np.append(descending[1:] != descending[:-1], True)[: len(order)]
    return _weighted_average_precision(positive[order], unit[order], ends_tie, np.ascontiguousarray(weights))


@numba.njit(nogil=True)
def _weighted_average_precision(
    positive: NDArray[np.bool_], unit: NDArray[np.int64], ends_tie: NDArray[np.bool_], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    out = np.empty(weights.shape[0])
    for row in range(weights.shape[0]):
        area = 0.0
        hits = 0.0
        taken = 0.0
        before = 0.0  # hits at the last step
        for i in range(unit.shape[0]):
            weight = weights[row, unit[i]]
            taken += weight
            if positive[i]:
                hits += weight
            if ends_tie[i]:
                if taken > 0.0:
                    area += (hits - before) * hits / taken
                before = hits
        out[row] = area / hits if hits > 0.0 else np.nan
    return out
