"""95 % intervals of shares and weighted means whose observations may come in clusters.

Pairs of one prompt are not independent: a policy that misreads a prompt misjudges all of its pairs. So what varies is
counted by cluster (the prompt). Shares get Wilson's interval at the number of independent pairs that would vary as
much: it stays within [0, 1], also near its ends and for a handful of pairs, where a normal interval does not, and it
needs no resampling, so that hundreds of slices of 100,000 pairs are a matter of a second. `cluster_bootstrap` is for
what has no formula.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
Floats = NDArray[np.float64]
Clusters = NDArray[np.int64] | None          # (n,) each observation's cluster, numbers from 0; None: each by itself


@dataclass(frozen=True)
class Interval:
    """An estimate, the interval around it at LEVEL, and the number of observations behind it."""

    value: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


def wilson(share: float, n: float, level: float = LEVEL) -> tuple[float, float]:
    """(low, high) of a share among n independent observations; n need not be whole (Wilson 1927)."""
    if n <= 0:
        return 0.0, 1.0
    z = normal_quantile(level)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def share_interval(values: ArrayLike, weights: ArrayLike | None = None, clusters: Clusters = None,
                   level: float = LEVEL) -> Interval | None:
    """The weighted share of hits; None where there is no observation. values: (n,) 1 hit, 0 none, 0.5 a tie.

    Wilson's interval at the effective number of observations n / (weights' design effect · clusters' design effect), as
    Korn and Graubard (1998) do for surveys; the clusters' is at least 1, and with few clusters it grows by (t / z)².
    Where all hits are equal, and clusters cannot be compared, each cluster counts once. For independent observations of
    equal weight it is the plain Wilson interval.
    """
    y, w, group = _checked(values, weights, clusters)
    if not len(y):
        return None
    share = min(1.0, max(0.0, float(np.average(y, weights=w))))
    low, high = wilson(share, _effective(y - share, w, group, level), level)
    return Interval(share, min(low, share), max(high, share), len(y))


def _effective(errors: Floats, w: Floats, group: NDArray[np.int64], level: float) -> float:
    """How many independent observations of equal weight vary as much as these."""
    n = len(errors)
    by_cluster: Floats = np.bincount(group, weights=w).astype(np.float64)
    clusters = int(np.count_nonzero(by_cluster))
    apart = float(np.square(w * errors).sum())
    if clusters < 2 or apart == 0:
        return kish(by_cluster)
    together = float(np.square(np.bincount(group, weights=w * errors)).sum())
    effect = (together * clusters / (clusters - 1)) / (apart * n / (n - 1))
    if effect <= 1 + 1e-12:
        return kish(w)
    return kish(w) / effect * (normal_quantile(level) / t_quantile(level, clusters - 1)) ** 2


def mean_interval(values: ArrayLike, weights: ArrayLike | None = None, clusters: Clusters = None,
                  level: float = LEVEL) -> Interval | None:
    """The weighted mean of (n,) values with its cluster-robust interval, by Student's t with one degree of freedom less
    than clusters; None where there is no observation. Infinite with a single cluster: nothing is known of how it
    varies."""
    y, w, group = _checked(values, weights, clusters)
    if not len(y):
        return None
    mean = float(np.average(y, weights=w))
    count = len(np.unique(group))
    if count < 2:
        return Interval(mean, -math.inf, math.inf, len(y))
    half = t_quantile(level, count - 1) * clustered_error(w * (y - mean) / w.sum(), group)
    return Interval(mean, mean - half, mean + half, len(y))


def clustered_error(influence: Floats, group: NDArray[np.int64]) -> float:
    """The standard error of a statistic whose observations move it by (n,) `influence`, summed by cluster (Liang and
    Zeger 1986), with the correction G / (G - 1) for G clusters; at least two."""
    sums = np.bincount(group, weights=influence)
    count = len(np.unique(group))
    return math.sqrt(count / (count - 1) * float(np.square(sums).sum()))


def cluster_bootstrap(statistic: Callable[[Floats], float], weights: ArrayLike, clusters: Clusters = None,
                      seed: int = 0, draws: int = 1000, level: float = LEVEL) -> tuple[float, float]:
    """(low, high): percentiles of `statistic` over draws of whole clusters with replacement (Davison and Hinkley 1997,
    3.8). statistic: of (n,) weights, in which an observation counts as often as its cluster was drawn."""
    w = np.asarray(weights, dtype=np.float64)
    group = np.arange(len(w)) if clusters is None else clusters
    rng, count = np.random.default_rng(seed), int(group.max()) + 1
    found = [statistic(w * rng.multinomial(count, np.full(count, 1 / count))[group]) for _ in range(draws)]
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def kish(weights: Floats) -> float:
    """How many observations of equal weight say as much as these (Kish 1965): (Σw)² / Σw²."""
    return float(weights.sum() ** 2 / np.square(weights).sum())


def normal_quantile(level: float) -> float:
    """z such that a standard normal lies within ±z with this probability."""
    return NormalDist().inv_cdf((1 + level) / 2)


def t_quantile(level: float, degrees: int) -> float:
    """t such that Student's t lies within ±t with this probability: exact for 1 and 2 degrees of freedom, else Fisher
    and Cornish's expansion (Abramowitz and Stegun 26.7.5), at 95 % within 0.5 % from 3 on."""
    p = (1 + level) / 2
    if degrees == 1:
        return math.tan(math.pi * (p - 0.5))
    if degrees == 2:
        return (2 * p - 1) / math.sqrt(2 * p * (1 - p))
    z, d = normal_quantile(level), float(degrees)
    return (z + (z**3 + z) / (4 * d) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * d**2)
            + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * d**3)
            + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * d**4))


def cluster_numbers(names: ArrayLike) -> NDArray[np.int64]:
    """(n,) numbers from 0, equal where the names are."""
    return np.unique(np.asarray(names), return_inverse=True)[1].astype(np.int64).ravel()


def _checked(values: ArrayLike, weights: ArrayLike | None,
             clusters: Clusters) -> tuple[Floats, Floats, NDArray[np.int64]]:
    y = np.asarray(values, dtype=np.float64)
    w = np.ones(len(y)) if weights is None else np.asarray(weights, dtype=np.float64)
    group = np.arange(len(y)) if clusters is None else np.asarray(clusters)
    assert len(y) == len(w) == len(group), "an observation has one value, one weight and one cluster"
    return y, w, group
