"""What the other pairs' words say of a pair's label: a linear judge of tokens, fitted on some pairs and asked about the
others. It knows as much of the first pairs of a run as of the last, which the model's own margins do not.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dpo_dist.data.store import PairStore

FEW, FOLDS_OF_FEW, FOLDS = 2_000, 10, 4      # up to so many pairs, every one counts
RIDGE = 1.0                                  # of the weights, where a token in few pairs counts less (see `_features`)
RARE = 100.0                                 # added to the number of pairs that a token is in
MOST_FITTED = 10_000                         # pairs that a judge is fitted on: more would teach it little
MOST_JUDGED = 200_000                        # pairs of a set: of a larger one margins alone are looked at
NEIGHBOURS = 1 << 17                         # columns that two neighbouring tokens share, by a hash
HASH, PRIME = 1_000_003, 2_147_483_647
MOST_TOKENS = 1_024                          # of a completion; the last token is always looked at
AT_ONCE = 5_000                              # pairs
NEWTON_STEPS, CONJUGATE_STEPS = 8, 20

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Rows:
    """A sparse matrix: n rows, whose entries lie end to end."""

    column: NDArray[np.int64]
    value: Floats
    row: NDArray[np.int64]
    n: int

    def times(self, weights: Floats) -> Floats:
        """(n,)"""
        return np.bincount(self.row, self.value * weights[self.column], self.n).astype(np.float64, copy=False)

    def transposed_times(self, values: Floats, columns: int) -> Floats:
        """(columns,)"""
        return np.bincount(self.column, self.value * values[self.row], columns).astype(np.float64, copy=False)

    def scaled(self, scale: Floats) -> Rows:
        """The same with each column multiplied."""
        return Rows(self.column, self.value * scale[self.column], self.row, self.n)


def word_evidence(pairs: PairStore) -> Floats:
    """(n,) nats: how far the words of the other pairs speak for each pair's label, as a logistic regression's margin;
    below 0 they speak against it.

    The features change sign with the label: for each token, and each two neighbouring ones, how much oftener chosen
    holds it than rejected, on a logarithmic scale; the lengths, and the token that each ends with. Every pair is judged
    by weights that it had no part in (cross-fitting; Northcutt et al. 2021, arXiv 1911.00068). 0 for all where the
    pairs are too few for that, or more than MOST_JUDGED, which would take long.
    """
    n, columns = len(pairs), 2 * (pairs.largest_id() + 1) + NEIGHBOURS + 1
    folds = FOLDS_OF_FEW if n <= FEW else FOLDS
    if not 2 * folds <= n <= MOST_JUDGED:
        return np.zeros(n)
    random = np.random.Generator(np.random.Philox(0))
    lots = random.permutation(n)
    fold = np.empty(n, np.int64)
    fold[lots] = np.arange(n) % folds
    fitted = np.sort(lots[:MOST_FITTED])
    rows = _features(pairs, fitted, columns)
    used, column = np.unique(rows.column, return_inverse=True)
    scale = np.zeros(columns)                            # a token that no fitted pair has says nothing
    scale[used] = 1 / np.sqrt(np.bincount(column) + RARE)
    rows = replace(rows.scaled(scale), column=column)
    weights = np.zeros((folds, columns))
    for k in range(folds):
        weights[k, used] = _fit(_some(rows, fold[fitted] != k), len(used))
    found = np.empty(n)
    for start in range(0, n, AT_ONCE):
        some = np.arange(start, min(start + AT_ONCE, n))
        part = _features(pairs, some, columns).scaled(scale)
        of_row = fold[some]
        found[some] = np.bincount(part.row, part.value * weights[of_row[part.row], part.column], part.n)
    return found


def _features(pairs: PairStore, ids: Sequence[int] | NDArray[np.int64], columns: int) -> Rows:
    """(len(ids), columns): a column for each token, one for each token that ends a completion, those of neighbours, one
    for the length."""
    tokens = (columns - 1 - NEIGHBOURS) // 2
    keys, signs, rows = [], [], []
    for at, i in enumerate(ids):
        _, *completions = pairs.parts(int(i))
        for side, completion in zip((1, -1), completions, strict=True):
            said = completion[:MOST_TOKENS].astype(np.int64)
            both = (said[:-1] * HASH + said[1:]) % PRIME % NEIGHBOURS
            keys.append(np.concatenate([said, [tokens + int(completion[-1])], 2 * tokens + both]))
            signs.append(np.full(len(keys[-1]), side))
            rows.append(np.full(len(keys[-1]), at))
    cells = (np.concatenate(rows) * columns + np.concatenate(keys)) * 2 + (np.concatenate(signs) > 0)
    cell, times = np.unique(cells, return_counts=True)
    signed = np.where(cell % 2, 1.0, -1.0) * np.log1p(times)
    cell, group = np.unique(cell // 2, return_inverse=True)
    value = np.bincount(group, signed)
    lengths = pairs.lengths()[ids]
    length = np.log(np.maximum(lengths[:, 1], 1)) - np.log(np.maximum(lengths[:, 2], 1))
    return Rows(np.append(cell % columns, np.full(len(ids), columns - 1)).astype(np.int64), np.append(value, length),
                np.append(cell // columns, np.arange(len(ids))).astype(np.int64), len(ids))


def _some(rows: Rows, wanted: NDArray[np.bool_]) -> Rows:
    keep = wanted[rows.row]
    number = np.cumsum(wanted) - 1
    return Rows(rows.column[keep], rows.value[keep], number[rows.row[keep]], int(wanted.sum()))


def _fit(rows: Rows, columns: int) -> Floats:
    """(columns,) weights that minimize the sum of log(1 + exp(-x·w)) + RIDGE / 2 |w|²: Newton's steps, each solved by
    conjugate gradients."""
    weights = np.zeros(columns)
    for _ in range(NEWTON_STEPS):
        wrong = 1 / (1 + np.exp(np.clip(rows.times(weights), -30, 30)))          # probability of the other label
        gradient = RIDGE * weights - rows.transposed_times(wrong, columns)
        curvature = wrong * (1 - wrong)
        step = _solve(rows, curvature, -gradient, columns)
        weights = weights + step
        if np.abs(step).max(initial=0) < 1e-3:
            break
    return weights


def _solve(rows: Rows, curvature: Floats, target: Floats, columns: int) -> Floats:
    """x where (X' diag(curvature) X + RIDGE) x = target, nearly."""
    x, rest = np.zeros(columns), target.copy()
    direction, size = rest.copy(), float(rest @ rest)
    first = size
    for _ in range(CONJUGATE_STEPS):
        if size <= 1e-8 * first:
            break
        image = RIDGE * direction + rows.transposed_times(curvature * rows.times(direction), columns)
        length = size / float(direction @ image)
        x, rest = x + length * direction, rest - length * image
        size, before = float(rest @ rest), size
        direction = rest + size / before * direction
    return x
