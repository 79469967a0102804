"""What tells chosen from rejected without reading: length, style, place. A bias is told where chance does not explain
it and a policy would learn it."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_dist.audit.facts import RATED, TOKENS, Facts
from dpo_dist.audit.findings import Finding, Severity, finding
from dpo_dist.audit.style import FEATURES, FOLDS, fit_judge
from dpo_dist.stats.auc import auc_interval
from dpo_dist.stats.intervals import Interval, cluster_numbers, share_interval

# a clean set of pairs may have one in a thousand such findings
CHANCE = 0.001
# a judge that is right this often beyond doubt is one that a policy learns from; below it is told, and is no alarm
PRACTICAL = 0.55
LEAST_PAIRS = 30                             # below, only a coin's luck is seen
LEAST_SHARE = 0.01                           # of the pairs, in which a feature must stand on one side alone
OPENINGS = 12                                # the most frequent ones, which are features as well
LEAST_OPENINGS = 20                          # answers that begin so
MOST_FITTED = 50_000                         # pairs that the classifier is fitted on
SORTED = 0.98                                # of rated lists, the better first: they were sorted, not shown so
Places = NDArray[np.int64]


def length_bias(facts: Facts, judged: Places) -> Iterator[Finding]:
    lengths = facts.length[judged].astype(float)
    if len(judged) < LEAST_PAIRS:
        return
    difference = lengths[:, 0] - lengths[:, 1]
    longer = _first_ahead(np.sign(difference), facts, judged)
    severity = _severity(longer)
    if severity is None:
        return
    is_longer = longer.value > 0.5
    concerned = difference > 0 if is_longer else difference < 0
    order = judged[np.argsort(-difference if is_longer else difference, kind="stable")]
    prompts = cluster_numbers(facts.content[judged, 0])
    area = auc_interval(lengths[:, 0], lengths[:, 1], prompts, prompts, 1 - CHANCE)
    assert area is not None, "there are pairs"
    unit = "tokens" if (facts.flags[judged] & TOKENS).all() else "characters"
    yield finding("length_bias", int(concerned.sum()), len(judged), facts.wheres(order[:50]), severity,
                  longer_chosen=_rounded(longer), auc=_rounded(area), median_difference=float(np.median(difference)),
                  unit=unit)


def _first_ahead(signs: NDArray[np.float64], facts: Facts, of: Places) -> Interval:
    """The share of +1 among signs of +1, 0 and -1 of these pairs (0 counts half), with the interval that chance leaves
    with probability CHANCE; pairs of one prompt depend on each other."""
    found = share_interval((signs + 1) / 2, clusters=cluster_numbers(facts.content[of, 0]), level=1 - CHANCE)
    assert found is not None, "there are pairs"
    return found


def _rounded(found: Interval) -> dict[str, float]:
    return {name: round(value, 4) for name, value in found.as_dict().items()}


def _severity(found: Interval) -> Severity | None:
    """None where chance explains a share; info where it does not; a warning where a policy would learn it."""
    low = found.low if found.value >= 0.5 else 1 - found.high
    if low <= 0.5:
        return None
    return "warning" if low >= PRACTICAL else "info"


def style_bias(facts: Facts, judged: Places) -> Iterator[Finding]:
    judged = judged[(facts.flags[judged] & TOKENS) == 0]
    if len(judged) < LEAST_PAIRS:
        return
    names, differences = _features(facts, judged)
    alone = _alone(names, differences)
    used = np.array([np.count_nonzero(column) >= 5 for column in differences.T], dtype=bool)
    fitted = np.argsort(facts.content[judged].sum(1), kind="stable")[:MOST_FITTED]
    x = differences[fitted][:, used].astype(float)
    length = np.log1p(facts.length[judged[fitted]].astype(float))
    folds = (facts.content[judged[fitted], 0] % np.uint64(FOLDS)).astype(np.int64)
    judge = fit_judge(x, (length[:, :1] - length[:, 1:]), folds)
    right = _first_ahead(np.sign(judge.scores), facts, judged[fitted])
    severity = _severity(right) if right.value > 0.5 else None
    if any(entry["severity"] == "warning" for entry in alone):
        severity = "warning"
    elif alone and severity is None:
        severity = "info"
    if severity is None:
        return
    weights = dict(zip([name for name, is_used in zip(names, used, strict=True) if is_used],
                       judge.weights.round(3).tolist(), strict=True))
    scores = np.zeros(len(judged))
    scores[fitted] = judge.scores
    order = judged[np.argsort(-scores, kind="stable")]
    yield finding("style_bias", int((scores > 0).sum()), len(judged), facts.wheres(order[:50]), severity,
                  held_out_accuracy=_rounded(right),
                  weights=dict(sorted(weights.items(), key=lambda item: -abs(item[1]))),
                  features=[{k: v for k, v in entry.items() if k != "severity"} for entry in alone])


def _features(facts: Facts, judged: Places) -> tuple[list[str], NDArray[np.int8]]:
    """(names, (n, F) differences): the named features, and the most frequent openings."""
    openings = facts.opening[judged]
    keys, counts = np.unique(openings[openings > 0], return_counts=True)
    frequent = [int(key) for key in keys[np.argsort(-counts, kind="stable")][:OPENINGS]
                if counts[keys == key][0] >= LEAST_OPENINGS and int(key) in facts.openings]
    columns = [(openings[:, 0] == key).astype("<i1") - (openings[:, 1] == key).astype("<i1") for key in frequent]
    names = [*FEATURES, *(f"begins with {facts.openings[key]!r}" for key in frequent)]
    return names, np.concatenate([facts.style[judged], *(column[:, None] for column in columns)], axis=1)


def _alone(names: list[str], differences: NDArray[np.int8]) -> list[dict[str, Any]]:
    """The features that by themselves tell the sides apart, where one side has them and the other not."""
    out = []
    for name, column in zip(names, differences.T, strict=True):
        n = int(np.count_nonzero(column))
        if n < max(LEAST_PAIRS, LEAST_SHARE * len(column)):
            continue
        found = share_interval(column[column != 0] > 0, level=1 - CHANCE / len(names))
        assert found is not None, "some pairs have it"
        if severity := _severity(found):
            out.append({"feature": name, "only_one_has_it": n, "of_these_chosen": _rounded(found),
                        "severity": severity})
    return sorted(out, key=lambda entry: -abs(entry["of_these_chosen"]["value"] - 0.5))


def position_bias(facts: Facts, judged: Places) -> Iterator[Finding]:
    """Told apart by data set: an order means something within one alone."""
    known = judged[facts.order[judged] != 0]
    for data_set in np.unique(facts.data_set[known]):
        own = known[facts.data_set[known] == data_set]
        order = facts.order[own].astype(float)
        if len(own) < LEAST_PAIRS:
            continue
        first = _first_ahead(order, facts, own)
        severity = _severity(first)
        if severity is None:
            continue
        sorted_lists = bool((facts.flags[own] & RATED).all()) and abs(first.value - 0.5) >= SORTED - 0.5
        wins = own[order > 0] if first.value > 0.5 else own[order < 0]
        yield finding("position_bias", len(wins), len(own), facts.wheres(wins), "info" if sorted_lists else severity,
                      first_is_chosen=_rounded(first),
                      **({"note": "rated lists with the better answer always on one side: sorted"} if sorted_lists
                         else {}))
