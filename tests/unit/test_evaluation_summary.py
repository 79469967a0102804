"""The summary of an evaluation: known truths are found in pairs that were made from them, and nothing else is."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dpo_dist.config.rules import resolve_loss
from dpo_dist.config.schema import LossConfig
from dpo_dist.data.store import PairStore
from dpo_dist.data.writer import PairWriter, Source
from dpo_dist.evaluation.facts import Facts, of_lengths, of_numbers, values_of
from dpo_dist.evaluation.pairs import EvaluatedPairs, hits
from dpo_dist.evaluation.results import keep_evaluation, read_summaries
from dpo_dist.evaluation.rewardbench import SECTIONS, SUBSETS
from dpo_dist.evaluation.show import summary_lines
from dpo_dist.evaluation.summary import summarize
from dpo_dist.runtime.run_dir import RunDir
from dpo_dist.stats.calibration import sigmoid
from dpo_dist.stats.intervals import wilson
from dpo_dist.types import TokenizedPair

DPO = resolve_loss(LossConfig("sigmoid", beta=0.1))


def measured(margin: np.ndarray, seed: int = 0, tokens: np.ndarray | None = None, beta: float = 0.1,
             **changes: np.ndarray) -> EvaluatedPairs:
    """Pairs with these margins of rewards at this beta, as DPO has them."""
    rng, n = np.random.default_rng(seed), len(margin)
    reference = -rng.random((2, n)) * 50
    chosen = rng.normal(size=n)
    counted = rng.integers(5, 60, (n, 2)).astype(np.int32) if tokens is None else tokens
    policy = reference + np.stack([chosen, chosen - margin]) / beta
    columns = {"pair": np.arange(n, dtype=np.int32), "weight": np.ones(n), "policy_chosen": policy[0],
               "policy_rejected": policy[1], "reference_chosen": reference[0], "reference_rejected": reference[1],
               "reward_chosen": chosen, "reward_rejected": chosen - margin, "logit": margin,
               "loss": np.logaddexp(0, -np.nan_to_num(margin)), "chosen_tokens": counted[:, 0],
               "rejected_tokens": counted[:, 1]}
    return EvaluatedPairs(**{**columns, **changes})


def facts_of(n: int, **members: dict[str, np.ndarray]) -> Facts:
    return Facts(np.arange(n), np.zeros(n, dtype=bool),
                 {(by, value): at for by, values in members.items() for value, at in values.items()})


def test_accuracy_is_the_weighted_share_and_stands_beside_a_judge_of_length_and_the_reference():
    margin = np.array([1.0, -1.0, 0.0, 2.0])
    tokens = np.array([[9, 5], [5, 9], [7, 7], [3, 4]], dtype=np.int32)
    pairs = measured(margin, tokens=tokens, weight=np.array([1.0, 2.0, 1.0, 4.0]),
                     reference_chosen=np.array([-1.0, -9, -5, -5]), reference_rejected=np.array([-2.0, -3, -5, -4]))
    found = summarize(3, pairs, facts_of(4), DPO)
    assert found["accuracy"]["value"] == (1 + 0.5 + 4) / 8 and found["accuracy"]["n"] == 4
    assert found["baselines"]["length"]["value"] == (1 + 0.5) / 8
    assert found["baselines"]["reference"]["value"] == (1 + 0.5) / 8
    assert found["length_controlled"]["value"] == 4 / 6 and found["length_controlled"]["n"] == 2
    assert (found["step"], found["pairs"], found["prompts"]) == (3, 4, 4)
    tied = summarize(3, pairs, Facts(np.arange(4), np.array([False, True, False, False])), DPO)
    assert tied["accuracy"]["value"] == pytest.approx((1 + 0.5 + 4) / 6) and tied["ties"] == 1


def test_pairs_of_one_prompt_widen_the_interval():
    margin = np.repeat(np.where(np.arange(100) % 3 > 0, 1.0, -1.0), 4)
    apart, together = (summarize(0, measured(margin), Facts(prompt, np.zeros(400, bool)), DPO)["accuracy"]
                       for prompt in (np.arange(400), np.repeat(np.arange(100), 4)))
    assert (apart["low"], apart["high"]) == pytest.approx(wilson(apart["value"], 400))
    assert together["value"] == apart["value"]
    assert 1.9 < (together["high"] - together["low"]) / (apart["high"] - apart["low"]) < 2.1
    assert together["n"] == 400


def test_a_policy_that_only_counts_words_is_no_better_than_a_coin_at_equal_length():
    rng = np.random.default_rng(0)
    difference = rng.normal(15, 20, 4000).round()                    # chosen is longer, mostly
    tokens = np.stack([100 + difference, np.full(4000, 100)], axis=1).astype(np.int32)
    noisy = np.tanh(difference / difference.std()) * 3 + rng.logistic(size=4000)
    found = summarize(0, measured(noisy, tokens=tokens), facts_of(4000), DPO)
    assert found["accuracy"]["value"] > 0.7 and found["length_controlled"]["value"] < 0.4
    assert found["at_equal_length"]["low"] <= 0.5 <= found["at_equal_length"]["high"]
    honest = summarize(0, measured(rng.logistic(1.0, 1, 4000), tokens=tokens), facts_of(4000), DPO)
    assert honest["at_equal_length"]["low"] <= sigmoid(1.0) <= honest["at_equal_length"]["high"]
    assert honest["length_controlled"]["value"] == pytest.approx(sigmoid(1.0), abs=0.04)


@pytest.mark.parametrize("truth", [0.03, 0.1, 0.5])
def test_the_beta_that_made_the_preferences_is_found_and_the_true_one_is_calibrated(truth: float):
    rng = np.random.default_rng(4)
    difference = rng.normal(0, 1 / truth, 3000)                      # of log-ratios, in nats
    wins = rng.random(3000) < sigmoid(truth * difference)
    found = summarize(0, measured(0.1 * np.where(wins, difference, -difference)), facts_of(3000), DPO)["calibration"]
    assert found["calibrating_beta_low"] <= truth <= found["calibrating_beta_high"]
    assert (found["ece"] <= found["ece_by_chance"]) == (truth == 0.1) and found["beta"] == 0.1
    assert sum(one["n"] for one in found["bins"]) == 3000 and len(found["bins"]) == 10
    right = sum(one["observed_low"] <= one["predicted"] <= one["observed_high"] for one in found["bins"])
    assert right >= 8 if truth == 0.1 else right <= 5


def test_calibration_is_of_what_the_loss_compares_and_null_where_nothing_calibrates():
    rng = np.random.default_rng(1)
    margin = rng.normal(size=50)
    found = summarize(0, measured(margin, logit=margin / 7), facts_of(50), DPO)["calibration"]
    assert found["log_loss"] == pytest.approx(np.logaddexp(0, -margin / 7).mean())
    assert found["calibrating_beta"] == pytest.approx(0.1 * found["calibrating_factor"]["value"]) or (
        found["calibrating_beta"] == 0)
    loss = resolve_loss(LossConfig("rao_kupper", beta=0.1, tie_nu=3.0))
    assert summarize(0, measured(margin), facts_of(50), loss)["calibration"]["calibrating_beta"] is None
    right = summarize(0, measured(np.full(30, 2.0)), facts_of(30), DPO)
    assert right["calibration"]["calibrating_beta"] is None and right["at_equal_length"] is None
    margin = np.where(np.arange(30) < 29, 1.0, np.nan)
    broken = summarize(0, measured(margin), facts_of(30), DPO)
    assert broken["accuracy"]["value"] == pytest.approx(29 / 30) and broken["calibration"] is None
    json.dumps(broken, allow_nan=False)
    assert summary_lines(broken)


def test_a_slice_that_was_made_worse_is_the_only_one_flagged():
    rng, n = np.random.default_rng(2), 1200
    languages = np.array(["en", "de", "sw"])[rng.choice(3, n, p=[0.6, 0.3, 0.1])]
    noise = {f"tag{i}": np.flatnonzero(rng.random(n) < rng.uniform(0.02, 0.6)) for i in range(40)}
    right = rng.random(n) < np.where(languages == "sw", 0.5, 0.8)
    facts = facts_of(n, language={name: np.flatnonzero(languages == name) for name in ("en", "de", "sw")}, tag=noise,
                     source={"all": np.arange(n)}, rare={"few": np.arange(4)})
    found = summarize(0, measured(np.where(right, 1.0, -1.0)), facts, DPO)
    flagged = [(one["by"], one["value"]) for one in found["slices"] if one["flagged"]]
    assert flagged == [("language", "sw")] and found["slices_left_out"] == 1
    worst = min(found["slices"], key=lambda one: one["difference"])
    inside = languages == "sw"
    assert worst["difference"] == pytest.approx(right[inside].mean() - right[~inside].mean())
    assert worst["n"] == inside.sum() and worst["p"] <= worst["p_corrected"] < 0.05
    assert any("language=sw" in line for line in summary_lines(found))


def test_slices_of_a_policy_that_knows_no_difference_are_hardly_ever_flagged():
    false = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        prompts = np.repeat(np.arange(100), 4)
        right = rng.random(400) < rng.beta(3, 1, 100)[prompts]        # prompts differ, slices of them do not
        members = {("tag", str(i)): np.flatnonzero(np.isin(prompts, rng.choice(100, 20, replace=False)))
                   for i in range(20)}
        found = summarize(0, measured(np.where(right, 1.0, -1.0)), Facts(prompts, np.zeros(400, bool), members), DPO)
        false += any(one["flagged"] for one in found["slices"])
    assert false <= 4


def test_displacement_is_a_mean_a_token_since_the_reference_or_since_the_start():
    tokens = np.array([[10, 5], [20, 10]], dtype=np.int32)
    pairs = measured(np.array([1.0, 2.0]), tokens=tokens, policy_chosen=np.array([-11.0, -20]),
                     policy_rejected=np.array([-9.0, -22]), reference_chosen=np.array([-10.0, -22]),
                     reference_rejected=np.array([-4.0, -20]))
    found = summarize(4, pairs, facts_of(2), DPO)["displacement"]
    assert (found["chosen_per_token"], found["rejected_per_token"]) == pytest.approx((0.0, -0.6))
    assert found["since"] == "reference"
    assert found["share_chosen_falling"]["value"] == found["share_both_falling"]["value"] == 0.5
    nothing = np.full(2, np.nan)
    alone = measured(np.array([1.0, 2.0]), reference_chosen=nothing, reference_rejected=nothing)
    simpo = resolve_loss(LossConfig("simpo"))
    assert summarize(4, alone, facts_of(2), simpo)["displacement"] is None
    since = summarize(4, alone, facts_of(2), simpo, start=alone)
    assert since["displacement"]["since"] == "step 0" and since["displacement"]["chosen_per_token"] == 0
    assert since["baselines"]["reference"] is None


def test_a_loss_without_rewards_has_a_summary_without_accuracy():
    nothing = np.full(20, np.nan)
    pairs = measured(np.zeros(20), reward_chosen=nothing, reward_rejected=nothing, policy_rejected=nothing,
                     reference_chosen=nothing, reference_rejected=nothing)
    found = summarize(0, pairs, facts_of(20), resolve_loss(LossConfig("sft")))
    assert {name for name, value in found.items() if value is None} == {
        "accuracy", "length_controlled", "at_equal_length", "calibration", "displacement", "rewardbench", "kl"}
    assert found["slices"] == [] and summary_lines(found) == []


# ---------------------------------------------------------------------------------------------------------- RewardBench


def test_rewardbench_scores_are_those_of_its_own_formula():
    rng, at, members, wins = np.random.default_rng(3), 0, {}, []
    for n, name in enumerate(sorted(SUBSETS)):
        members[name] = np.arange(at, at + 10 + n)
        wins += (rng.random(10 + n) < 0.5 + n / 50).tolist()
        at += 10 + n
    won = np.array(wins, dtype=float)
    margin = np.where(won > 0, 1.0, -1.0)
    margin[members["hep-go"]] = won[members["hep-go"]] = 0.0          # ties are lost
    found = summarize(0, measured(margin), facts_of(at, subset=members), DPO)["rewardbench"]
    accuracy = {name: won[where].mean() for name, where in members.items()}
    sections = {name: sum(accuracy[subset] * count for subset, count in counts.items()) / sum(counts.values())
                for name, counts in SECTIONS.items()}
    assert {name: one["value"] for name, one in found["sections"].items()} == pytest.approx(sections)
    assert {name: one["value"] for name, one in found["subsets"].items()} == pytest.approx(accuracy)
    assert found["score"]["value"] == pytest.approx(np.mean(list(sections.values()))) and found["missing"] == []
    assert sum(SECTIONS["Reasoning"].values()) == 2 * 984 and len(SUBSETS) == 23
    assert found["subsets"]["math-prm"]["n"] == len(members["math-prm"])


def test_rewardbench_is_told_by_its_subsets_and_says_what_is_missing():
    part = {"math-prm": np.arange(10), "hep-go": np.arange(10, 20)}
    margin = np.where(np.arange(20) < 10, 1.0, -1.0)
    found = summarize(0, measured(margin), facts_of(20, subset=part), DPO)["rewardbench"]
    assert found["sections"].keys() == {"Reasoning"} and found["score"]["value"] == pytest.approx(984 / (984 + 164))
    assert len(found["missing"]) == 21
    others = facts_of(20, subset={**part, "my own": np.arange(20)})
    found = summarize(0, measured(margin), others, DPO)
    assert found["rewardbench"] is None and {one["value"] for one in found["slices"]} == {"math-prm", "hep-go"}


# ---------------------------------------------------------------------------------------------------------------- facts


def test_what_a_record_says_becomes_slices():
    record = {"locale": "de", "tags": ["code", "code", "long"], "annotator_class": "expert", "chosen_model": "m1",
              "chosen_rating": 3.0, "annotators": [{"annotator": "a"}],
              "columns": {"subset": "hard", "difficulty": 2, "safe": True, "note": "x" * 61, "blob": {"a": 1}}}
    assert sorted(values_of(record), key=str) == sorted([
        ("language", "de"), ("tag", "code"), ("tag", "long"), ("annotator_class", "expert"), ("chosen_model", "m1"),
        ("subset", "hard"), ("difficulty", 2.0), ("safe", "true")], key=str)
    assert list(values_of({"tags": {"topic": "maths", "level": 3}})) == [("tag topic", "maths"), ("tag level", 3.0)]
    assert list(values_of({"tags": "one"})) == [("tag", "one")] and list(values_of({})) == []


def test_numbers_are_slices_each_where_they_are_few_and_quarters_where_they_are_many():
    few = of_numbers("strength", [3, 5, 8], [1.0, 2.5, 1.0])
    assert {key: at.tolist() for key, at in few.items()} == {("strength", "1"): [3, 8], ("strength", "2.5"): [5]}
    many = of_numbers("score", range(100), np.linspace(0, 1, 100))
    assert [len(at) for at in many.values()] == [25] * 4 and ("score", "0 to 0.242424") in many
    lengths = of_lengths(np.array([3, 32, 33, 64, 65, 700], dtype=np.int32))
    assert {value: at.tolist() for (_, value), at in lengths.items()} == {
        "1 to 32 tokens": [0, 1], "33 to 64 tokens": [2, 3], "65 to 128 tokens": [4], "513 to 1024 tokens": [5]}


def test_facts_come_from_a_store(tmp_path: Path):
    writer = PairWriter(tmp_path / "store", [Source(name, f"{name}.jsonl", "preference") for name in "ab"])
    for i in range(24):
        record = {"tags": ["even" if i % 2 == 0 else "odd"], "columns": {"id": f"row {i}"}}
        writer.add(TokenizedPair((5, 6 + i // 2), (7, 1), (8, 9 + i, 1), f"a:{i}", strength=float(i % 2 + 1),
                                 record=record if i < 20 else {}), source=i % 2, prompt_hash=i // 2)
    writer.close({})
    found = Facts.of(PairStore.open(tmp_path / "store"))
    assert len(np.unique(found.prompt)) == 12 and found.prompt[0] == found.prompt[1] and not found.tie.any()
    assert {key: len(at) for key, at in found.members.items()} == {
        ("source", "a"): 12, ("source", "b"): 12, ("tag", "even"): 10, ("tag", "odd"): 10, ("strength", "1"): 12,
        ("strength", "2"): 12, ("length", "1 to 32 tokens"): 24}, "a column that names rows is no slice"


# ---------------------------------------------------------------------------------------------------------------- files


def test_an_evaluation_that_is_made_again_takes_its_own_place_and_those_after_it_go(tmp_path: Path):
    run_dir, facts = RunDir(tmp_path), facts_of(30)
    for step in (0, 2, 4):
        keep_evaluation(run_dir, step, measured(np.full(30, step - 1.0)), facts, DPO)
    again = measured(np.full(30, -1.0))
    keep_evaluation(run_dir, 2, again, facts, DPO)
    assert [one["step"] for one in read_summaries(run_dir)] == [0, 2]
    assert [one["accuracy"]["value"] for one in read_summaries(run_dir)] == [0, 0]
    assert sorted(path.name for path in run_dir.evaluations.iterdir()) == ["step-000000.parquet", "step-000002.parquet"]
    read = EvaluatedPairs.read(run_dir.evaluation(2))
    assert all(np.array_equal(getattr(read, name), value, equal_nan=True) for name, value in vars(again).items())
    assert all(getattr(read, name).dtype == value.dtype for name, value in vars(again).items())


def test_hits_count_as_the_metric_does():
    assert hits(np.array([1e-300, 0.0, -0.0, -3.0, np.nan, np.inf])).tolist() == [1, 0.5, 0.5, 0, 0, 1]
