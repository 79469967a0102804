"""Judgments that repeat or contradict each other, and those in which nobody saw a difference."""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dpo_dist.audit.facts import (
    ALIKE,
    BOTH_BAD,
    EMPTY_REASONING,
    EQUAL,
    SPECIAL,
    SPLIT_VOTE,
    TIE,
    TIES,
    Facts,
)
from dpo_dist.audit.findings import Finding, finding

Places = NDArray[np.int64]


def judged_twice(facts: Facts, judged: Places) -> Iterator[Finding]:
    """duplicate_pair, contradiction, preference_cycle, among the pairs `judged`."""
    content, of = facts.content[judged], len(judged)
    if not of:
        return
    first = _first_of_each(content)
    again = np.flatnonzero(first != np.arange(of))
    if len(again):
        yield finding("duplicate_pair", len(again), of, facts.wheres(judged[again]),
                      same_as=facts.wheres(judged[first[again[:20]]]))
    against = _contradicting(content)
    if len(against):
        yield finding("contradiction", len(against), of, facts.wheres(judged[against]),
                      by_other_annotators=_by_others(facts, judged, content, against))
    circles = list(_circles(content))
    if circles:
        pairs = np.array(sorted(at for circle in circles for at in circle))
        yield finding("preference_cycle", len(pairs), of, facts.wheres(judged[pairs]), circles=len(circles))


def _first_of_each(content: NDArray[np.uint64]) -> Places:
    """(n,) the first place with the same row."""
    _, first, inverse = np.unique(content, axis=0, return_index=True, return_inverse=True)
    return first[inverse.ravel()]


def _contradicting(content: NDArray[np.uint64]) -> Places:
    """Places of pairs whose opposite stands before them."""
    both = np.concatenate([content, content[:, [0, 2, 1]]])
    first, n = _first_of_each(both), len(content)
    opposite = first[n:]                                 # where (prompt, rejected, chosen) stands first, as a pair
    return np.flatnonzero((opposite < np.arange(n)) & (content[:, 1] != content[:, 2]))


def _by_others(facts: Facts, judged: Places, content: NDArray[np.uint64], against: Places) -> int:
    """How many of these contradict another annotator, where annotators are known."""
    annotator = facts.annotator[judged]
    first = _first_of_each(np.concatenate([content, content[:, [0, 2, 1]]]))[len(content):]
    mine, theirs = annotator[against], annotator[first[against]]
    return int(((mine > 0) & (theirs > 0) & (mine != theirs)).sum())


def _circles(content: NDArray[np.uint64]) -> Iterator[list[int]]:
    """The pairs (places) of each circle of three answers or more; two answers in both orders are none."""
    order = np.argsort(content[:, 0], kind="stable")
    starts = np.flatnonzero(np.diff(content[order, 0], prepend=content[order[:1], 0] + np.uint64(1)))
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(order)], strict=True):
        if end - start < 3:
            continue
        places = order[start:end].tolist()
        edges = {(int(content[at, 1]), int(content[at, 2])): at for at in places}
        one_way = {edge: at for edge, at in edges.items() if edge[::-1] not in edges}
        component = _components({edge for edge in one_way})
        found: dict[int, list[int]] = {}
        for (better, worse), at in one_way.items():
            if component[better] == component[worse] and better != worse:
                found.setdefault(component[better], []).append(at)
        yield from found.values()


def _components(edges: set[tuple[int, int]]) -> dict[int, int]:
    """{node: its strongly connected component}, by peeling off nodes that nothing leads into, or out of; what is left
    is cut by reachability, as these graphs are tiny."""
    after: dict[int, set[int]] = {}
    for a, b in edges:
        after.setdefault(a, set()).add(b)
        after.setdefault(b, set())
    reach = {node: _reached(node, after) for node in after}
    names: dict[int, int] = {}
    for node in after:
        same = [other for other in reach[node] if node in reach[other]] if node in reach[node] else []
        names[node] = min([node, *same])
    return names


def _reached(node: int, after: dict[int, set[int]]) -> set[int]:
    seen: set[int] = set()
    waiting = [node]
    while waiting:
        for other in after[waiting.pop()] - seen:
            seen.add(other)
            waiting.append(other)
    return seen


def undecided(facts: Facts, judged: Places, identical: list[str]) -> Iterator[Finding]:
    """tie, both_bad, identical_completions, annotator_disagreement. identical: where rows are refused because their
    answers are the same."""
    tie = facts.tie[judged]
    equal = judged[facts.has(EQUAL)[judged] & (tie == 0)]            # trained on as if one were better
    for kind, wrong in ((TIE, equal), (BOTH_BAD, equal[:0])):
        kept = judged[tie == TIES.index(kind)]                       # data.ties=keep: the loss knows what they are
        left_out = [where for where, name in facts.ties if name == kind]
        if len(wrong) or len(kept) or left_out:
            yield finding(kind, len(wrong) + len(kept) + len(left_out), len(judged) + len(facts.ties),
                          [*facts.wheres(wrong), *left_out, *facts.wheres(kept)],
                          None if len(wrong) or left_out else "info", as_preferences=len(wrong),
                          left_out=len(left_out), as_ties=len(kept))
    alike = judged[facts.has(ALIKE)[judged]]
    if len(alike) or identical:
        yield finding("identical_completions", len(alike) + len(identical), len(judged) + len(identical),
                      [*identical, *facts.wheres(alike)], refused=len(identical), trained_on=len(alike))
    split = judged[facts.has(SPLIT_VOTE)[judged]]
    if len(split):
        yield finding("annotator_disagreement", len(split), len(judged), facts.wheres(split))


def flagged(facts: Facts, judged: Places) -> Iterator[Finding]:
    """special_tokens_in_text and empty_reasoning."""
    for kind, flag in (("special_tokens_in_text", SPECIAL), ("empty_reasoning", EMPTY_REASONING)):
        found = judged[facts.has(flag)[judged]]
        if len(found):
            yield finding(kind, len(found), len(judged), facts.wheres(found))

