"""How often answers are preferred to others: the win rate, and the same at equal length. Numpy only.

Each pair of answers is judged in both orders, so a judge that likes the first one better cancels out of the rate; how
often its two verdicts agree is reported beside it.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpo_dist.judge import Comparison, Judge, Text

Floats = NDArray[np.float64]

Z = 1.959964                             # of a 95 % interval
RESAMPLES = 2000
FEWEST_TO_FIT = 10                       # pairs, below which a slope on length says nothing
RIDGE = 0.1                              # see length_controlled
NEWTON_STEPS = 25


@dataclass(frozen=True)
class Rate:
    """A share with its 95 % interval, from so many pairs of answers."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Duel:
    """A prompt, our answer and the other, with their lengths in tokens."""

    prompt: Text
    ours: Text
    theirs: Text
    our_tokens: int
    their_tokens: int


@dataclass(frozen=True)
class WinRate:
    """What a judge makes of pairs of answers. A tie counts half."""

    win_rate: Rate
    length_controlled: Rate | None       # None: fewer than FEWEST_TO_FIT pairs
    wins: int                            # pairs of answers in which both orders together prefer ours ...
    ties: int                            # ... prefer neither, or contradict each other ...
    losses: int
    position_consistency: float          # share of pairs with the same verdict in both orders
    first_preferred: float               # share of verdicts for the answer that stands first, of those that are no tie


def judge_duels(judge: Judge, duels: Sequence[Duel], seed: int = 0) -> tuple[WinRate, Floats]:
    """(the rates, the (n,) wins of ours: 0, 0.25, 0.5, 0.75 or 1). The judge is asked both orders of each, in one
    shuffled row, and is not told whose an answer is. UserError where it fails."""
    n = len(duels)
    order = np.random.default_rng(seed).permutation(2 * n)       # question q < n: ours is first; else theirs is
    asked = [_comparison(duels[q % n], ours_first=q < n) for q in order.tolist()]
    verdicts = np.empty(2 * n)
    verdicts[order] = judge.compare(asked)
    first, second = verdicts[:n], 1 - verdicts[n:]                # ours preferred, in either order
    won = (first + second) / 2
    difference = np.array([duel.our_tokens - duel.their_tokens for duel in duels], dtype=np.float64)
    decided = verdicts[verdicts != 0.5]
    return WinRate(
        win_rate=share(won), length_controlled=length_controlled(won, difference, seed),
        wins=int((won > 0.5).sum()), ties=int((won == 0.5).sum()), losses=int((won < 0.5).sum()),
        position_consistency=float((first == second).mean()),
        first_preferred=float(decided.mean()) if len(decided) else 0.5), won


def _comparison(duel: Duel, ours_first: bool) -> Comparison:
    return (Comparison(duel.prompt, duel.ours, duel.theirs) if ours_first
            else Comparison(duel.prompt, duel.theirs, duel.ours))


def share(won: Floats) -> Rate:
    """The mean of (n,) wins in [0, 1] with Wilson's interval (JASA 22, 1927). Halves vary less than wins and losses, so
    for them the interval is wider than it need be."""
    n, p = len(won), float(won.mean())
    middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * math.sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    return Rate(p, max(middle - half, 0.0), min(middle + half, 1.0), n)


def length_controlled(won: Floats, difference: Floats, seed: int = 0) -> Rate | None:
    """The win rate that a logistic regression of (n,) wins on the difference in length gives where that is 0; None
    below FEWEST_TO_FIT pairs.

    After length-controlled AlpacaEval (arXiv 2404.04475, eq. 2) without its term for each instruction, which needs many
    models: logit P(win) = theta + phi · tanh(difference / its standard deviation). Both have a ridge of RIDGE, so that
    wins which lengths separate wholly keep a finite fit; it draws the rate towards 1/2 by less than one pair would. The
    interval is a bootstrap's over the pairs.
    """
    n, spread = len(won), float(difference.std())
    if n < FEWEST_TO_FIT:
        return None
    if spread == 0:
        return share(won)
    x = np.tanh(difference / spread)
    picked = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(np.float64)
    at_zero = 1 / (1 + np.exp(-_fit(won, x, np.vstack([np.ones(n), picked]))[:, 0]))
    low, high = np.quantile(at_zero[1:], (0.025, 0.975)).tolist()
    return Rate(float(at_zero[0]), min(low, float(at_zero[0])), max(high, float(at_zero[0])), n)


def _fit(won: Floats, x: Floats, counts: Floats) -> Floats:
    """(B, 2) theta and phi of each of the (B, n) weightings of the pairs, by Newton's method, all at once."""
    weights = np.zeros((len(counts), 2))
    for _ in range(NEWTON_STEPS):
        p = 1 / (1 + np.exp(-np.clip(weights[:, :1] + weights[:, 1:] * x, -30, 30)))
        residual, curve = counts * (won - p), counts * p * (1 - p)
        slope = np.stack([residual.sum(1), residual @ x], axis=1) - RIDGE * weights
        a, b, c = curve.sum(1) + RIDGE, curve @ x, curve @ (x * x) + RIDGE
        determinant = a * c - b * b
        step = np.stack([c * slope[:, 0] - b * slope[:, 1], a * slope[:, 1] - b * slope[:, 0]], axis=1)
        step /= determinant[:, None]
        weights += np.clip(step, -2, 2)                  # far from the optimum a whole step may overshoot
        if np.abs(step).max() < 1e-8:
            break
    return weights
