"""Which pairs form a step: properties that hold for any seed, data and step size."""
from __future__ import annotations

import numpy as np

from dpo_dist.data.sampler import PairSampler, PromptSampler, Shuffle


def shuffle(n: int = 50, seed: int = 0, digest: str = "d", weights: tuple[float, ...] = (1.0,)) -> Shuffle:
    return Shuffle(seed, digest, (np.arange(n) % len(weights)).astype(np.uint16), weights)


def test_an_epoch_holds_every_pair_once_and_the_next_is_shuffled_anew():
    first, second = shuffle().epoch(0), shuffle().epoch(1)
    assert sorted(first) == sorted(second) == list(range(50))
    assert list(first) != list(second)


def test_the_order_changes_with_the_seed_and_the_data_and_is_the_same_again_for_the_same():
    assert list(shuffle().epoch(0)) == list(shuffle().epoch(0))
    assert list(shuffle().epoch(0)) != list(shuffle(seed=1).epoch(0))
    assert list(shuffle().epoch(0)) != list(shuffle(digest="e").epoch(0))


def test_steps_cut_the_epochs_without_gap_or_overlap_and_the_last_is_short():
    o = PairSampler(shuffle(50), 8)
    assert o.total_steps(2, None) == 13
    steps = [o.pairs_of_step(s, 2, None) for s in range(1, 14)]
    assert [len(s) for s in steps] == [8] * 12 + [4]
    assert list(np.concatenate(steps)) == [*shuffle().epoch(0), *shuffle().epoch(1)]


def test_with_max_steps_every_step_is_full_however_many_epochs_that_takes():
    o = PairSampler(shuffle(5), 8)
    assert [len(o.pairs_of_step(s, 1, 3)) for s in (1, 2, 3)] == [8, 8, 8]


def test_a_source_of_weight_two_and_a_half_comes_so_often_in_an_epoch():
    o = shuffle(100, weights=(1.0, 2.5))
    counts = np.bincount(o.epoch(0), minlength=100)
    assert (counts[0::2] == 1).all()
    assert set(counts[1::2]) == {2, 3}
    assert counts[1::2].sum() == 125
    assert o.pairs_per_epoch == 175


def by_prompt(sizes: list[int], pairs_per_step: int, seed: int = 0) -> tuple[PromptSampler, np.ndarray]:
    prompts = np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes), dtype=np.uint64), sizes))
    return PromptSampler(shuffle(len(prompts), seed), pairs_per_step, prompts), prompts


def test_grouped_by_prompt_every_pair_comes_once_and_no_prompt_is_cut_by_a_steps_end():
    order, prompts = by_prompt([6] * 10 + [1] * 7 + [3] * 5, 16)
    total = order.total_steps(1, None)
    steps = [order.pairs_of_step(s, 1, None) for s in range(1, total + 1)]
    assert sorted(np.concatenate(steps)) == list(range(len(prompts)))
    assert all(0 < len(step) <= 16 for step in steps)
    for prompt in range(22):
        assert sum((prompts[step] == prompt).any() for step in steps) == 1
    assert total <= len(prompts) / 16 + 3, "steps are nearly full"


def test_a_prompt_with_more_pairs_than_a_step_takes_is_cut_into_steps_of_its_own():
    order, _ = by_prompt([20, 1, 1], 8)
    steps = [order.pairs_of_step(s, 1, None) for s in range(1, order.total_steps(1, None) + 1)]
    assert sorted(np.concatenate(steps)) == list(range(22))
    assert max(map(len, steps)) == 8


def test_grouped_epochs_follow_each_other_each_shuffled_anew_and_may_be_fractional():
    order, _ = by_prompt([4] * 6, 8)
    assert order.total_steps(2, None) == 6
    assert order.total_steps(1.34, None) == 4
    first, second = (np.concatenate([order.pairs_of_step(s, 2, None) for s in steps])
                     for steps in ((1, 2, 3), (4, 5, 6)))
    assert sorted(first) == sorted(second) == list(range(24))
    assert list(first) != list(second)
    assert (list(order.pairs_of_step(5, 1, 40))
            == list(order.pairs_of_step(5, 2, None))), "the order does not depend on where a run ends"
    assert list(by_prompt([4] * 6, 8, seed=1)[0].pairs_of_step(1, 2, None)) != list(order.pairs_of_step(1, 2, None))
