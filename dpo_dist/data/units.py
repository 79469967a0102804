"""A step's pairs → units: pairs of one prompt that are computed together and stay in one pack."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from dpo_dist.sizing.flops import Flops

T = TypeVar("T")


@dataclass(frozen=True)
class PairShapes:
    """What the planner knows of n pairs."""

    lengths: NDArray[np.int32]              # (n, 3) tokens of prompt, chosen, rejected
    content: NDArray[np.uint64]             # (n, 3) hashes of their tokens


class Size(NamedTuple):
    """What a forward computes: rows padded to the longest. Tokens laid end to end are rows of one token."""

    rows: int
    longest: int

    @property
    def tokens(self) -> int:
        return self.rows * self.longest

    def beside(self, other: Size) -> Size:
        return Size(self.rows + other.rows, max(self.longest, other.longest))


NOTHING = Size(0, 0)


class Unit(NamedTuple):
    """Pairs of one prompt that stay in one pack."""

    members: tuple[int, ...]                # positions of its pairs in the step
    size: Size
    cost: float                             # FLOPs of the forward


class _Pair(NamedTuple):
    """A pair as the planner sees it: (content, size, cost) of its completions."""

    at: int
    chosen: tuple[int, Size, float]
    rejected: tuple[int, Size, float]


class Prompt(NamedTuple):
    """Pairs, and what is computed once for them all: the prompt, or nothing where each row repeats it."""

    size: Size
    cost: float
    pairs: list[_Pair]


def by_prompt(shapes: PairShapes, flops: Flops) -> list[Prompt]:
    """The pairs by prompt."""
    prompt_cost, completion_cost = flops.of_pairs(shapes.lengths)
    found: dict[int, Prompt] = {}
    rows = zip(shapes.content.tolist(), shapes.lengths.tolist(), prompt_cost.tolist(), completion_cost.tolist(),
               strict=True)
    for at, ((prompt, chosen, rejected), (p, c, r), cost, (chosen_cost, rejected_cost)) in enumerate(rows):
        if flops.padded:
            once = Prompt(NOTHING, 0.0, [])
            pair = _Pair(at, (chosen, Size(1, p + c), cost + chosen_cost),
                         (rejected, Size(1, p + r), cost + rejected_cost))
        else:
            once = Prompt(Size(p, 1), cost, [])
            pair = _Pair(at, (chosen, Size(c, 1), chosen_cost), (rejected, Size(r, 1), rejected_cost))
        found.setdefault(prompt, once).pairs.append(pair)
    return list(found.values())


def cheapest_pair(prompts: Iterable[Prompt], budget: int, share: bool) -> Unit:
    """The cheapest pair: what a rank with nothing to do forwards."""
    alone = ((prompt.cost + _added(pair, set(), share)[1], pair.at, prompt, pair) for prompt in prompts
             for pair in prompt.pairs)
    _, _, prompt, pair = min(alone)
    return _pieces(prompt._replace(pairs=[pair]), budget, math.inf, share)[0]


def cut_prompts(prompts: Iterable[Prompt], budget: int, part: float, share: bool) -> list[Unit]:
    """Each prompt's pairs whole or, where they cost more than `part`, in as many nearly equal pieces as it takes for a
    piece to cost about that. The token budget may ask for more pieces."""
    units = []
    for prompt in prompts:
        pieces = _pieces(prompt, budget, math.inf, share)
        wanted = max(len(pieces), math.ceil(sum(piece.cost for piece in pieces) / part))
        if wanted > 1 and len(prompt.pairs) > 1:
            pieces = evened(pieces, wanted, max(piece.cost for piece in pieces),
                             partial(_pieces, prompt, budget, share=share))
        units += pieces
    return units


def _pieces(prompt: Prompt, budget: int, cap: float, share: bool) -> list[Unit]:
    """The prompt's pairs, filled in turn into units within both bounds; a pair is never cut."""
    units: list[Unit] = []
    members: list[int] = []
    seen: set[int] = set()
    size, cost = prompt.size, prompt.cost
    for pair in prompt.pairs if len(prompt.pairs) == 1 else sorted(prompt.pairs, key=lambda p: p.chosen):
        more, more_cost = _added(pair, seen, share)
        if members and (size.beside(more).tokens > budget or cost + more_cost > cap):
            units.append(Unit(tuple(members), size, cost))
            members, seen = [], set()
            size, cost = prompt.size, prompt.cost
            more, more_cost = _added(pair, seen, share)
        members.append(pair.at)
        seen |= {pair.chosen[0], pair.rejected[0]}
        size, cost = size.beside(more), cost + more_cost
    return [*units, Unit(tuple(members), size, cost)]


def _added(pair: _Pair, seen: set[int], share: bool) -> tuple[Size, float]:
    """(size, cost) of the pair's completions that are not computed yet."""
    (chosen, chosen_size, chosen_cost), (rejected, rejected_size, rejected_cost) = pair.chosen, pair.rejected
    if share and (rejected in seen or rejected == chosen):
        return (NOTHING, 0.0) if chosen in seen else (chosen_size, chosen_cost)
    if share and chosen in seen:
        return rejected_size, rejected_cost
    return chosen_size.beside(rejected_size), chosen_cost + rejected_cost


def evened(parts: list[T], most: int, cap: float, cut: Callable[[float], list[T]]) -> list[T]:
    """`parts`, cut again with the lowest cap, found by bisection below `cap`, that gives at most `most` of them."""
    low, high = 0.0, cap
    for _ in range(8):
        middle = (low + high) / 2
        other = cut(middle)
        if len(other) <= most:
            parts, high = other, middle
        else:
            low = middle
    return parts
