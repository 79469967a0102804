"""What tells chosen from rejected without reading: length, style, place. A bias is told where chance does not explain
it and a policy would learn it."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_dist.audit.chance import Interval, auc, mean_share, share, two_sided
from dpo_dist.audit.facts import RATED, TOKENS, Facts
from dpo_dist.audit.findings import Finding, Severity, finding
from dpo_dist.audit.style import FEATURES, FOLDS, fit_judge

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
    z = two_sided(CHANCE)
    longer = mean_share(np.sign(difference), facts.content[judged, 0].astype(np.int64), z)
    severity = _severity(longer)
    if severity is None:
        return
    is_longer = longer.value > 0.5
    concerned = difference > 0 if is_longer else difference < 0
    order = judged[np.argsort(-difference if is_longer else difference, kind="stable")]
    unit = "tokens" if (facts.flags[judged] & TOKENS).all() else "characters"
    yield finding("length_bias", int(concerned.sum()), len(judged), facts.wheres(order[:50]), severity,
                  longer_chosen=longer.as_json(), auc=auc(lengths[:, 0], lengths[:, 1], z).as_json(),
                  median_difference=float(np.median(difference)), unit=unit)


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
    right = mean_share(np.sign(judge.scores), facts.content[judged[fitted], 0].astype(np.int64), two_sided(CHANCE))
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
                  held_out_auc=right.as_json(), weights=dict(sorted(weights.items(), key=lambda item: -abs(item[1]))),
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
    z, out = two_sided(CHANCE / len(names)), []
    for name, column in zip(names, differences.T, strict=True):
        n = int(np.count_nonzero(column))
        if n < max(LEAST_PAIRS, LEAST_SHARE * len(column)):
            continue
        found = share(float((column > 0).sum()), n, z)
        if severity := _severity(found):
            out.append({"feature": name, "only_one_has_it": n, "of_these_chosen": found.as_json(),
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
        first = mean_share(order, facts.content[own, 0].astype(np.int64), two_sided(CHANCE))
        severity = _severity(first)
        if severity is None:
            continue
        sorted_lists = bool((facts.flags[own] & RATED).all()) and abs(first.value - 0.5) >= SORTED - 0.5
        wins = own[order > 0] if first.value > 0.5 else own[order < 0]
        yield finding("position_bias", len(wins), len(own), facts.wheres(wins), "info" if sorted_lists else severity,
                      first_is_chosen=first.as_json(),
                      **({"note": "rated lists with the better answer always on one side: sorted"} if sorted_lists
                         else {}))
