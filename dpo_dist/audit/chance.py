"""What chance allows: intervals and tests for shares, and how well a score tells two sides apart. numpy alone."""
from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float
    n: int

    def as_json(self) -> dict[str, float]:
        return {"value": round(self.value, 4), "low": round(self.low, 4), "high": round(self.high, 4), "n": self.n}


def two_sided(chance: float) -> float:
    """The normal quantile beyond which, on both sides together, so much is left: 1.96 of 0.05."""
    return NormalDist().inv_cdf(1 - chance / 2)


def share(hits: float, n: int, z: float = 1.959964) -> Interval:
    """A share with its Wilson interval (Wilson 1927, as in Brown, Cai and DasGupta 2001, eq. 4); `hits` may count
    halves."""
    if n == 0:
        return Interval(0.5, 0.0, 1.0, 0)
    p, spread = hits / n, z * z / n
    middle = (p + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(p * (1 - p) / n + spread / (4 * n))
    return Interval(p, max(0.0, middle - half), min(1.0, middle + half), n)


def mean_share(signs: NDArray[np.float64], groups: NDArray[np.int64], z: float = 1.959964) -> Interval:
    """The share of +1 among signs of +1, 0 and -1 (0 counts half), each group as one observation, since pairs of one
    prompt depend on each other."""
    if not len(signs):
        return Interval(0.5, 0.0, 1.0, 0)
    _, group = np.unique(groups, return_inverse=True)
    means = np.bincount(group, weights=(signs + 1) / 2) / np.bincount(group)
    return share(float(means.sum()), len(means), z)


def auc(positive: NDArray[np.float64], negative: NDArray[np.float64], z: float = 1.959964) -> Interval:
    """The chance that one of the first scores above one of the second (Mann and Whitney 1947), ties counted half; the
    interval by Hanley and McNeil (1982), eq. 1."""
    m, n = len(positive), len(negative)
    if not m or not n:
        return Interval(0.5, 0.0, 1.0, 0)
    _, inverse, counts = np.unique(np.concatenate([positive, negative]), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks = (ends - (counts - 1) / 2)[inverse[:m]]
    a = float((ranks.sum() - m * (m + 1) / 2) / (m * n))
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    error = math.sqrt(max(0.0, (a * (1 - a) + (m - 1) * (q1 - a * a) + (n - 1) * (q2 - a * a)) / (m * n)))
    return Interval(a, max(0.0, a - z * error), min(1.0, a + z * error), m + n)
