"""Which labels look flipped: evidence from each pair's margins, and from the words of the other pairs.

A pair's first visit comes before the model was trained on it, so its margin is a forecast of the label by a model that
has seen only other pairs; it says the more, the further training has come. Later visits also show what the model
remembers of this very pair, so they count for less. Flipped labels are taken to be as any others but for their sign:
where margins of the time lie about mu with spread s, those of flipped ones lie about -mu.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpo_dist.dynamics.visits import Visits

CENTRES = 64                                 # points of training at which margins are summed up
LEAST_WINDOW, MOST_WINDOW = 64, 4096         # visits of which each is made
MOST_DISTANCE = 2.0                          # between 0 and the middle of right labels' margins, in spreads
PRIOR_PAIRS = 10.0                           # what holds the margins' weight to 1
MEMORY = 0.7                                 # what a visit counts, over what the visit before it does
LEAST_SURE = 0.8                             # probability from which on a label counts as flipped
NORMAL_MAD = 1.4826                          # standard deviation of a normal distribution over its median deviation

Floats = NDArray[np.float64]
Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Suspicion:
    """How each of n pairs' labels stands; nats of log-odds, before any belief of how many are flipped."""

    score: Floats                            # (n,) that it is flipped; the largest is the most suspicious
    margins: Floats                          # (n,) what of -score the pair's own margins say
    words: Floats                            # (n,) and what the words of other pairs say
    flipped: int                             # how many are, by estimate


def suspicion(visits: Visits, words: Floats) -> Suspicion:
    """The evidence on all pairs. words: (n,) margins of a judge that each pair had no part in (words.py); 0 where there
    is none."""
    n = len(words)
    number = visit_numbers(visits)
    each = _visit_evidence(visits, number)
    first = np.bincount(visits.pair, np.where(number == 0, each, 0.0), n)
    whole = np.bincount(visits.pair, each * MEMORY ** np.minimum(number, 30), n)
    seen = np.bincount(visits.pair, minlength=n) > 0
    of_margins, of_words = _weights(np.stack([first, words], 1)[seen])
    margins, words = of_margins * whole, of_words * words
    return Suspicion(-(margins + words), margins, words, _flipped(margins + words))


def visit_numbers(visits: Visits) -> Numbers:
    """(visits,) how often the pair was seen before."""
    order = np.lexsort((visits.step, visits.pair))
    pair = visits.pair[order]
    starts = np.flatnonzero(np.diff(pair, prepend=-1))
    number = np.empty(len(pair), np.int64)
    number[order] = np.arange(len(pair)) - np.repeat(starts, np.diff(np.append(starts, len(pair))))
    return number


def _visit_evidence(visits: Visits, number: Numbers) -> Floats:
    """(visits,) nats that the label is right, by this visit alone.

    log p(margin | right) - log p(margin | flipped) under densities of hyperbolic shape, log p = -sqrt(1 + z²): near
    their middle as of normal ones, 2 mu m / s², and never more than twice the distance mu / s. Memory moves mu, so
    that visits of one number are held against each other only, and no distance counts as more than MOST_DISTANCE.
    """
    out, margin = np.zeros(len(visits)), visits.margin
    for k in range(int(number.max(initial=-1)) + 1):
        these = np.flatnonzero(number == k)              # by step: visits are
        middle, spread = _local(margin[these])
        z, distance = (margin[these] - middle) / spread, np.clip(middle / spread, 0, MOST_DISTANCE)
        out[these] = np.hypot(1, z + 2 * distance) - np.hypot(1, z)
    return out


def _local(margin: Floats) -> tuple[Floats, Floats]:
    """((m,) middle, (m,) spread) of the margins about each, in the order of time: medians, so that the flipped ones
    themselves do not matter, between CENTRES points."""
    m = len(margin)
    width = min(m, max(LEAST_WINDOW, min(m // 8, MOST_WINDOW)))
    starts = np.unique(np.linspace(0, m - width, CENTRES).astype(int))
    middles, spreads = np.empty(len(starts)), np.empty(len(starts))
    for i, start in enumerate(starts):
        part = margin[start:start + width]
        middles[i] = np.median(part)
        spreads[i] = NORMAL_MAD * np.median(np.abs(part - middles[i]))
    centres, at = starts + (width - 1) / 2, np.arange(m)
    least = max(float(spreads.max(initial=0.0)) * 1e-3, 1e-12)
    return np.interp(at, centres, middles), np.maximum(np.interp(at, centres, spreads), least)


def _weights(evidence: Floats) -> Floats:
    """(2,) what each witness counts, at least 0: a logistic regression of the labels on what both say. As both change
    sign with the label, it has no constant and one class; a judge of words that knows nothing gets nothing. Margins
    count as they are where first visits cannot tell, since nothing was learned before them."""
    prior, strength = np.array([1.0, 0.0]), np.diag([PRIOR_PAIRS, 1e-2])
    best, least = prior, np.inf
    for active in ([0, 1], [0], [1]):                    # the best without a negative one
        x, here, pull = evidence[:, active], prior[active], strength[np.ix_(active, active)]
        w = here
        for _ in range(30):
            wrong = 1 / (1 + np.exp(np.clip(x @ w, -30, 30)))
            curvature = (x * (wrong * (1 - wrong))[:, None]).T @ x + pull
            step = np.linalg.solve(curvature, x.T @ wrong - pull @ (w - here))
            w = w + step
            if np.abs(step).max() < 1e-9:
                break
        whole = np.zeros(2)
        whole[active] = w
        loss = float(np.logaddexp(0, -(x @ w)).sum() + 0.5 * (whole - prior) @ strength @ (whole - prior))
        if (w >= 0).all() and loss < least:
            best, least = whole, loss
    return best


def _flipped(right: Floats) -> int:
    """How many labels are flipped: those that the evidence denies as surely as it affirms a label on average
    (confident learning, Northcutt et al. 2021, arXiv 1911.00068, with one threshold, as both classes are one), and at
    least with LEAST_SURE: where nothing was learned, nothing is suspected."""
    probability = 1 / (1 + np.exp(-np.clip(right, -30, 30)))
    return int((1 - probability >= max(float(probability.mean()), LEAST_SURE)).sum()) if len(right) else 0
