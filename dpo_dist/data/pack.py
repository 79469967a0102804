"""Pairs → packs: what each rank forwards at each micro-step, decided from lengths alone and identically on every rank."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from dpo_dist.config import UserError
from dpo_dist.preference import PackedBatch, Span, TokenizedPair, Tree

Ids = tuple[int, ...]


class Sequences(NamedTuple):
    """A prompt and the completions to compute after it."""

    prompt: Ids
    completions: tuple[Ids, ...]


@dataclass(frozen=True)
class StepPlan:
    """packs[micro_step][rank] = the positions (in the step's list of pairs) that this rank forwards then.

    A pack that would be empty repeats one pair as a filler: `is_filler[micro_step][rank]`; its loss counts 0, and the ranks' forwards
    stay equal in number (law 5).
    """

    packs: tuple[tuple[tuple[int, ...], ...], ...]
    is_filler: tuple[tuple[bool, ...], ...]

    def of_rank(self, rank: int) -> list[tuple[tuple[int, ...], bool]]:
        return [(packs[rank], filler[rank]) for packs, filler in zip(self.packs, self.is_filler, strict=True)]


def pair_costs(lengths: np.ndarray, hidden_size: int) -> np.ndarray:
    """(n,) relative cost of a pair's forward, in tokens: linear layers, plus attention's part (query-key pairs over 6 hidden sizes,
    the ratio of attention's to the linear layers' FLOPs in a block of 12 hidden² weights). lengths: (n, 3) prompt, chosen, rejected."""
    p, c, r = lengths.astype(np.float64).T
    area = p * p / 2 + c * (p + c / 2) + r * (p + r / 2)
    return np.asarray(p + c + r + area / (6 * hidden_size))


def plan_step(lengths: np.ndarray, costs: np.ndarray, world_size: int, tokens_per_microbatch: int) -> StepPlan:
    """Spreads a step's pairs over ranks and micro-steps: as few micro-steps as the token budget allows, packs of near-equal cost.

    lengths: (n, 3). Longest-processing-time-first into the least filled pack; the packs of one micro-step are neighbours in cost.
    """
    tokens = lengths.sum(1)
    order = np.argsort(-costs, kind="stable")
    micro_steps = max(1, -(-int(tokens.sum()) // (tokens_per_microbatch * world_size)))
    while (bins := _fill(order, tokens, costs, micro_steps * world_size, tokens_per_microbatch)) is None:
        micro_steps += 1
    bins.sort(key=lambda b: -sum(costs[i] for i in b))
    filler = int(order[-1])                  # the cheapest pair
    load = [0.0] * world_size
    packs, fillers = [], []
    for m in range(micro_steps):
        row: list[tuple[int, ...]] = [()] * world_size
        ranks = sorted(range(world_size), key=lambda r: load[r])
        for rank, members in zip(ranks, bins[m * world_size:(m + 1) * world_size], strict=True):
            row[rank] = tuple(members)
            load[rank] += sum(costs[i] for i in members)
        fillers.append(tuple(not members for members in row))
        packs.append(tuple(members or (filler,) for members in row))
    return StepPlan(tuple(packs), tuple(fillers))


def _fill(order: np.ndarray, tokens: np.ndarray, costs: np.ndarray, n_bins: int, budget: int) -> list[list[int]] | None:
    bins: list[list[int]] = [[] for _ in range(n_bins)]
    cost, used = np.zeros(n_bins), np.zeros(n_bins, dtype=np.int64)
    for i in order:
        room = np.where(used + tokens[i] <= budget, cost, np.inf)
        at = int(room.argmin())
        if room[at] == np.inf:
            return None
        bins[at].append(int(i))
        cost[at] += costs[i]
        used[at] += tokens[i]
    return bins


def check_budget(lengths: np.ndarray, where: Sequence[str] | None, tokens_per_microbatch: int) -> None:
    """Raises UserError where a pair alone is longer than a pack may be."""
    tokens = lengths.sum(1)
    worst = int(tokens.argmax())
    if tokens[worst] > tokens_per_microbatch:
        name = f" ({where[worst]})" if where is not None else ""
        raise UserError(f"train.tokens_per_microbatch={tokens_per_microbatch} is less than the {tokens[worst]} tokens of one pair{name}; "
                        f"set train.tokens_per_microbatch={tokens[worst]} or more, or lower data.max_length")


# ------------------------------------------------------------------------------------------------------------ building packs


def pack_pairs(pairs: Sequence[TokenizedPair], pair_ids: Sequence[int], weights: Sequence[float],
               share_completions: bool = True) -> PackedBatch:
    """One PackedBatch of these pairs: a prompt that several share is computed once, and so is a completion.

    share_completions=False keeps a sequence for each pair's completions, for losses in which a token's part depends on the pair.
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
    sequence: list[np.ndarray] = []
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
            sequence.append(np.full(c, len(lengths)))
            offset.append(np.arange(c))
            lengths.append(c)
            at += c
        spans.append(Tree(root, tuple(branches)))

    def whole(parts: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    return PackedBatch(
        input_ids=whole(ids)[None], position_ids=whole(positions)[None], trees=tuple(spans), predict_at=whole(predict_at),
        targets=whole(targets), sequence=whole(sequence), offset=whole(offset), lengths=torch.tensor(lengths, dtype=torch.int64),
        chosen=torch.tensor(chosen, dtype=torch.int64), rejected=torch.tensor(rejected, dtype=torch.int64), pair_ids=tuple(pair_ids),
        weight=torch.tensor(weights, dtype=torch.float32), strength=torch.tensor(strength, dtype=torch.float32))


def plan_scoring(tree_tokens: Sequence[int], world_size: int, tokens_per_microbatch: int) -> list[list[list[int]]]:
    """packs[i][rank] = indexes of trees, longest first and filled in turn, so that the packs of a row are alike.

    Every rank gets the same number of packs; the last may be empty (its rank forwards a filler, law 5).
    """
    packs: list[list[int]] = []
    used = 0
    for i in sorted(range(len(tree_tokens)), key=lambda i: (-tree_tokens[i], i)):
        if not packs or used + tree_tokens[i] > tokens_per_microbatch:
            packs.append([])
            used = 0
        packs[-1].append(i)
        used += tree_tokens[i]
    packs += [[] for _ in range(-len(packs) % world_size)]
    return [packs[at:at + world_size] for at in range(0, len(packs), world_size)]
