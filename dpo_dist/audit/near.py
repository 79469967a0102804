"""Prompts that are nearly the same: MinHash finds candidates, their words decide.

Bands of a MinHash signature (Broder 1997; Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, 3.4) over the
words and pairs of words of a prompt. Prompts made from one pattern ("Write a poem about ...") share most of their words
and are no repetitions, so a word counts by how rare it is, and prompts that only differ in a filling are told apart.
"""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dpo_dist.audit.facts import Facts

CANDIDATES = 600_000                         # at most, those that meet in most bands first
CROWD = 40                                   # prompts in one bucket, of which each is compared with the next few only
NEXT_FEW = 6
AT_ONCE = 20_000                             # candidates that are compared at once
ALIKE = 0.8                                  # share of the words' weight that two prompts have in common ...
ALIKE_EXCHANGED = 0.88                       # ... where words are exchanged, as the fillings of a pattern are
COMMON = np.log(10) ** 2                     # weight of a word of every tenth prompt: none that fills a gap
RAREST = np.log(33) ** 2                     # ... above which a word that is only added counts no more
SHORT = 12                                   # words: of a shorter prompt one exchanged word makes another question
Pairs = NDArray[np.int64]                    # (m, 2) places of prompts
Weights = NDArray[np.float64]


def near_prompts(facts: Facts) -> Pairs:
    """(m, 2) pairs of distinct prompts, earlier first, that are nearly the same. Of a crowd each with some others."""
    if not len(facts.prompt):
        return np.empty((0, 2), np.int64)
    loose = _equal(facts.loose)
    candidates = _candidates(facts.bands)
    found = [tuple(pair) for pair, alike in zip(candidates.tolist(), _alike(facts, candidates), strict=True) if alike]
    return np.array(sorted({*map(tuple, loose.tolist()), *found}), dtype=np.int64).reshape(-1, 2)


def _equal(values: NDArray[np.uint64]) -> Pairs:
    """Each place with the first of the same value before it."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    before = first[inverse]
    later = np.flatnonzero(before < np.arange(len(values)))
    return np.stack([before[later], later], 1)


def _candidates(bands: NDArray[np.uint32]) -> Pairs:
    """Pairs of prompts that share a band, those that share most first."""
    met = [pair for band in bands.T for pair in _met_in(band)]
    if not met:
        return np.empty((0, 2), np.int64)
    keys, counts = np.unique(np.concatenate(met), return_counts=True)
    keys = keys[np.argsort(-counts, kind="stable")[:CANDIDATES]]
    return np.stack([keys >> 32, keys & 0xFFFFFFFF], 1).astype(np.int64)


def _met_in(band: NDArray[np.uint32]) -> Iterator[NDArray[np.int64]]:
    """Pairs of places with the same value, each as one number: the earlier place in its upper half."""
    order = np.argsort(band, kind="stable")
    values = band[order]
    _, sizes = np.unique(values, return_counts=True)
    size = np.repeat(sizes, sizes)
    largest = int(sizes.max(initial=1))
    for apart in range(1, min(largest, CROWD)):
        same = values[apart:] == values[:-apart]
        if apart > NEXT_FEW:
            same &= size[apart:] <= CROWD
        at = np.flatnonzero(same)
        if len(at):
            yield (order[at].astype(np.int64) << 32) | order[at + apart]


def _alike(facts: Facts, candidates: Pairs) -> NDArray[np.bool_]:
    """(m,) which of the candidates are nearly the same."""
    _, inverse, frequency = np.unique(facts.words, return_inverse=True, return_counts=True)
    # squared: what many prompts share says little, also where much of it is shared
    weights = (np.log((len(facts.prompt) + 1) / frequency) ** 2 + 0.1)[inverse]
    starts = np.concatenate([[0], np.cumsum(facts.n_words, dtype=np.int64)])
    out = np.zeros(len(candidates), dtype=bool)
    for at in range(0, len(candidates), AT_ONCE):
        a, b = candidates[at:at + AT_ONCE].T
        alike, only_a, only_b = _similarity(facts, weights, starts, a, b)
        alike_but_added, _, _ = _similarity(facts, np.minimum(weights, RAREST), starts, a, b)
        exchanged = (only_a > COMMON) & (only_b > COMMON)
        short = np.minimum(facts.n_words[a], facts.n_words[b]) < SHORT
        out[at:at + AT_ONCE] = (np.where(exchanged, (alike >= ALIKE_EXCHANGED) & ~short, alike_but_added >= ALIKE)
                                & (facts.numbers[a] == facts.numbers[b]))
    return out


def _similarity(facts: Facts, weights: Weights, starts: NDArray[np.int64], a: NDArray[np.int64],
                b: NDArray[np.int64]) -> tuple[Weights, Weights, Weights]:
    """(m,) the weight of the words that prompts a[i] and b[i] share over that of all their words; the weight of those
    that only one of them has."""
    total = np.add.reduceat(np.append(weights, 0.0), starts[:-1]) * (facts.n_words > 0)
    common = _common(facts.words, weights, starts, facts.n_words, a, b)
    only_a, only_b = total[a] - common, total[b] - common
    return common / np.maximum(common + only_a + only_b, 1e-9), only_a, only_b


def _common(words: NDArray[np.uint32], weights: Weights, starts: NDArray[np.int64], n_words: NDArray[np.uint16],
            a: NDArray[np.int64], b: NDArray[np.int64]) -> Weights:
    """(m,) weight of the words that prompts a[i] and b[i] share."""
    keys, values = [], []
    for side in (a, b):
        n = n_words[side].astype(np.int64)
        pair = np.repeat(np.arange(len(side)), n)
        at = np.repeat(starts[side] - np.concatenate([[0], np.cumsum(n)[:-1]]), n) + np.arange(len(pair))
        keys.append((pair.astype("<u8") << np.uint64(32)) | words[at])
        values.append(weights[at])
    key = np.concatenate(keys)
    order = np.argsort(key, kind="stable")
    twice = np.flatnonzero(key[order][1:] == key[order][:-1])
    sums: Weights = np.bincount((key[order][twice] >> np.uint64(32)).astype(np.int64),
                       weights=np.concatenate(values)[order][twice], minlength=len(a)).astype(float)
    return sums
