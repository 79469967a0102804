"""A long curve in few points that still shows what the whole shows. Plain lists: it is not worth a numpy."""
from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

MOST_POINTS = 1000                       # of a curve
MEANS = 250                              # points of a moving mean
MEAN_FROM = 60                           # a curve with fewer points needs none

Points = tuple[list[float], list[float]]


def thinned(x: Sequence[float], y: Sequence[float], most: int = MOST_POINTS) -> Points:
    """At most `most` of the points: of equal stretches the lowest and the highest, so that no spike is lost."""
    if len(x) <= most:
        return list(x), list(y)
    stretches = most // 2
    kept: list[int] = []
    for i in range(stretches):
        stretch = range(i * len(x) // stretches, (i + 1) * len(x) // stretches)
        kept += sorted({min(stretch, key=lambda at: y[at]), max(stretch, key=lambda at: y[at])})
    return [x[i] for i in kept], [y[i] for i in kept]


def moving_mean(x: Sequence[float], y: Sequence[float], window: int) -> Points:
    """The mean of the `window` values around each point (fewer at the ends), at no more than MEANS points."""
    sums = [0.0, *accumulate(y)]
    every = max(1, len(x) // MEANS)
    at = sorted({*range(0, len(x), every), len(x) - 1})
    half = window // 2
    means = []
    for i in at:
        low, high = max(0, i - half), min(len(y), i + half + 1)
        means.append((sums[high] - sums[low]) / (high - low))
    return [x[i] for i in at], means


def window_of(n: int) -> int:
    """How many values a moving mean of n is over: about a twentieth, odd."""
    return max(3, n // 20) | 1
