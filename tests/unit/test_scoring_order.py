"""What is scored when: first what training waits for, each sequence once, and nothing that it never asks for."""
from __future__ import annotations

from pathlib import Path

import numpy as np
from test_scoring_plan import Rows, random_rows, texts

from dpo_dist.data.sampler import PairSampler, Shuffle
from dpo_dist.reference.cache.scoring_order import MOST_STEPS, NEVER, windows
from dpo_dist.reference.cache.scoring_plan import plan_scoring
from dpo_dist.reference.cache.store import LogpCache, ReferenceKey


def order(n: int, pairs_per_step: int) -> PairSampler:
    return PairSampler(Shuffle(0, "digest", np.zeros(n, np.uint16), (1.0,)), pairs_per_step)


def test_the_first_step_comes_first_then_the_held_out_pairs_then_steps_in_windows_that_grow():
    steps = order(400, 4)
    found = windows(steps, 1, None, 400, 7)
    of_step = [found[steps.pairs_of_step(step, 1, None)] for step in range(1, 101)]
    assert all(len(set(windows_of_step)) == 1 for windows_of_step in of_step), "a step is never spread over windows"
    firsts = [int(windows_of_step[0]) for windows_of_step in of_step]
    assert firsts[:8] == [0, 2, 3, 3, 4, 4, 4, 4] and firsts == sorted(firsts)
    assert set(found[400:]) == {1}
    assert max(firsts.count(w) for w in firsts) == MOST_STEPS


def test_pairs_that_a_short_run_never_reaches_are_not_asked_for_and_a_second_epoch_asks_for_nothing_new():
    steps = order(400, 4)
    short = windows(steps, 1, 10, 400, 0)
    assert (short != NEVER).sum() == 40
    assert set(np.flatnonzero(short != NEVER)) == {i for s in range(1, 11) for i in steps.pairs_of_step(s, 1, 10)}
    assert (windows(steps, 3, None, 400, 0) == windows(steps, 1, None, 400, 0)).all()


def test_the_plan_goes_through_the_windows_in_turn_and_scores_each_sequence_in_the_first_that_asks(tmp_path: Path):
    cache = LogpCache(str(tmp_path), ReferenceKey("weights", "float32"))
    train, held_out = random_rows(120), random_rows(20, seed=1)
    window_of = windows(order(120, 6), 1, 12, 120, 20)
    rows = [*train.rows, *held_out.rows]
    first: dict[tuple, int] = {}
    for window, row in zip(window_of.tolist(), rows, strict=True):
        for completion in row[1:]:
            key = (tuple(row[0]), tuple(completion))
            first[key] = min(window, first.get(key, NEVER))
    packs = texts(plan_scoring(cache, [train, held_out], 100, window_of), [train, held_out])
    trees = [tree for pack in packs for tree in pack]
    scored = [s for tree in trees for s in tree]
    assert len(scored) == len(set(scored)) and set(scored) == {s for s, window in first.items() if window != NEVER}
    assert all(len({first[s] for s in tree}) == 1 for tree in trees)
    in_turn = [first[tree[0]] for tree in trees]
    assert in_turn == sorted(in_turn)


def test_one_window_is_the_plan_without_windows(tmp_path: Path):
    cache, rows = LogpCache(str(tmp_path), ReferenceKey("weights", "float32")), random_rows(100)
    plain, one = plan_scoring(cache, [rows], 60), plan_scoring(cache, [rows], 60, np.zeros(100, np.int64))
    assert all((a == b).all() for a, b in zip(plain[:3], one[:3], strict=True)) and plain.n_cached == one.n_cached


def test_an_empty_data_set_has_no_windows(tmp_path: Path):
    assert len(windows(order(4, 2), 1, None, 4, 0)) == 4
    assert plan_scoring(LogpCache(str(tmp_path), ReferenceKey("w", "float32")), [Rows([])], 10,
                        np.empty(0, np.int64)).n_packs == 0
