"""The data map: how each pair's margin went over its visits (Dataset Cartography, Swayamdipta et al. 2020, arXiv
2009.10795), and which pairs were never learned, or learned and lost (Toneva et al. 2019, arXiv 1812.05159)."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpo_dist.dynamics.visits import Visits

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class DataMap:
    """Of n pairs; NaN, and 0 visits, where a pair was not trained on."""

    visits: NDArray[np.int64]                # (n,)
    confidence: Floats                       # (n,) mean over visits of the probability of the label, σ(margin)
    variability: Floats                      # (n,) and its standard deviation
    correct: Floats                          # (n,) share of visits with a margin above 0
    first: Floats                            # (n,) margin at the first visit, before the pair was trained on
    last: Floats                             # (n,) and at the last one
    fall: Floats                             # (n,) from the largest margin to the last, 0 or more
    margins: Floats                          # (visits,) of pair 0 in the order of time, then of pair 1, ...
    starts: NDArray[np.int64]                # (n + 1,) where each pair's begin in `margins`

    def of(self, pair: int) -> list[float]:
        """The pair's margins, in the order of time."""
        return [float(margin) for margin in self.margins[self.starts[pair]:self.starts[pair + 1]]]

    def never_learned(self) -> NDArray[np.int64]:
        """Pairs seen at least twice whose margin was never above 0, the least confident first. A first visit alone
        says nothing: it comes before the pair was trained on."""
        found = np.flatnonzero((self.visits > 1) & (self.correct == 0))
        return found[np.argsort(self.confidence[found], kind="stable")]

    def forgotten(self) -> NDArray[np.int64]:
        """Pairs whose margin was above 0 at a visit and was not at the last one, those that fell furthest first."""
        found = np.flatnonzero((self.correct > 0) & (self.last <= 0))
        return found[np.argsort(-self.fall[found], kind="stable")]


def data_map(visits: Visits, n: int) -> DataMap:
    """The data map of n pairs."""
    order = np.lexsort((visits.step, visits.pair))
    pair, margin = visits.pair[order].astype(np.int64), visits.margin[order]
    count = np.bincount(pair, minlength=n)
    starts = np.concatenate([[0], np.cumsum(count)])
    probability = 1 / (1 + np.exp(-np.clip(margin, -500, 500)))

    def mean(values: Floats) -> Floats:
        with np.errstate(invalid="ignore"):
            return np.bincount(pair, values, n) / count

    confidence = mean(probability)
    variability = np.sqrt(mean((probability - confidence[pair]) ** 2))
    first, last, fall = (np.full(n, np.nan) for _ in range(3))
    seen = np.flatnonzero(count)
    first[seen], last[seen] = margin[starts[seen]], margin[starts[seen + 1] - 1]
    if len(seen):
        fall[seen] = np.maximum.reduceat(margin, starts[seen]) - last[seen]
    return DataMap(count, confidence, variability, mean((margin > 0).astype(np.float64)), first, last, fall, margin,
                   starts)
