"""Pairs → PackedBatch: tokens laid end to end, a shared prompt and a shared completion once."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from dpo_dist.types import PackedBatch, Span, TokenizedPair, Tree

Ids = tuple[int, ...]


class Sequences(NamedTuple):
    """A prompt and the completions to compute after it."""

    prompt: Ids
    completions: tuple[Ids, ...]


def pack_pairs(pairs: Sequence[TokenizedPair], pair_ids: Sequence[int], weights: Sequence[float],
               share_completions: bool = True) -> PackedBatch:
    """One PackedBatch of these pairs: a prompt that several share is computed once, and so is a completion.

    share_completions=False keeps a sequence for each pair's completions, for losses in which a token's part depends on
    the pair.
    """
    trees: dict[Ids, list[Ids]] = {}
    slots: list[tuple[Ids, int, int]] = []
    for pair in pairs:
        completions = trees.setdefault(pair.prompt_ids, [])
        chosen = _slot(completions, pair.chosen_ids, share_completions)
        slots.append((pair.prompt_ids, chosen, _slot(completions, pair.rejected_ids, share_completions)))
    first, count = {}, 0
    for prompt, completions in trees.items():
        first[prompt] = count
        count += len(completions)
    strength = [float("nan") if p.strength is None else p.strength for p in pairs]
    return _lay_out([Sequences(p, tuple(c)) for p, c in trees.items()], chosen=[first[p] + c for p, c, _ in slots],
                    rejected=[first[p] + r for p, _, r in slots], pair_ids=pair_ids, weights=weights, strength=strength)


def _slot(completions: list[Ids], completion: Ids, share: bool) -> int:
    if share and completion in completions:
        return completions.index(completion)
    completions.append(completion)
    return len(completions) - 1


def pack_sequences(trees: Sequence[Sequences]) -> PackedBatch:
    """One PackedBatch of prompts with completions and no pairs, for scoring."""
    return _lay_out(trees, chosen=[], rejected=[], pair_ids=[], weights=[], strength=[])


def _lay_out(trees: Sequence[Sequences], chosen: Sequence[int], rejected: Sequence[int], pair_ids: Sequence[int],
             weights: Sequence[float], strength: Sequence[float]) -> PackedBatch:
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
        for completion in tree.completions:
            c = len(completion)
            branches.append(Span(at, at + c))
            ids.append(np.asarray(completion))
            positions.append(np.arange(p, p + c))
            predict_at.append(np.concatenate([[root.end - 1], np.arange(at, at + c - 1)]))
            targets.append(ids[-1])
            offset.append(np.arange(c))
            lengths.append(c)
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
        weight=torch.tensor(weights, dtype=torch.float32), strength=torch.tensor(strength, dtype=torch.float32))
