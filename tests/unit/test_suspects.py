"""Flipped labels come first in the ranking, in whatever way the margins of a training go."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo_dist.data.store import PairStore
from dpo_dist.data.writer import PairWriter, Source
from dpo_dist.dynamics.datamap import data_map
from dpo_dist.dynamics.suspects import Suspicion, suspicion, visit_numbers
from dpo_dist.dynamics.visits import Visits, write_part
from dpo_dist.dynamics.words import word_evidence
from dpo_dist.dynamics.write import write_dynamics
from dpo_dist.runtime.run_dir import RunDir
from dpo_dist.types import TokenizedPair

PAIRS, FLIPPED, PER_STEP, SEEDS = 600, 30, 10, 6


def trained(seed: int, epochs: int, signal: float, memory: float = 0.0, tails: float | None = None,
            skew: float = 0.0) -> tuple[Visits, np.ndarray]:
    """(visits, the flipped pairs) of a training that learns a rule in its first epoch: from knowing nothing, and
    margins of 0, to right labels `signal` spreads above 0 and flipped ones as far below. Each later epoch raises every
    margin by `memory` spreads. Half of the spread is a pair's own, the rest comes anew at each visit; with `tails`
    degrees of freedom, with `skew` longer to one side."""
    random = np.random.default_rng(seed)
    flipped = random.choice(PAIRS, FLIPPED, replace=False)
    sign = np.ones(PAIRS)
    sign[flipped] = -1

    def noise() -> np.ndarray:
        return random.normal(size=PAIRS) if tails is None else random.standard_t(tails, PAIRS)

    own, rows = sign * (noise() + skew * random.exponential(1, PAIRS)), []
    for epoch in range(epochs):
        fresh = noise()
        for at, i in enumerate(random.permutation(PAIRS).tolist()):
            known = min(1.0, epoch + at / PAIRS)
            z = sign[i] * known * signal + 0.7 * (own[i] + fresh[i]) + memory * epoch
            rows.append((1 + (epoch * PAIRS + at) // PER_STEP, i, 0.3 * known * z))
    step, pair, margin = map(np.array, zip(*sorted(rows), strict=True))
    return Visits(step.astype(np.int32), pair.astype(np.int32), margin.astype(np.float32), np.zeros(len(rows), "f4")
                  ), flipped


def recall(score: np.ndarray, flipped: np.ndarray) -> float:
    """Share of the flipped pairs that are in the first tenth."""
    return float(np.isin(flipped, np.argsort(-score, kind="stable")[:len(score) // 10]).mean())


def judged(training: dict[str, Any]) -> list[tuple[Suspicion, Visits, np.ndarray]]:
    runs = [trained(seed, **training) for seed in range(SEEDS)]
    return [(suspicion(visits, np.zeros(PAIRS)), visits, flipped) for visits, flipped in runs]


@pytest.mark.parametrize(("training", "at_least"), [
    ({"epochs": 1, "signal": 3.0}, 0.7), ({"epochs": 3, "signal": 3.0}, 0.95), ({"epochs": 3, "signal": 1.5}, 0.8),
    ({"epochs": 3, "signal": 1.5, "memory": 1.5}, 0.8), ({"epochs": 3, "signal": 1.5, "memory": 8.0}, 0.8),
    ({"epochs": 2, "signal": 3.0, "tails": 2.5}, 0.85), ({"epochs": 2, "signal": 2.0, "skew": 2.0}, 0.9)])
def test_most_flipped_labels_are_in_the_first_tenth_and_about_as_many_are_suspected(training: dict[str, Any],
                                                                                  at_least: float):
    found = judged(training)
    shares = [recall(suspects.score, flipped) for suspects, _, flipped in found]
    assert np.mean(shares) >= at_least, shares
    assert 0.5 * FLIPPED <= np.mean([suspects.flipped for suspects, _, _ in found]) <= 1.5 * FLIPPED


def test_memory_of_the_labels_does_not_hide_flipped_ones_as_it_does_from_the_mean_probability():
    remembered = {"epochs": 3, "signal": 1.5, "memory": 8.0}
    ours = np.mean([recall(suspects.score, flipped) for suspects, _, flipped in judged(remembered)])
    plain = np.mean([recall(-data_map(visits, PAIRS).confidence, flipped) for _, visits, flipped in judged(remembered)])
    assert ours > plain


def test_where_nothing_is_learned_nothing_is_suspected_and_the_flipped_are_found_by_chance_only():
    found = judged({"epochs": 1, "signal": 0.0})
    assert [suspects.flipped for suspects, _, _ in found] == [0] * SEEDS
    assert np.mean([recall(suspects.score, flipped) for suspects, _, flipped in found]) < 0.25


def test_margins_of_0_and_pairs_that_were_never_seen_are_neither_suspected_nor_cleared():
    step, pair = np.array([1, 1, 2], np.int32), np.array([0, 1, 2], np.int32)
    still = Visits(step, pair, np.zeros(3, np.float32), np.zeros(3, np.float32))
    found = suspicion(still, np.zeros(5))
    assert found.score.tolist() == [0.0] * 5 and found.flipped == 0


def test_visits_of_a_pair_are_numbered_in_the_order_of_time():
    step, pair = np.array([1, 1, 2, 2, 3, 3], np.int32), np.array([4, 7, 4, 4, 7, 1], np.int32)
    zeros = np.zeros(6, np.float32)
    assert visit_numbers(Visits(step, pair, zeros, zeros)).tolist() == [0, 0, 1, 2, 1, 0]


# ---------------------------------------------------------------------------------------------------------------- words

GOOD, BAD = 11, 12                                       # tokens that chosen and rejected answers tend to hold


def store(folder: Path, flipped: set[int], n: int = 300, rule: bool = True) -> PairStore:
    """Pairs of random tokens of which good answers hold GOOD and bad ones BAD, in 8 of 10 cases."""
    random, writer = np.random.default_rng(3), PairWriter(folder, [Source("rows", "rows.jsonl", "token_ids")])
    for i in range(n):
        answers = [[*random.integers(20, 60, random.integers(5, 30)).tolist(),
                    *([token] if rule and random.random() < 0.8 else []), 1] for token in (GOOD, BAD)]
        chosen, rejected = answers[::-1] if i in flipped else answers
        writer.add(TokenizedPair((5, 6), tuple(chosen), tuple(rejected), f"rows.jsonl:{i + 1}"), 0, i)
    writer.close({})
    return PairStore.open(folder)


def test_words_of_other_pairs_find_flipped_labels_of_a_run_that_saw_each_pair_once_and_learned_little(tmp_path: Path):
    flipped = set(range(0, 300, 20))
    words = word_evidence(store(tmp_path / "pairs", flipped))
    assert recall(-words, np.array(sorted(flipped))) >= 0.8
    random = np.random.default_rng(0)
    margins = random.normal(0.01, 0.1, 300)              # the model's own say nothing
    visits = Visits(np.arange(1, 301, dtype=np.int32), random.permutation(300).astype(np.int32),
                    margins.astype(np.float32), np.zeros(300, np.float32))
    assert recall(suspicion(visits, words).score, np.array(sorted(flipped))) >= 0.8


def test_words_that_say_nothing_are_not_listened_to(tmp_path: Path):
    words = word_evidence(store(tmp_path / "pairs", set(), n=PAIRS, rule=False))
    visits, flipped = trained(0, epochs=2, signal=3.0)
    alone, both = suspicion(visits, np.zeros(PAIRS)), suspicion(visits, words)
    assert recall(both.score, flipped) >= recall(alone.score, flipped) - 0.07
    assert np.abs(both.words).mean() < 0.3 * np.abs(both.margins).mean()


def test_the_words_of_too_few_pairs_say_nothing(tmp_path: Path):
    assert not word_evidence(store(tmp_path / "pairs", set(), n=10)).any()


# --------------------------------------------------------------------------------------------------------- what is left


def test_files_name_rows_and_are_written_again_from_the_visits_of_a_run_under_way(tmp_path: Path):
    pairs, run = store(tmp_path / "pairs", {7}, n=40), RunDir(tmp_path / "run")
    assert write_dynamics(run, pairs) is None and not run.suspects.exists()
    margins = np.array([1.0, -2.0, 0.5], np.float32)
    zeros = np.zeros(3, np.float32)
    write_part(run.visits, 1, 1, 0, Visits(np.ones(3, np.int32), np.array([3, 7, 9], np.int32), margins, zeros))
    assert write_dynamics(run, pairs) is not None
    write_part(run.visits, 2, 2, 0, Visits(np.full(3, 2, np.int32), np.array([3, 7, 9], np.int32), margins, zeros))
    whole = write_dynamics(run, pairs)
    assert whole is not None and json.loads(run.datamap_json.read_text()) == whole
    assert (whole["pairs"], whole["visits"], whole["last_step"]) == (40, 6, 2)
    assert [(entry["where"], entry["margins"]) for entry in whole["never_learned"]] == [("rows.jsonl:8", [-2.0, -2.0])]
    ranked = [json.loads(line) for line in run.suspects.read_text().splitlines()]
    assert len(ranked) == 40
    unseen = next(row for row in ranked if row["pair"] == 0)
    assert (unseen["visits"], unseen["confidence"], unseen["last_margin"], unseen["source"]) == (0, None, None, "rows")
    seen = next(row for row in ranked if row["pair"] == 7)
    assert (seen["visits"], seen["first_margin"], seen["last_margin"]) == (2, -2.0, -2.0)
    assert set(whole["map"]["where"]) == {"rows.jsonl:4", "rows.jsonl:8", "rows.jsonl:10"}
