"""What the cache lacks of some data sets, as packs to score: each sequence once, those of one prompt in one tree.

Sequence s of data sets laid end to end is pair s // 2's chosen completion where s is even, its rejected one where s is
odd. Arrays throughout: a million pairs are planned in seconds and within 100 bytes a pair.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpo_dist.data.packing import filled_in_turn
from dpo_dist.data.store import Pairs, PairStores
from dpo_dist.reference.cache.scoring_order import NEVER, Indexes
from dpo_dist.reference.cache.store import LogpCache, sequence_key

AT_ONCE = 2**16                    # keys that are compared at once
Ids = NDArray[np.int32]
Keys = NDArray[np.uint64]               # (n, 2): 16 bytes as two numbers


class ScoringPlan(NamedTuple):
    """Sequences to score. Tree i is sequences[trees[i]:trees[i + 1]]; pack j is trees packs[j] to packs[j + 1]."""

    sequences: Indexes
    trees: Indexes
    packs: Indexes
    n_cached: int

    @property
    def n_packs(self) -> int:
        return len(self.packs) - 1

    def pack(self, j: int) -> list[Indexes]:
        """The trees of a pack, each as its sequences."""
        return [self.sequences[self.trees[i]:self.trees[i + 1]] for i in range(self.packs[j], self.packs[j + 1])]


def plan_scoring(cache: LogpCache, data_sets: Sequence[Pairs], tokens_per_microbatch: int,
                 windows: Indexes | None = None, padded: bool = False) -> ScoringPlan:
    """The plan for what `cache` lacks. Packs come longest trees first, so that those which run side by side are alike.

    windows: (pairs,) as in scoring_order.py: one after the other, prompts shared within each; pairs of NEVER are left
    out. None: all at once. padded: a sequence is a row with its prompt, so each is a tree of its own, and a pack's
    tokens are rows times the longest.
    """
    pairs = PairStores(data_sets)
    prompts, sequences = _keys(pairs)
    prompt = _ranks(prompts)
    del prompts
    wanted = _first_of_each(sequences) if windows is None else _first_asked(sequences, windows)
    missing = np.concatenate([part[~cache.holds(sequences[part])]
                              for part in np.array_split(wanted, 1 + len(wanted) // AT_ONCE)])
    n_cached = len(wanted) - len(missing)
    del sequences, wanted                                                          # free memory: these are large
    window = np.zeros(len(prompt), np.int8) if windows is None else windows
    missing = missing[np.lexsort((missing, prompt[missing // 2], window[missing // 2]))]
    pair = missing // 2
    starts_tree = (np.diff(prompt[pair], prepend=-1) != 0) | (np.diff(window[pair], prepend=-1) != 0) | padded
    lengths = pairs.lengths()
    trees, sizes = _trees(starts_tree, lengths[pair, 0], lengths[pair, 1 + missing % 2], tokens_per_microbatch)
    longest_first = np.lexsort((missing[trees[:-1]], -sizes, window[pair[trees[:-1]]]))
    del pair
    counts = np.diff(trees)[longest_first]
    ends = np.cumsum(counts)
    at = np.repeat(trees[:-1][longest_first] - (ends - counts), counts) + np.arange(len(missing))
    sizes, ones = sizes[longest_first], np.ones(len(sizes), np.int64)
    rows, longest = (ones, sizes) if padded else (sizes, ones)
    packs = filled_in_turn(rows, longest, tokens_per_microbatch)
    return ScoringPlan(missing[at], np.concatenate([[0], ends]).astype(np.int64), packs, n_cached)


def _keys(pairs: PairStores) -> tuple[Keys, Keys]:
    """(keys of the prompts (pairs, 2), of the sequences (2 * pairs, 2))."""
    prompts, sequences = bytearray(16 * len(pairs)), bytearray(32 * len(pairs))
    for i, (prompt, chosen, rejected) in enumerate(pairs.all_parts()):
        prompts[16 * i:16 * i + 16] = sequence_key(prompt, ())
        sequences[32 * i:32 * i + 32] = sequence_key(prompt, chosen) + sequence_key(prompt, rejected)
    return np.frombuffer(prompts, "<u8").reshape(-1, 2), np.frombuffer(sequences, "<u8").reshape(-1, 2)


def _first_of_each(keys: Keys) -> Indexes:
    """Where each distinct key (16 bytes as two numbers) occurs first, in order of occurrence."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))         # stable: equal keys stay in order
    return np.sort(order[_differs_from_before(keys, order)])


def _first_asked(keys: Keys, windows: Indexes) -> Indexes:
    """Where each distinct key of the sequences that are asked for comes first in the order of their pairs' windows."""
    pairs = np.argsort(windows, kind="stable")
    pairs = pairs[windows[pairs] != NEVER]
    wanted = (2 * pairs[:, None] + np.arange(2)).ravel()
    return wanted[_first_of_each(keys[wanted])]


def _ranks(keys: Keys) -> NDArray[np.int32]:
    """(n,) equal numbers for equal keys, larger for larger ones."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    ranks = np.empty(len(keys), np.int32)
    ranks[order] = np.cumsum(_differs_from_before(keys, order), dtype=np.int32)
    return ranks


def _differs_from_before(keys: Keys, order: Indexes) -> NDArray[np.bool_]:
    """Whether each key, in this order, differs from the one before. By blocks, without a second copy of the keys."""
    fresh = np.ones(len(order), dtype=bool)
    for at in range(1, len(order), AT_ONCE):
        end = min(at + AT_ONCE, len(order))
        fresh[at:end] = (keys[order[at:end]] != keys[order[at - 1:end - 1]]).any(1)
    return fresh


def _trees(starts_tree: NDArray[np.bool_], prompt_tokens: Ids, completion_tokens: Ids,
           budget: int) -> tuple[Indexes, Indexes]:
    """(boundaries (trees + 1,), tokens (trees,)) of sequences sorted by prompt: from each start to the next, cut to fit
    a pack."""
    if not len(starts_tree):
        return np.zeros(1, np.int64), np.empty(0, np.int64)
    starts = np.flatnonzero(starts_tree)
    tokens = np.add.reduceat(completion_tokens.astype(np.int64), starts) + prompt_tokens[starts]
    ends = np.append(starts[1:], len(starts_tree))
    cuts: list[int] = []
    for g in np.flatnonzero(tokens > budget).tolist():
        completions = completion_tokens[starts[g]:ends[g]].astype(np.int64)
        bounds = filled_in_turn(completions, np.ones_like(completions), budget - int(prompt_tokens[starts[g]]))
        cuts += (starts[g] + bounds[1:-1]).tolist()
    starts = np.sort(np.concatenate([starts, np.array(cuts, dtype=np.int64)]))
    tokens = np.add.reduceat(completion_tokens.astype(np.int64), starts) + prompt_tokens[starts]
    return np.append(starts, len(starts_tree)).astype(np.int64), tokens.astype(np.int64)
