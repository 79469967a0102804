"""What is planned for scoring: each missing sequence once, prompts shared, packs within the budget."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dpo_dist.reference.cache.scoring_plan import ScoringPlan, plan_scoring
from dpo_dist.reference.cache.store import LogpCache, ReferenceKey, ShardWriter, sequence_key


class Rows:
    """Pairs held in memory."""

    def __init__(self, rows: list[tuple[list[int], list[int], list[int]]]):
        self.rows = [tuple(np.array(part, dtype=np.int32) for part in row) for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def parts(self, index: int):
        return self.rows[index]

    def lengths(self) -> np.ndarray:
        return np.array([[len(part) for part in row] for row in self.rows], dtype=np.int32).reshape(-1, 3)


def random_rows(n: int, seed: int = 0) -> Rows:
    """Few prompts and few completions, so that much is repeated."""
    r = np.random.default_rng(seed)

    def ids(kinds: int) -> list[int]:
        kind = int(r.integers(kinds))
        return [kind] * (1 + kind % 17)

    return Rows([(ids(12), ids(30), ids(30)) for _ in range(n)])


def texts(plan: ScoringPlan, sets: list[Rows]) -> list[list[list[tuple]]]:
    """packs → trees → (prompt, completion)."""
    rows = [row for data_set in sets for row in data_set.rows]
    return [[[(tuple(rows[s // 2][0]), tuple(rows[s // 2][1 + s % 2])) for s in tree.tolist()] for tree in plan.pack(j)]
            for j in range(plan.n_packs)]


@pytest.fixture
def cache(tmp_path: Path) -> LogpCache:
    return LogpCache(str(tmp_path), ReferenceKey("weights", "float32"))


@pytest.mark.parametrize("budget", [20, 64, 1000])
def test_every_sequence_of_all_data_sets_is_planned_once_under_its_prompt_within_the_budget(cache: LogpCache,
                                                                                            budget: int):
    sets = [random_rows(200), random_rows(100, seed=1)]
    plan = plan_scoring(cache, sets, budget)
    packs = texts(plan, sets)
    found = [s for pack in packs for tree in pack for s in tree]
    wanted = {(tuple(row[0]), tuple(c)) for data_set in sets for row in data_set.rows for c in row[1:]}
    assert len(found) == len(set(found)) == len(wanted) and set(found) == wanted
    for pack in packs:
        sizes = [len(tree[0][0]) + sum(len(c) for _, c in tree) for tree in pack]
        assert all(len({prompt for prompt, _ in tree}) == 1 for tree in pack)
        is_one_sequence = len(pack) == 1 and len(pack[0]) == 1
        assert sum(sizes) <= budget or is_one_sequence, "more than the budget only for a sequence that is longer alone"


@pytest.mark.parametrize("budget", [20, 64, 1000])
@pytest.mark.parametrize("windows", [None, np.arange(200) % 3])
def test_padded_rows_keep_to_the_budget_and_each_sequence_is_one(cache: LogpCache, budget: int,
                                                                 windows: np.ndarray | None):
    rows = random_rows(200)
    packs = texts(plan_scoring(cache, [rows], budget, windows, padded=True), [rows])
    assert all(len(tree) == 1 for pack in packs for tree in pack)
    found = [s for pack in packs for tree in pack for s in tree]
    assert sorted(found) == sorted({(tuple(row[0]), tuple(c)) for row in rows.rows for c in row[1:]})
    for pack in packs:
        assert len(pack) * max(len(prompt) + len(c) for ((prompt, c),) in pack) <= budget or len(pack) == 1
    assert budget < 1000 or len(packs) < 0.2 * len(found), "packs are full"


def test_a_prompt_is_one_tree_where_its_completions_fit_a_pack(cache: LogpCache):
    rows = random_rows(300)
    plan = plan_scoring(cache, [rows], 1000)
    assert len(plan.trees) - 1 == len({tuple(row[0]) for row in rows.rows})


def test_what_the_cache_holds_is_not_planned_again(cache: LogpCache):
    rows = random_rows(60)
    sequences = {(tuple(row[0].tolist()), tuple(c.tolist())) for row in rows.rows for c in row[1:]}
    held = sorted(sequences)[::3]
    writer = ShardWriter(cache)
    for prompt, completion in held:
        writer.add(sequence_key(prompt, completion), np.full(len(completion), -1.0))
    writer.flush()
    cache.open_shards(cache.verified_shards()[0])
    plan = plan_scoring(cache, [rows], 100)
    assert plan.n_cached == len(held)
    assert {s for pack in texts(plan, [rows]) for tree in pack for s in tree} == sequences - set(held)


def test_nothing_missing_is_no_pack(cache: LogpCache):
    for padded in (False, True):
        plan = plan_scoring(cache, [Rows([])], 100, padded=padded)
        assert (plan.n_packs, len(plan.sequences), plan.n_cached) == (0, 0, 0)


def test_longest_trees_come_first_so_that_packs_side_by_side_are_alike(cache: LogpCache):
    rows = random_rows(400, seed=5)
    plan = plan_scoring(cache, [rows], 40)
    sizes = [max(len(tree[0][0]) + sum(len(c) for _, c in tree) for tree in pack) for pack in texts(plan, [rows])]
    assert sizes == sorted(sizes, reverse=True)
