"""Which pairs form a step, and how they are laid out: properties that hold for any lengths, ranks and budgets."""
from __future__ import annotations

import random

import numpy as np
import pytest

from dpo_dist.config import UserError
from dpo_dist.data.order import Order
from dpo_dist.data.pack import Sequences, check_budget, pack_pairs, pack_sequences, pair_costs, plan_scoring, plan_step
from dpo_dist.preference import TokenizedPair


def order(n: int = 50, seed: int = 0, digest: str = "d", weights: tuple[float, ...] = (1.0,), pairs_per_step: int = 8) -> Order:
    return Order(seed, digest, np.arange(n) % len(weights), weights, pairs_per_step)


def lengths_of(n: int, seed: int, longest: int = 300) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, longest, (n, 3))


def test_an_epoch_holds_every_pair_once_and_the_next_is_shuffled_anew():
    first, second = order().epoch(0), order().epoch(1)
    assert sorted(first) == sorted(second) == list(range(50))
    assert list(first) != list(second)


def test_the_order_changes_with_the_seed_and_the_data_and_with_nothing_else():
    assert list(order().epoch(0)) == list(order(pairs_per_step=4).epoch(0))
    assert list(order().epoch(0)) != list(order(seed=1).epoch(0))
    assert list(order().epoch(0)) != list(order(digest="e").epoch(0))


def test_steps_cut_the_epochs_without_gap_or_overlap_and_the_last_is_short():
    o = order(50, pairs_per_step=8)
    assert o.total_steps(2, None) == 13
    steps = [o.pairs_of_step(s, 2, None) for s in range(1, 14)]
    assert [len(s) for s in steps] == [8] * 12 + [4]
    assert list(np.concatenate(steps)) == [*o.epoch(0), *o.epoch(1)]


def test_with_max_steps_every_step_is_full_however_many_epochs_that_takes():
    o = order(5, pairs_per_step=8)
    assert [len(o.pairs_of_step(s, 1, 3)) for s in (1, 2, 3)] == [8, 8, 8]


def test_a_source_of_weight_two_and_a_half_comes_so_often_in_an_epoch():
    o = order(100, weights=(1.0, 2.5))
    counts = np.bincount(o.epoch(0), minlength=100)
    assert (counts[0::2] == 1).all()
    assert set(counts[1::2]) == {2, 3}
    assert counts[1::2].sum() == 125
    assert o.pairs_per_epoch == 175


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_every_rank_forwards_equally_often_and_every_pair_is_in_one_pack_within_the_budget(world: int, n: int):
    lengths = lengths_of(n, seed=n)
    plan = plan_step(lengths, pair_costs(lengths, 256), world, 1000)
    ranks = [plan.of_rank(r) for r in range(world)]
    assert len({len(r) for r in ranks}) == 1
    real = [i for r in ranks for members, is_filler in r if not is_filler for i in members]
    assert sorted(real) == list(range(n))
    assert all(members for r in ranks for members, _ in r), "a filler forwards something"
    assert all(lengths[list(members)].sum() <= 1000 for r in ranks for members, _ in r)


def test_ranks_carry_near_equal_cost_for_uneven_lengths():
    r = random.Random(0)
    lengths = np.array([[r.randint(8, 700), r.randint(8, 700), r.randint(8, 648)] for _ in range(64)])
    costs = pair_costs(lengths, 256)
    plan = plan_step(lengths, costs, 2, 4096)
    load = [sum(costs[i] for members, _ in plan.of_rank(rank) for i in members) for rank in (0, 1)]
    assert max(load) / (sum(load) / 2) < 1.05


def test_a_pair_longer_than_a_pack_is_refused_with_the_key_to_change():
    with pytest.raises(UserError, match=r"train\.tokens_per_microbatch=10 .* 60 tokens .*row 7.* set train\.tokens_per_microbatch=60"):
        check_budget(np.array([[20, 20, 20]]), ["row 7"], 10)


def test_a_pack_computes_a_shared_prompt_and_a_shared_completion_once():
    pairs = [TokenizedPair((5, 6), (7, 1), (8, 9, 1), "a"), TokenizedPair((5, 6), (8, 9, 1), (4, 1), "b"),
             TokenizedPair((3,), (7, 1), (2, 1), "c")]
    batch = pack_pairs(pairs, [0, 1, 2], [1.0, 1.0, 1.0])
    assert batch.input_ids[0].tolist() == [5, 6, 7, 1, 8, 9, 1, 4, 1, 3, 7, 1, 2, 1]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 2, 3, 4, 2, 3, 0, 1, 2, 1, 2]
    assert batch.chosen.tolist() == [0, 1, 3]
    assert batch.rejected.tolist() == [1, 2, 4]
    assert batch.lengths.tolist() == [2, 3, 2, 2, 2]


def test_a_completions_first_token_is_predicted_by_the_prompts_last_and_the_rest_by_their_own_predecessors():
    batch = pack_sequences([Sequences((5, 6), ((7, 8, 1), (9, 1)))])
    ids = batch.input_ids[0]
    assert ids[batch.predict_at].tolist() == [6, 7, 8, 6, 9]
    assert batch.targets.tolist() == [7, 8, 1, 9, 1]
    assert batch.sequence.tolist() == [0, 0, 0, 1, 1]
    assert batch.offset.tolist() == [0, 1, 2, 0, 1]


def test_scoring_packs_hold_every_tree_once_and_ranks_get_equally_many():
    tokens = [random.Random(1).randint(1, 90) for _ in range(37)]
    rows = plan_scoring(tokens, 4, 100)
    assert all(len(row) == 4 for row in rows)
    assert sorted(i for row in rows for pack in row for i in pack) == list(range(37))
    assert all(sum(tokens[i] for i in pack) <= 100 for row in rows for pack in row)
