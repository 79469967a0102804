"""Fills the cache: scores what is missing of a data set, each sequence once, sharing prompts, spread over the ranks."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from dpo_dist.data.pack import Sequences, pack_sequences, plan_scoring
from dpo_dist.preference import TokenizedPair
from dpo_dist.reference import ReferenceEngine
from dpo_dist.reference.cache import LogpCache, ShardWriter, sequence_key
from dpo_dist.world import World


class Pairs(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> TokenizedPair: ...


class SequenceAt(NamedTuple):
    """A sequence to score, by its place in the data: small enough to plan a million of them."""

    data_set: int
    pair: int
    rejected: bool


class ScoringPlan(NamedTuple):
    """trees: sequences that share a prompt. packs[i][rank]: indexes of trees. cached, damaged: sequences there, shards set aside."""

    trees: list[list[SequenceAt]]
    packs: list[list[list[int]]]
    n_missing: int
    n_cached: int
    n_damaged_shards: int


def open_cache(cache: LogpCache, world: World) -> int:
    """Opens, on every rank, the shards that rank 0 found whole. Returns how many were damaged."""
    names, damaged = world.on_main(cache.verified_shards)
    cache.open_shards(names)
    return damaged


def plan(cache: LogpCache, data_sets: Sequence[Pairs], world: World, tokens_per_microbatch: int) -> ScoringPlan:
    """What is missing and who scores it: made on rank 0, the same everywhere."""
    damaged = open_cache(cache, world)
    return world.on_main(lambda: _plan(cache, data_sets, world.size, tokens_per_microbatch, damaged))


def _plan(cache: LogpCache, data_sets: Sequence[Pairs], world_size: int, budget: int, damaged: int) -> ScoringPlan:
    seen: set[bytes] = set()
    by_prompt: dict[bytes, list[SequenceAt]] = {}
    tokens: dict[bytes, tuple[int, list[int]]] = {}
    n_cached = 0
    for d, pairs in enumerate(data_sets):
        for i in range(len(pairs)):
            pair = pairs[i]
            prompt = sequence_key(pair.prompt_ids, ())
            for rejected, completion in ((False, pair.chosen_ids), (True, pair.rejected_ids)):
                key = sequence_key(pair.prompt_ids, completion)
                if key in seen:
                    continue
                seen.add(key)
                if key in cache:
                    n_cached += 1
                else:
                    by_prompt.setdefault(prompt, []).append(SequenceAt(d, i, rejected))
                    tokens.setdefault(prompt, (len(pair.prompt_ids), []))[1].append(len(completion))
    trees, sizes = [], []
    for prompt, sequences in by_prompt.items():
        prompt_tokens, completions = tokens[prompt]
        for group in _within_budget(prompt_tokens, completions, budget):
            trees.append([sequences[i] for i in group])
            sizes.append(prompt_tokens + sum(completions[i] for i in group))
    return ScoringPlan(trees, plan_scoring(sizes, world_size, budget), len(seen) - n_cached, n_cached, damaged)


def _within_budget(prompt_tokens: int, completions: list[int], budget: int) -> list[list[int]]:
    """Completions of one prompt, cut into trees that fit a pack (one completion at least)."""
    groups: list[list[int]] = []
    used = 0
    for i, tokens in enumerate(completions):
        if not groups or used + tokens > budget:
            groups.append([])
            used = prompt_tokens
        groups[-1].append(i)
        used += tokens
    return groups


def fill(scoring: ScoringPlan, cache: LogpCache, data_sets: Sequence[Pairs], engine: ReferenceEngine, world: World,
         progress: Callable[[int], None] = lambda done: None) -> None:
    """Scores the plan's packs into the cache; `progress` is told how many sequences are done on this rank's side of the world."""
    writer, done = ShardWriter(cache), 0
    for row in scoring.packs:
        mine = row[world.rank]
        trees = [_sequences(scoring.trees[i], data_sets) for i in mine or row[0]]     # nothing left: forward rank 0's, keep nothing
        logps = engine.token_logps(pack_sequences(trees)).cpu().numpy()
        if mine:
            _keep(writer, trees, logps)
        done += sum(len(scoring.trees[i]) for members in row for i in members)
        progress(done)
    writer.flush()
    world.barrier()
    open_cache(cache, world)


def _keep(writer: ShardWriter, trees: Sequence[Sequences], logps: np.ndarray) -> None:
    at = 0
    for tree in trees:
        for completion in tree.completions:
            writer.add(sequence_key(tree.prompt, completion), logps[at:at + len(completion)])
            at += len(completion)
    writer.flush_if_due()


def _sequences(places: Sequence[SequenceAt], data_sets: Sequence[Pairs]) -> Sequences:
    pairs = [data_sets[p.data_set][p.pair] for p in places]
    return Sequences(pairs[0].prompt_ids, tuple(x.rejected_ids if p.rejected else x.chosen_ids for p, x in zip(places, pairs, strict=True)))
