"""Accuracy by slice: each with its interval, its difference to the rest, and whether that survives the correction for
so many comparisons."""
from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_dist.evaluation.facts import Facts
from dpo_dist.evaluation.pairs import Floats
from dpo_dist.stats.differences import difference_of_shares, holm
from dpo_dist.stats.intervals import share_interval

MIN_PAIRS = 10                               # of a slice and of the rest: fewer say nothing
MOST_VALUES = 50                             # of one kind, those with the most pairs
SIGNIFICANT = 0.05                           # of a p value, once corrected


def slices_of(hit: Floats, weight: Floats, facts: Facts, judged: NDArray[np.bool_]) -> tuple[list[dict[str, Any]], int]:
    """(a row for each slice, how many are left out as too small, or beyond MOST_VALUES). hit: (n,) of all pairs;
    judged: (n,) false for pairs that are left out (ties).

    Holm's correction over all rows: however slices overlap, the chance that any is flagged without being different is
    at most 5 %. `difference` is the slice's accuracy less that of all other pairs.
    """
    rows: list[dict[str, Any]] = []
    left_out = 0
    counts: dict[str, int] = {}
    hit, weight, prompt = hit[judged], weight[judged], facts.prompt[judged]
    by_size = sorted(facts.members.items(), key=lambda entry: (entry[0][0], -len(entry[1]), entry[0][1]))
    for (by, value), members in by_size:
        counts[by] = counts.get(by, 0) + 1
        if len(members) < MIN_PAIRS or counts[by] > MOST_VALUES:
            left_out += 1
            continue
        inside = np.zeros(len(judged), dtype=bool)
        inside[members] = True
        inside = inside[judged]
        if inside.all():
            continue                                     # nothing to compare with
        if min(inside.sum(), (~inside).sum()) < MIN_PAIRS:
            left_out += 1
            continue
        accuracy = share_interval(hit[inside], weight[inside], prompt[inside])
        assert accuracy is not None
        difference, p = difference_of_shares(hit, inside, weight, prompt)
        rows.append({"by": by, "value": value, "n": accuracy.n, "accuracy": accuracy.as_dict(),
                     "difference": difference, "p": p})
    for row, corrected in zip(rows, holm([row["p"] for row in rows]).tolist(), strict=True):
        row |= {"p_corrected": corrected, "flagged": corrected < SIGNIFICANT}
    return rows, left_out
