"""p values of differences, and their correction where there are many."""
from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dpo_dist.stats.intervals import Clusters, Floats


def difference_of_shares(values: ArrayLike, inside: NDArray[np.bool_], weights: ArrayLike | None = None,
                         clusters: Clusters = None) -> tuple[float, float]:
    """(share of hits inside less that of the rest, two-sided p value of no difference). values: as in share_interval;
    inside: (n,), true for some and false for others.

    Fisher's exact test, right for few observations too, at the effective numbers of them: those of equal weight that
    vary as much as these, whose clusters agree with themselves as much as clusters do on the whole. What is then no
    whole number is rounded the way that makes the difference smaller.
    """
    y = np.asarray(values, dtype=np.float64)
    w = np.ones(len(y)) if weights is None else np.asarray(weights, dtype=np.float64)
    group = np.arange(len(y)) if clusters is None else clusters
    sides = [inside, ~inside]
    shares = [float(np.average(y[side], weights=w[side])) for side in sides]
    difference = shares[0] - shares[1]
    agreement = _agreement(y - np.where(inside, *shares), w, group)
    sizes = [max(1, math.floor(_effective(w[side], group[side], agreement) + 1e-9)) for side in sides]
    expected = sum(size * share for size, share in zip(sizes, shares, strict=True)) / sum(sizes)
    hits = [_towards(size * share, size * expected) for size, share in zip(sizes, shares, strict=True)]
    return difference, fisher_exact(hits[0], sizes[0], sum(hits), sum(sizes))


def _agreement(errors: Floats, w: Floats, group: NDArray[np.int64]) -> float:
    """The correlation of two observations of one cluster, by moments, from 0 to 1."""
    squares = np.square(w * errors)
    couples = float((np.square(np.bincount(group, weights=w)) - np.bincount(group, weights=w * w)).sum())
    if couples <= 0 or not squares.any():
        return 0.0
    together = float(np.square(np.bincount(group, weights=w * errors)).sum() - squares.sum())
    return min(1.0, max(0.0, together / couples / (squares.sum() / np.square(w).sum())))


def _effective(w: Floats, group: NDArray[np.int64], agreement: float) -> float:
    apart = float(np.square(w).sum())
    couples = float(np.square(np.bincount(group, weights=w)).sum()) - apart
    return float(w.sum()) ** 2 / (apart + agreement * couples)


def _towards(hits: float, expected: float) -> int:
    return math.floor(hits + 1e-9) if hits > expected else math.ceil(hits - 1e-9)


def fisher_exact(hits: int, n: int, all_hits: int, all_n: int) -> float:
    """Two-sided p value that n of all_n observations, drawn at random, hold so many of the all_hits hits: the sum of
    all outcomes that are no likelier (Fisher 1935)."""
    fewest, most = max(0, n - (all_n - all_hits)), min(n, all_hits)
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, all_n + 1)))])       # log k!
    k = np.arange(fewest, most + 1)

    def choose(total: int, taken: NDArray[np.int64]) -> Floats:
        return logs[total] - logs[taken] - logs[total - taken]

    log_p = choose(all_hits, k) + choose(all_n - all_hits, n - k) - choose(all_n, np.array([n]))
    seen = log_p[min(max(hits, fewest), most) - fewest]
    return min(1.0, float(np.exp(log_p[log_p <= seen + 1e-9]).sum()))


def holm(p_values: ArrayLike) -> Floats:
    """(n,) p values corrected for their number (Holm 1979): with those below 0.05 called findings, the chance of any
    false one is at most 5 %, however the tests depend on each other."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    corrected = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return _put_back(corrected, order)


def benjamini_hochberg(p_values: ArrayLike) -> Floats:
    """(n,) p values corrected for their number (Benjamini and Hochberg 1995): of those below 0.05, at most 5 % are
    expected to be false findings, where tests are independent or depend positively."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    raised = p[order] * len(p) / np.arange(1, len(p) + 1)
    return _put_back(np.minimum.accumulate(raised[::-1])[::-1], order)


def _put_back(corrected: Floats, order: NDArray[np.int64]) -> Floats:
    found = np.empty(len(corrected))
    found[order] = np.minimum(corrected, 1.0)
    return found
