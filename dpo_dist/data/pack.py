"""Pairs → PackedBatch: tokens laid end to end, a shared prompt and a shared completion once."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from dpo_dist.types import TIE_KINDS, PackedBatch, Span, TokenizedPair, Tree

Ids = tuple[int, ...]
Counts = tuple[bool, ...] | None             # which of a completion's tokens are counted; None: all


class Sequences(NamedTuple):
    """A prompt and the completions to compute after it."""

    prompt: Ids
    completions: tuple[Ids, ...]
    counts: tuple[Counts, ...] | None = None             # of each completion; None: all tokens of all


class _Branch(NamedTuple):
    """A completion as pairs share it: equal tokens of which the same ones are counted."""

    ids: Ids
    counts: Counts


def pack_pairs(pairs: Sequence[TokenizedPair], pair_ids: Sequence[int], weights: Sequence[float],
               share_completions: bool = True) -> PackedBatch:
    """One PackedBatch of these pairs: a prompt that several share is computed once, and so is a completion in which the
    same tokens are counted.

    share_completions=False keeps a sequence for each pair's completions, for losses in which a token's part depends on
    the pair.
    """
    trees: dict[Ids, list[_Branch]] = {}
    slots: list[tuple[Ids, int, int]] = []
    for pair in pairs:
        branches = trees.setdefault(pair.prompt_ids, [])
        chosen, rejected = (_slot(branches, _Branch(ids, None if counts is None or all(counts) else counts),
                                  share_completions)
                            for ids, counts in ((pair.chosen_ids, pair.chosen_counts),
                                                (pair.rejected_ids, pair.rejected_counts)))
        slots.append((pair.prompt_ids, chosen, rejected))
    first, count = {}, 0
    for prompt, branches in trees.items():
        first[prompt] = count
        count += len(branches)
    sequences = [Sequences(prompt, tuple(b.ids for b in branches), tuple(b.counts for b in branches))
                 for prompt, branches in trees.items()]
    strength = [float("nan") if p.strength is None else p.strength for p in pairs]
    return _lay_out(sequences, chosen=[first[p] + c for p, c, _ in slots], rejected=[first[p] + r for p, _, r in slots],
                    pair_ids=pair_ids, weights=weights, strength=strength, tie=[TIE_KINDS.index(p.tie) for p in pairs])


def _slot(branches: list[_Branch], branch: _Branch, share: bool) -> int:
    if share and branch in branches:
        return branches.index(branch)
    branches.append(branch)
    return len(branches) - 1


def pack_sequences(trees: Sequence[Sequences]) -> PackedBatch:
    """One PackedBatch of prompts with completions and no pairs, for scoring."""
    return _lay_out(trees, chosen=[], rejected=[], pair_ids=[], weights=[], strength=[], tie=[])


def _lay_out(trees: Sequence[Sequences], chosen: Sequence[int], rejected: Sequence[int], pair_ids: Sequence[int],
             weights: Sequence[float], strength: Sequence[float], tie: Sequence[int]) -> PackedBatch:
    ids: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    predict_at: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    offset: list[np.ndarray] = []
    lengths: list[int] = []
    spans: list[Tree] = []
    at = 0
    for tree in trees:
        p = len(tree.prompt)
        assert p > 0, "a completion's first token is predicted by the prompt's last"
        root, branches = Span(at, at + p), []
        ids.append(np.asarray(tree.prompt))
        positions.append(np.arange(p))
        at += p
        for completion, counts in zip(tree.completions, tree.counts or (None,) * len(tree.completions), strict=True):
            c = len(completion)
            counted = np.arange(c) if counts is None else np.flatnonzero(counts)
            assert len(counted), "a sum over no token would be no log-prob, and a mean no number"
            branches.append(Span(at, at + c))
            ids.append(np.asarray(completion))
            positions.append(np.arange(p, p + c))
            predict_at.append(np.concatenate([[root.end - 1], np.arange(at, at + c - 1)])[counted])
            targets.append(ids[-1][counted])
            offset.append(counted)
            lengths.append(len(counted))
            at += c
        spans.append(Tree(root, tuple(branches)))

    def whole(parts: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    return PackedBatch(
        input_ids=whole(ids)[None], position_ids=whole(positions)[None], trees=tuple(spans),
        predict_at=whole(predict_at), targets=whole(targets),
        sequence=torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)), offset=whole(offset),
        lengths=torch.tensor(lengths, dtype=torch.int64), chosen=torch.tensor(chosen, dtype=torch.int64),
        rejected=torch.tensor(rejected, dtype=torch.int64), pair_ids=tuple(pair_ids),
        weight=torch.tensor(weights, dtype=torch.float32), strength=torch.tensor(strength, dtype=torch.float32),
        tie=torch.tensor(tie, dtype=torch.uint8))
