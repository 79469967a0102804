"""Which rank forwards what: properties that hold for any lengths, ranks and budgets."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dpo_dist.config.errors import UserError
from dpo_dist.data.pack import pack_pairs
from dpo_dist.data.packing import StepPlan, check_budget, distinct_flops, plan_step
from dpo_dist.data.units import PairShapes
from dpo_dist.sizing.flops import Flops
from dpo_dist.types import TokenizedPair

FLOPS = Flops(2e6, 1e6, ((4e3, None),))


def shapes_of(lengths: np.ndarray, content: np.ndarray | None = None) -> PairShapes:
    """Pairs that share nothing, unless `content` says so."""
    own = np.arange(lengths.size, dtype=np.uint64).reshape(lengths.shape)
    return PairShapes(lengths.astype(np.int32), own if content is None else content.astype(np.uint64))


def rated(prompts: int, responses: int, seed: int = 0) -> PairShapes:
    """All pairs of `responses` completions of each prompt."""
    r = np.random.default_rng(seed)
    rows, content = [], []
    for p in range(prompts):
        tokens, prompt_tokens = r.integers(20, 120, responses), int(r.integers(50, 300))
        for i in range(responses):
            for j in range(i):
                rows.append((prompt_tokens, tokens[i], tokens[j]))
                content.append((p, p * responses + i, p * responses + j))
    return shapes_of(np.array(rows), np.array(content))


def drawn(how: str, r: np.random.Generator) -> np.ndarray:
    """64 pairs of 8 to 2,048 tokens a part."""
    if how == "uniform":
        return r.integers(8, 2049, (64, 3))
    if how == "log-uniform":
        return np.exp(r.uniform(np.log(8), np.log(2048), (64, 3))).astype(np.int64)
    return np.clip(r.lognormal(5, 1.2, (64, 3)), 8, 2048).astype(np.int64)


def forwarded(plan: StepPlan) -> list[int]:
    return sorted(i for packs, fillers in zip(plan.packs, plan.is_filler, strict=True)
                  for pack, filler in zip(packs, fillers, strict=True) if not filler for i in pack)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_every_rank_forwards_equally_often_and_every_pair_is_in_one_pack_within_the_budget(world: int, n: int):
    lengths = np.random.default_rng(n).integers(1, 300, (n, 3))
    plan = plan_step(shapes_of(lengths), FLOPS, world, 1000)
    ranks = [plan.of_rank(r) for r in range(world)]
    assert len({len(r) for r in ranks}) == 1
    assert forwarded(plan) == list(range(n))
    assert all(members for r in ranks for members, _ in r), "a filler forwards something"
    assert all(lengths[list(members)].sum() <= 1000 for r in ranks for members, _ in r)


@pytest.mark.parametrize("world", [2, 8])
@pytest.mark.parametrize("budget", [8192, 16384])
@pytest.mark.parametrize("draw", ["uniform", "log-uniform", "log-normal"])
def test_ranks_carry_near_equal_cost_for_lengths_from_8_to_2048_tokens(world: int, budget: int, draw: str):
    """Never more than 5 % over the mean, unless a single pair costs more than that (a pair is never cut)."""
    for seed in range(20):
        lengths = drawn(draw, np.random.default_rng(seed))
        plan = plan_step(shapes_of(lengths), FLOPS, world, budget)
        prompts, completions = FLOPS.of_pairs(lengths)
        alone = (prompts + completions.sum(1)).max() * world / (prompts.sum() + completions.sum())
        assert plan.imbalance <= max(1.05, 1.05 * alone), (seed, plan.imbalance, alone)


def test_the_planned_cost_is_that_of_the_tokens_in_the_pack():
    """The planner, which sees lengths, and the layout, which sees tokens, agree on what is shared."""
    r = np.random.default_rng(0)
    answers = [tuple(r.integers(5, 90, int(n)).tolist()) for n in r.integers(3, 9, 4)]
    pairs = [TokenizedPair((1, 2, 3, 4 + i // 6), answers[a], answers[b], "") for i, (a, b) in
             enumerate([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)] * 2)]
    lengths = np.array([[len(p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids)] for p in pairs])
    content = np.array([[hash(ids) % 2**63 for ids in (p.prompt_ids, p.chosen_ids, p.rejected_ids)] for p in pairs])
    per_token = Flops(1.0, 0.0, ())
    for share in (True, False):
        plan = plan_step(shapes_of(lengths, content), per_token, 1, 10_000, share)
        ((members,),), ((cost,),) = plan.packs, plan.costs
        batch = pack_pairs([pairs[i] for i in members], list(members), [1.0] * len(members), share)
        assert batch.n_tokens == cost == plan.tokens
        assert (plan.tokens == distinct_flops(shapes_of(lengths, content),
                                              per_token)) is share, "what is repeated is no work done"


def padded_tokens(lengths: np.ndarray, pack: tuple[int, ...]) -> int:
    """Of the rows of pairs that share nothing."""
    rows = [int(lengths[i, 0] + n) for i in pack for n in lengths[i, 1:]]
    return len(rows) * max(rows)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_budget_bounds_what_padded_rows_take(world: int):
    r = np.random.default_rng(world)
    for lengths in (np.array([[2000, 1048, 1048]] + 29 * [[20, 60, 60]]), drawn("log-uniform", r)):
        plan = plan_step(shapes_of(lengths), replace(FLOPS, padded=True), world, 8192)
        assert forwarded(plan) == list(range(len(lengths)))
        taken = [padded_tokens(lengths, pack) for row in plan.packs for pack in row]
        assert max(taken) <= 8192 and sum(taken) == plan.tokens
        assert {len(row) for row in plan.packs} == {world}


def test_padded_rows_repeat_the_prompt_and_share_a_completion():
    shapes = rated(prompts=1, responses=4)
    rows = shapes.lengths[0, 0] + np.array(
        list({int(c): int(n) for c, n in zip(shapes.content[:, 1:].ravel(), shapes.lengths[:, 1:].ravel(),
                                             strict=True)}.values()))
    plan = plan_step(shapes, Flops(1.0, 0.0, (), padded=True), 1, 10_000)
    assert plan.tokens == 4 * rows.max() and plan.costs == ((rows.sum(),),)


def test_pairs_of_a_prompt_share_a_pack_and_four_responses_cost_four_forwards():
    shapes = rated(prompts=8, responses=4)
    plan = plan_step(shapes, FLOPS, 2, 4096)
    together = [{int(shapes.content[i, 0]) for i in pack} for row in plan.packs for pack in row]
    assert sum(map(len, together)) == 8, "no prompt is in two packs"
    once = {int(c[0]): (length[0], {}) for c, length in zip(shapes.content, shapes.lengths, strict=True)}
    for c, length in zip(shapes.content, shapes.lengths, strict=True):
        once[int(c[0])][1].update({int(c[1]): length[1], int(c[2]): length[2]})
    unique = sum(int(p) + sum(map(int, answers.values())) for p, answers in once.values())
    tokens_alone = Flops(1.0, 0.0, ())
    assert distinct_flops(shapes, tokens_alone) == unique
    assert sum(map(sum, plan_step(shapes, tokens_alone, 2, 4096).costs)) == unique


def test_a_prompt_with_many_pairs_is_cut_where_one_rank_would_do_all_the_work():
    """Best-of-n against twelve others: cut over four ranks, the prompt and the best answer are computed four times, and
    it pays."""
    lengths = np.array([[50, 80, 100 + i] for i in range(12)])
    shapes = shapes_of(lengths, np.array([[0, 1, 2 + i] for i in range(12)]))
    for flops in (FLOPS, replace(FLOPS, padded=True)):
        one, four = (plan_step(shapes, flops, world, 100_000) for world in (1, 4))
        assert four.makespan < 0.5 * one.makespan
        assert four.imbalance < 1.05 and not any(map(any, four.is_filler))


def test_a_rank_with_nothing_to_do_forwards_the_cheapest_pair():
    plan = plan_step(shapes_of(np.array([[9, 9, 9], [1, 2, 3]])), FLOPS, 4, 100)
    assert sorted(plan.packs[0]) == [(0,), (1,), (1,), (1,)]
    assert sum(map(sum, plan.is_filler)) == 2


def test_a_filler_whose_completions_are_one_sequence_counts_it_once():
    plan = plan_step(shapes_of(np.array([[1, 2, 2]]), np.array([[0, 1, 1]])), Flops(1.0, 0.0, ()), 3, 100)
    assert plan.tokens == 9 and plan.costs == ((3.0, 3.0, 3.0),)


def test_a_prompt_whose_pairs_exceed_a_pack_is_cut_into_packs_within_the_budget():
    shapes = rated(prompts=1, responses=16)
    budget = int(shapes.lengths.sum(1).max()) + 200
    plan = plan_step(shapes, FLOPS, 1, budget)
    assert forwarded(plan) == list(range(len(shapes.lengths)))
    for (pack,) in plan.packs:
        answers = {int(c): int(n) for i in pack for c, n in zip(shapes.content[i, 1:], shapes.lengths[i, 1:],
                                                                strict=True)}
        assert int(shapes.lengths[0, 0]) + sum(answers.values()) <= budget


def test_the_plan_is_the_same_every_time():
    shapes = shapes_of(np.random.default_rng(3).integers(1, 900, (64, 3)))
    assert plan_step(shapes, FLOPS, 4, 4096) == plan_step(shapes, FLOPS, 4, 4096)


def test_a_pair_longer_than_a_pack_is_refused_with_the_key_to_change():
    with pytest.raises(UserError, match=r"train\.tokens_per_microbatch=10 .* 60 tokens .*row 7.* set "
                                        r"train\.tokens_per_microbatch=60"):
        check_budget(np.array([[20, 20, 20]]), ["row 7"].__getitem__, 10)
    check_budget(np.array([[20, 20, 20]]), ["row 7"].__getitem__, 60)
    with pytest.raises(UserError, match=r"the 80 tokens of one pair \(row 7\), as two padded rows; set "
                                        r"train\.tokens_per_microbatch=80"):
        check_budget(np.array([[20, 20, 20]]), ["row 7"].__getitem__, 60, padded=True)
