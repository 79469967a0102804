"""Whether probabilities mean what they say: reliability curve, ECE, Brier, log loss, and what would calibrate them."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from dpo_dist.stats.intervals import (
    LEVEL,
    Clusters,
    Floats,
    Interval,
    clustered_error,
    kish,
    normal_quantile,
    share_interval,
)

BINS = 10
DRAWS = 1000


@dataclass(frozen=True)
class Bin:
    """Observations whose predicted probability lies in [low, high]: its mean, the share of hits, and the interval of
    that."""

    low: float
    high: float
    n: int
    weight: float
    predicted: float
    observed: float
    observed_low: float
    observed_high: float
    effective: float                         # observations of equal weight that say as much


def reliability(predicted: ArrayLike, observed: ArrayLike, weights: ArrayLike | None = None, clusters: Clusters = None,
                bins: int = BINS) -> list[Bin]:
    """The reliability curve in bins of equal mass, from the lowest probability on. predicted: (n,) probabilities;
    observed: (n,) 1 a hit, 0 none, 0.5 a tie. Equal probabilities are never parted, so there may be fewer bins."""
    p, y = np.asarray(predicted, dtype=np.float64), np.asarray(observed, dtype=np.float64)
    w = np.ones(len(p)) if weights is None else np.asarray(weights, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    mass = np.cumsum(w[order]) - w[order] / 2
    which = np.minimum((mass / w.sum() * bins).astype(int), bins - 1) if len(p) else mass.astype(int)
    first_equal = np.searchsorted(p[order], p[order], "left")
    which = which[first_equal] if len(p) else which
    found = []
    for number in np.unique(which):
        at = order[which == number]
        share = share_interval(y[at], w[at], None if clusters is None else clusters[at])
        assert share is not None, "a bin that was found holds something"
        found.append(Bin(float(p[at[0]]), float(p[at[-1]]), len(at), float(w[at].sum()),
                         float(np.average(p[at], weights=w[at])), share.value, share.low, share.high, kish(w[at])))
    return found


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """ECE (Naeini et al. 2015): the mean distance between predicted and observed, over bins by their weight."""
    weights = np.array([one.weight for one in bins])
    return float(np.average([abs(one.predicted - one.observed) for one in bins], weights=weights))


def chance_calibration_error(bins: Sequence[Bin], seed: int = 0, level: float = LEVEL) -> float:
    """The ECE that perfectly calibrated predictions stay below with this probability, for so few observations: the
    quantile over DRAWS of the hits of each bin. An ECE is never negative, so a small one may be no more than this."""
    rng = np.random.default_rng(seed)
    sizes = np.array([max(1, round(one.effective)) for one in bins])
    predicted = np.clip([one.predicted for one in bins], 0, 1)
    shares = rng.binomial(sizes, predicted, (DRAWS, len(bins))) / sizes
    weights = np.array([one.weight for one in bins])
    return float(np.quantile(np.average(np.abs(shares - predicted), axis=1, weights=weights), level))


def brier(predicted: ArrayLike, observed: ArrayLike, weights: Floats | None = None) -> float:
    """The mean square of predicted - observed (Brier 1950): 0 is perfect, 0.25 what a coin gets."""
    return float(np.average(np.square(np.asarray(predicted, float) - np.asarray(observed, float)), weights=weights))


def log_loss(logit: ArrayLike, weights: Floats | None = None) -> float:
    """Nats: the mean of -log σ(logit), where the logit is of what happened. ln 2 is what a coin gets."""
    return float(np.average(np.logaddexp(0, -np.asarray(logit, dtype=np.float64)), weights=weights))


def calibrating_factor(logit: ArrayLike, weights: ArrayLike | None = None, clusters: Clusters = None,
                       level: float = LEVEL) -> Interval | None:
    """The factor s on the logits for which what happened is likeliest, max Σ w log σ(s · logit), with its
    cluster-robust interval: 1 where they are calibrated, below 1 where they claim too much (temperature scaling, Guo
    et al. 2017). logit: (n,), of what happened.

    None where no finite factor is best: all logits are 0, or all that are not have one sign. Newton's steps, kept
    within a bracket: the likelihood is concave.
    """
    m = np.asarray(logit, dtype=np.float64)
    w = np.ones(len(m)) if weights is None else np.asarray(weights, dtype=np.float64)
    group = np.arange(len(m)) if clusters is None else clusters
    if not (m > 0).any() or not (m < 0).any() or not np.isfinite(m).all():
        return None
    scale = float(np.abs(m).max())
    x, factor = m / scale, 0.0
    low, high = -1.0, 1.0
    while _slope(low, x, w)[0] < 0:
        low *= 2
    while _slope(high, x, w)[0] > 0:
        high *= 2
    for _ in range(200):
        slope, curvature = _slope(factor, x, w)
        low, high = (factor, high) if slope > 0 else (low, factor)
        step = factor + slope / curvature if curvature > 0 else math.inf
        following = step if low < step < high else (low + high) / 2
        if abs(following - factor) <= 1e-12 * max(1.0, abs(factor)):
            break
        factor = following
    curvature = _slope(factor, x, w)[1]
    if len(np.unique(group)) < 2 or curvature <= 0:
        return Interval(factor / scale, -math.inf, math.inf, len(m))
    error = clustered_error(w * x * _sigmoid(-factor * x) / curvature, group)
    half = normal_quantile(level) * error
    return Interval(factor / scale, (factor - half) / scale, (factor + half) / scale, len(m))


def _slope(factor: float, x: Floats, w: Floats) -> tuple[float, float]:
    """(first derivative of the log-likelihood, minus the second) at this factor."""
    miss = _sigmoid(-factor * x)
    return float((w * x * miss).sum()), float((w * x * x * miss * (1 - miss)).sum())


def _sigmoid(x: Floats) -> Floats:
    return np.exp(-np.logaddexp(0, -x))


def sigmoid(logit: ArrayLike) -> Floats:
    """(n,) probabilities; exact at both ends."""
    return _sigmoid(np.asarray(logit, dtype=np.float64))
