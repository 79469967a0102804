"""Which rank forwards which pairs at which micro-step. Lengths and contents alone decide, the same way on every rank.

Pairs that share a prompt are kept in one pack (units.py), where the prompt, and a completion that several of them name,
is computed once. Packs keep to a token budget (of padded rows: rows times the longest), are equally many on every rank
(the law: equal forwards), and those of one micro-step cost nearly the same.
"""
from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dpo_dist.config.errors import UserError
from dpo_dist.data.units import PairShapes, Size, Unit, by_prompt, cheapest_pair, cut_prompts, evened
from dpo_dist.sizing.flops import Flops

Indexes = NDArray[np.int64]

# the slowest rank's time over the mean, above which other ways to cut the step are tried
GOOD_BALANCE = 1.02


@dataclass(frozen=True)
class StepPlan:
    """packs[micro_step][rank] = the positions (in the step's list of pairs) that this rank forwards then.

    A pack that would be empty repeats one pair as a filler: `is_filler[micro_step][rank]`; its loss counts 0, and the
    ranks' forwards stay equal in number. costs[micro_step][rank]: FLOPs of the pack's forward, padding aside.
    tokens: all that is forwarded, padding too.
    """

    packs: tuple[tuple[tuple[int, ...], ...], ...]
    is_filler: tuple[tuple[bool, ...], ...]
    costs: tuple[tuple[float, ...], ...]
    tokens: int

    def of_rank(self, rank: int) -> list[tuple[tuple[int, ...], bool]]:
        return [(packs[rank], filler[rank]) for packs, filler in zip(self.packs, self.is_filler, strict=True)]

    @property
    def makespan(self) -> float:
        """What the step takes where ranks wait for each other at every micro-step, as under ZeRO-3."""
        return sum(max(row) for row in self.costs)

    @property
    def imbalance(self) -> float:
        """Busiest over mean rank, in planned cost."""
        loads = [sum(column) for column in zip(*self.costs, strict=True)]
        return max(loads) * len(loads) / sum(loads)


def plan_step(shapes: PairShapes, flops: Flops, world_size: int, tokens_per_microbatch: int,
              share_completions: bool = True) -> StepPlan:
    """Spreads a step's pairs over ranks and micro-steps: the fewest micro-steps that the token budget allows, and packs
    of nearly equal cost.

    Largest first into the cheapest pack with room (Graham 1969). Where that balances badly, filling one micro-step
    after the other, one micro-step more, and prompts cut smaller are tried, and what ends sooner is taken: a prompt
    computed twice may cost less than ranks that wait. Padded rows go with those of like length instead.
    """
    prompts = by_prompt(shapes, flops)
    filler = cheapest_pair(prompts, tokens_per_microbatch, share_completions)
    whole = cut_prompts(prompts, tokens_per_microbatch, math.inf, share_completions)
    mean = sum(u.cost for u in whole) / world_size
    if flops.padded:
        cuts = (cut_prompts(prompts, tokens_per_microbatch, part, share_completions)
                for part in (math.inf, mean, mean / 2, mean / 4))
        plans = (_assign(_rows_alike(units, world_size, tokens_per_microbatch), filler, world_size) for units in cuts)
        return min(plans, key=lambda plan: plan.makespan)
    best = _spread(whole, filler, world_size, tokens_per_microbatch)
    pack = mean / len(best.packs)
    for part, more_micro_steps, in_turn in ((math.inf, 0, True), (math.inf, 1, True), (math.inf, 1, False),
                                            (math.inf, 2, False), (pack, 0, False), (pack / 2, 0, False),
                                            (pack / 4, 0, False)):
        if best.makespan <= GOOD_BALANCE * mean:
            break
        units = whole if part == math.inf else cut_prompts(prompts, tokens_per_microbatch, part, share_completions)
        best = min(best, _spread(units, filler, world_size, tokens_per_microbatch, more_micro_steps, in_turn),
                   key=lambda plan: plan.makespan)
    return best


def distinct_flops(shapes: PairShapes, flops: Flops) -> float:
    """FLOPs of a forward of these pairs in which nothing is computed twice, however they are packed."""
    prompt_cost, completion_cost = flops.of_pairs(shapes.lengths)
    _, prompts = np.unique(shapes.content[:, 0], return_index=True)
    total = prompt_cost[prompts].sum()
    completions = np.stack([np.repeat(shapes.content[:, 0], 2), shapes.content[:, 1:].ravel()], 1)
    _, once = np.unique(completions, axis=0, return_index=True)
    return float(total + completion_cost.ravel()[once].sum())


def _spread(units: Sequence[Unit], filler: Unit, world_size: int, budget: int, more_micro_steps: int = 0,
            in_turn: bool = False) -> StepPlan:
    """The plan with as few micro-steps as the budget allows, or so many more."""
    order = sorted(units, key=lambda u: (-u.cost, u.members))
    micro_steps = max(1, -(-sum(u.size.tokens for u in units) // (budget * world_size))) + more_micro_steps
    fill = _fill_in_turn if in_turn else _fill
    while (bins := fill(order, micro_steps, world_size, budget)) is None:
        micro_steps += 1
    return _assign(bins, filler, world_size)


def _assign(bins: list[list[Unit]], filler: Unit, world_size: int) -> StepPlan:
    """Packs, world_size for each micro-step. Packs of a micro-step cost about the same; the busiest rank gets the
    cheapest."""
    bins.sort(key=lambda units: (-sum(u.cost for u in units), units))
    load = [0.0] * world_size
    packs, fillers, costs, tokens = [], [], [], 0
    for m in range(len(bins) // world_size):
        row: list[list[Unit]] = [[]] * world_size
        ranks = sorted(range(world_size), key=lambda r: load[r])
        for rank, pack in zip(ranks, bins[m * world_size:(m + 1) * world_size], strict=True):
            row[rank] = pack
        fillers.append(tuple(not pack for pack in row))
        full = [pack or [filler] for pack in row]
        packs.append(tuple(tuple(i for unit in pack for i in unit.members) for pack in full))
        costs.append(tuple(sum(unit.cost for unit in pack) for pack in full))
        tokens += sum(reduce(Size.beside, (unit.size for unit in pack)).tokens for pack in full)
        load = [a + b for a, b in zip(load, costs[-1], strict=True)]
    return StepPlan(tuple(packs), tuple(fillers), tuple(costs), tokens)


def _rows_alike(units: Iterable[Unit], world_size: int, budget: int) -> list[list[Unit]]:
    """Padded rows in as few packs a rank as the budget allows, by length, so that little is padding."""
    order = sorted(units, key=lambda u: (-u.size.longest, u.members))
    packs = _in_order(order, budget)
    n_packs = -(-len(packs) // world_size) * world_size
    packs = evened(packs, n_packs, budget, partial(_in_order, order))
    return packs + [[] for _ in range(n_packs - len(packs))]


def _in_order(order: Sequence[Unit], cap: float) -> list[list[Unit]]:
    """Packs of units as they come, of at most `cap` tokens, or of one unit that has more."""
    sizes = np.array([unit.size for unit in order], dtype=np.int64).reshape(-1, 2)
    return [list(order[start:end]) for start, end in pairwise(filled_in_turn(sizes[:, 0], sizes[:, 1], cap).tolist())]


def filled_in_turn(rows: Indexes, longest: Indexes, cap: float) -> Indexes:
    """(packs + 1,) boundaries of packs, filled with n items in order while rows times the longest row stay within
    `cap`. An item that is larger by itself gets a pack of its own. rows, longest: (n,) of each item; tokens laid end to
    end are rows of one token, without padding.
    """
    if not (longest > 1).any():                            # nothing is padded: sums alone, found by bisection
        until, bounds = np.cumsum(rows), [0]
        while bounds[-1] < len(rows):
            before = until[bounds[-1] - 1] if bounds[-1] else 0
            bounds.append(max(bounds[-1] + 1, int(np.searchsorted(until, before + cap, side="right"))))
        return np.array(bounds, dtype=np.int64)
    bounds, count, widest = [0], 0, 0
    for i, (more, wide) in enumerate(zip(rows.tolist(), longest.tolist(), strict=True)):
        count, widest = count + more, max(widest, wide)
        if i > bounds[-1] and count * widest > cap:
            bounds.append(i)
            count, widest = more, wide
    return np.array([*bounds, len(rows)], dtype=np.int64)


def _fill(order: Iterable[Unit], micro_steps: int, world_size: int, budget: int) -> list[list[Unit]] | None:
    """All packs alike: each unit into the cheapest pack that has room. None where a unit finds none."""
    packs, left = _largest_first(order, micro_steps * world_size, budget, math.inf)
    return None if left else packs


def _fill_in_turn(order: Sequence[Unit], micro_steps: int, world_size: int, budget: int) -> list[list[Unit]] | None:
    """One micro-step after the other, each as costly as its largest unit requires. Packs are alike within a micro-step
    only."""
    packs: list[list[Unit]] = []
    left = list(order)
    for more in range(micro_steps, 0, -1):
        mean = sum(u.cost for u in left) / (more * world_size)
        cap = max([mean, *(u.cost for u in left[:1])]) if more > 1 else math.inf
        row, left = _largest_first(left, world_size, budget, cap)
        packs += row
    return None if left else packs


def _largest_first(
        order: Iterable[Unit], n_packs: int, budget: int, cap: float) -> tuple[list[list[Unit]], list[Unit]]:
    """(packs, units that found no room): each unit, in order, into the cheapest pack with room for its tokens and its
    cost."""
    packs: list[list[Unit]] = [[] for _ in range(n_packs)]
    used = [0] * n_packs
    heap = [(0.0, b) for b in range(n_packs)]
    left = []
    for unit in order:
        full = []
        while heap and used[heap[0][1]] + unit.size.tokens > budget:
            full.append(heapq.heappop(heap))
        if heap and heap[0][0] + unit.cost <= cap:
            cost, b = heap[0]
            packs[b].append(unit)
            used[b] += unit.size.tokens
            heapq.heapreplace(heap, (cost + unit.cost, b))
        else:
            left.append(unit)
        for entry in full:
            heapq.heappush(heap, entry)
    return packs, left


def check_budget(lengths: NDArray[np.int32], where: Callable[[int], str], tokens_per_microbatch: int,
                 padded: bool = False) -> None:
    """UserError where one pair is longer than a pack may be: as two padded rows with the prompt in each, or laid end to
    end. `where` says where the pair of an index comes from."""
    tokens = 2 * (lengths[:, 0] + lengths[:, 1:].max(1)) if padded else lengths.sum(1)
    worst = int(tokens.argmax())
    if tokens[worst] > tokens_per_microbatch:
        how = ", as two padded rows" if padded else ""
        raise UserError(f"train.tokens_per_microbatch={tokens_per_microbatch} is less than the {tokens[worst]} tokens "
                        f"of one pair ({where(worst)}){how}; set train.tokens_per_microbatch={tokens[worst]} or more, "
                        "or lower data.max_length")
