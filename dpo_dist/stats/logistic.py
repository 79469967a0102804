"""Logistic regression with a few columns, by Newton's method, and its cluster-robust covariance."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dpo_dist.stats.calibration import sigmoid
from dpo_dist.stats.intervals import Clusters, Floats

STEPS, LARGEST = 50, 30.0                    # log odds beyond which the data are taken for separable


@dataclass(frozen=True)
class Fit:
    coefficients: Floats                     # (k,) log odds a unit of each column
    covariance: Floats                       # (k, k), what varies summed by cluster
    fitted: Floats                           # (n,) probabilities


def logistic_fit(columns: Floats, hits: ArrayLike, weights: ArrayLike | None = None,
                 clusters: Clusters = None) -> Fit | None:
    """The likeliest coefficients of P(hit) = σ(columns · coefficients); columns: (n, k), without an intercept of its
    own; hits: (n,) in [0, 1]. None where there is none: the data are separable, or columns say the same."""
    x, y = np.asarray(columns, dtype=np.float64), np.asarray(hits, dtype=np.float64)
    w = np.ones(len(y)) if weights is None else np.asarray(weights, dtype=np.float64)
    b, previous = np.zeros(x.shape[1]), np.inf
    for _ in range(STEPS):
        p = sigmoid(x @ b)
        hessian = (x * (w * p * (1 - p))[:, None]).T @ x
        if np.linalg.cond(hessian) > 1e12:
            return None
        step = np.linalg.solve(hessian, x.T @ (w * (y - p)))
        loss = _loss(x, y, w, b + step)
        while loss > previous + 1e-12 * abs(previous) and np.abs(step).max() > 1e-12:        # a step too far
            step /= 2
            loss = _loss(x, y, w, b + step)
        b, previous = b + step, loss
        if np.abs(x @ b).max() > LARGEST:
            return None
        if np.abs(step).max() < 1e-10:
            return _with_covariance(x, y, w, b, np.arange(len(y)) if clusters is None else clusters)
    return None


def _loss(x: Floats, y: Floats, w: Floats, b: Floats) -> float:
    logit = x @ b
    return float((w * (np.logaddexp(0, logit) - y * logit)).sum())


def _with_covariance(x: Floats, y: Floats, w: Floats, b: Floats, group: NDArray[np.int64]) -> Fit:
    p = sigmoid(x @ b)
    inverse = np.linalg.inv((x * (w * p * (1 - p))[:, None]).T @ x)
    scores = x * (w * (y - p))[:, None]
    sums = np.stack([np.bincount(group, weights=column) for column in scores.T], axis=1)
    count = len(np.unique(group))
    meat = sums.T @ sums * (count / (count - 1) if count > 1 else 1.0)
    return Fit(b, inverse @ meat @ inverse, p)
