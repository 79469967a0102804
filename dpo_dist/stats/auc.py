"""The area under the ROC curve: how often a score ranks a positive above a negative."""
from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dpo_dist.stats.intervals import LEVEL, Clusters, Floats, Interval, normal_quantile, wilson


def auc(positive: ArrayLike, negative: ArrayLike) -> float:
    """The share of (positive, negative) couples of scores in which the positive's is higher; ties half."""
    return float(_placements(np.asarray(positive, float), np.asarray(negative, float)).mean())


def auc_interval(positive: ArrayLike, negative: ArrayLike, positive_clusters: Clusters = None,
                 negative_clusters: Clusters = None, level: float = LEVEL) -> Interval | None:
    """The AUC with its interval on the logit scale; None without a positive or without a negative. DeLong, DeLong and
    Clarke-Pearson (1988); with clusters Obuchowski (1997), in which positives and negatives share clusters, as the
    chosen and rejected completions of one prompt do.

    Where every couple is ranked alike, which leaves nothing to vary, it is Wilson's for as many as the rarer kind has.
    """
    high, low = np.asarray(positive, float), np.asarray(negative, float)
    m, n = len(high), len(low)
    if not m or not n:
        return None
    above, below = _placements(high, low), 1 - _placements(low, high)
    area = float(above.mean())
    error = math.sqrt(_variance(above - area, below - area, positive_clusters, negative_clusters))
    if not 0 < area < 1 or not error:
        start, end = wilson(area, min(m, n), level)
    else:
        logit, half = math.log(area / (1 - area)), normal_quantile(level) * error / (area * (1 - area))
        start, end = (1 / (1 + math.exp(-(logit + side))) for side in (-half, half))
    return Interval(area, start, end, m + n)


def _variance(above: Floats, below: Floats, positive_clusters: Clusters, negative_clusters: Clusters) -> float:
    """Of the AUC, from the centred placements of positives and negatives."""
    m, n = len(above), len(below)
    if positive_clusters is None or negative_clusters is None:
        return sum(float(np.square(part).sum()) / (size * (size - 1)) for part, size in ((above, m), (below, n))
                   if size > 1)
    count = int(max(positive_clusters.max(), negative_clusters.max())) + 1
    x = np.bincount(positive_clusters, weights=above, minlength=count)
    y = np.bincount(negative_clusters, weights=below, minlength=count)
    has_x, has_y = len(np.unique(positive_clusters)), len(np.unique(negative_clusters))
    all_of_them = len(np.unique(np.concatenate([positive_clusters, negative_clusters])))
    total = 2 * _corrected(all_of_them) * float(x @ y) / (m * n)
    total += _corrected(has_x) * float(x @ x) / m**2 + _corrected(has_y) * float(y @ y) / n**2
    return max(total, 0.0)


def _corrected(clusters: int) -> float:
    return clusters / (clusters - 1) if clusters > 1 else 1.0


def _placements(scores: Floats, others: Floats) -> Floats:
    """(m,) for each score, the share of the others that are lower; equal ones half."""
    ordered: NDArray[np.float64] = np.sort(others)
    return (np.searchsorted(ordered, scores, "left") + np.searchsorted(ordered, scores, "right")) / (2 * len(ordered))
