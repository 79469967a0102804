"""How often answers are preferred to others: the win rate, and the same at equal length. Numpy only.

Each pair of answers is judged in both orders, so a judge that likes the first one better cancels out of the rate; how
often its two verdicts agree is reported beside it.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo_dist.judge import Comparison, Judge, Text
from dpo_dist.stats.calibration import sigmoid
from dpo_dist.stats.intervals import LEVEL, Floats, Interval, share_interval, t_quantile
from dpo_dist.stats.logistic import logistic_fit

FEWEST_TO_FIT = 10                       # pairs, below which a slope on length says nothing


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

    win_rate: Interval | None            # None: there are no pairs
    length_controlled: Interval | None       # None: fewer than FEWEST_TO_FIT pairs
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
        win_rate=share_interval(won), length_controlled=length_controlled(won, difference),
        wins=int((won > 0.5).sum()), ties=int((won == 0.5).sum()), losses=int((won < 0.5).sum()),
        position_consistency=float((first == second).mean()),
        first_preferred=float(decided.mean()) if len(decided) else 0.5), won


def _comparison(duel: Duel, ours_first: bool) -> Comparison:
    return (Comparison(duel.prompt, duel.ours, duel.theirs) if ours_first
            else Comparison(duel.prompt, duel.theirs, duel.ours))


def length_controlled(won: Floats, difference: Floats) -> Interval | None:
    """The win rate that a logistic regression of (n,) wins on the (n,) differences in length gives where that is 0;
    None below FEWEST_TO_FIT pairs.

    After length-controlled AlpacaEval (arXiv 2404.04475, eq. 2) without its term for each instruction, which needs many
    models: logit P(win) = theta + phi · tanh(difference / its standard deviation). To the pairs come two more,
    undecided and of half a weight, one longer and one shorter: so the fit is finite even where lengths, or nothing,
    decide every pair. The interval is theta's, by the larger of its robust and its model's variance.
    """
    n, spread = len(won), float(difference.std())
    if n < FEWEST_TO_FIT:
        return None
    if spread == 0:
        return share_interval(won)
    x = np.append(np.tanh(difference / spread), [1.0, -1.0])
    weights = np.append(np.ones(n), [0.5, 0.5])
    columns = np.stack([np.ones(n + 2), x], axis=1)
    fit = logistic_fit(columns, np.append(won, [0.5, 0.5]), weights)
    if fit is None:
        return None
    curve = (columns * (weights * fit.fitted * (1 - fit.fitted))[:, None]).T @ columns
    variance = max(float(fit.covariance[0, 0]), float(np.linalg.inv(curve)[0, 0]))
    theta, half = float(fit.coefficients[0]), t_quantile(LEVEL, n - 2) * math.sqrt(variance)
    value, low, high = sigmoid([theta, theta - half, theta + half]).tolist()
    return Interval(value, low, high, n)
