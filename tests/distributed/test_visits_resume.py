"""However a run is killed, resumed or spread over ranks, it ends with one visit for each time a step saw a pair."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import dpo_dist, model_digest, train_on, write_rows, write_tiny_llama
from test_resume import killed_after

from dpo_dist.dynamics.visits import Visits, read_visits

pytestmark = pytest.mark.distributed

STEPS, PAIRS, PAIRS_PER_STEP = 9, 50, 12


@pytest.fixture
def words(tmp_path: Path, base: list[str]) -> list[str]:
    write_tiny_llama(tmp_path / "m", hidden_size=64, intermediate_size=128)
    write_rows(tmp_path / "rows.jsonl", PAIRS, longest=80)
    return ["train", f"model.path={tmp_path / 'm'}", *base, train_on(tmp_path / "rows.jsonl"),
            f"train.pairs_per_step={PAIRS_PER_STEP}", f"train.max_steps={STEPS}", "train.save_every_steps=2",
            "optim.lr=1e-3", "loss.beta=0.5", "train.tokens_per_microbatch=600"]


def seen(run_dir: Path) -> Visits:
    found = read_visits(run_dir / "visits")
    assert np.bincount(found.step).tolist() == [0, *[PAIRS_PER_STEP] * STEPS], "each pair of each step, and no filler"
    return found


def test_a_killed_run_has_the_visits_of_an_undisturbed_one_to_the_bit(tmp_path: Path, words: list[str]):
    words = [*words, "zero=zero2", "cluster.procs_per_node=2"]
    dpo_dist(*words, f"run.dir={tmp_path / 'straight'}")
    killed_after(4, words, tmp_path / "killed")
    damaged, missing, *_ = sorted((tmp_path / "killed" / "visits").iterdir())          # the checkpoint has them
    damaged.write_bytes(damaged.read_bytes()[:-1])
    missing.unlink()
    dpo_dist(*words, f"run.dir={tmp_path / 'killed'}")
    straight, killed = seen(tmp_path / "straight"), seen(tmp_path / "killed")
    for name, values in vars(straight).items():
        np.testing.assert_array_equal(getattr(killed, name), values, err_msg=name)
    for name in ("datamap.json", "suspects.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert model_digest(tmp_path / "killed") == model_digest(tmp_path / "straight")


def test_a_run_that_goes_on_with_another_number_of_ranks_has_them_to_rounding(tmp_path: Path, words: list[str]):
    words = [*words, "zero=zero2"]
    dpo_dist(*words, "cluster.procs_per_node=1", f"run.dir={tmp_path / 'straight'}")
    killed_after(4, [*words, "cluster.procs_per_node=2"], tmp_path / "killed")
    dpo_dist(*words, "cluster.procs_per_node=1", f"run.dir={tmp_path / 'killed'}")
    straight, killed = seen(tmp_path / "straight"), seen(tmp_path / "killed")
    np.testing.assert_array_equal(killed.step, straight.step)
    np.testing.assert_array_equal(killed.pair, straight.pair)
    np.testing.assert_allclose(killed.chosen, straight.chosen, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(killed.rejected, straight.rejected, rtol=1e-3, atol=1e-3)


def test_first_visits_are_what_the_policy_said_before_the_step_and_all_pairs_are_ranked(tmp_path: Path,
                                                                                       words: list[str]):
    dpo_dist(*words, "zero=none", f"run.dir={tmp_path / 'run'}")
    found = seen(tmp_path / "run")
    first = found.step == 1
    np.testing.assert_allclose(found.margin[first], 0, atol=1e-4, err_msg="policy and reference are the same there")
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for row in metrics:
        assert found.margin[found.step == row["step"]].mean() == pytest.approx(row["rewards/margins"], abs=1e-5)
    ranked = [json.loads(line) for line in (tmp_path / "run" / "suspects.jsonl").read_text().splitlines()]
    assert [row["rank"] for row in ranked] == list(range(1, PAIRS + 1))
    assert sorted(row["pair"] for row in ranked) == list(range(PAIRS))
    assert [row["score"] for row in ranked] == sorted((row["score"] for row in ranked), reverse=True)
    assert {row["where"] for row in ranked} == {f"{tmp_path / 'rows.jsonl'}:{line}" for line in range(1, PAIRS + 1)}
    whole = json.loads((tmp_path / "run" / "datamap.json").read_text())
    assert (whole["pairs"], whole["visits"]) == (PAIRS, STEPS * PAIRS_PER_STEP)
    assert [entry["pair"] for entry in whole["suspects"]] == [row["pair"] for row in ranked]
    assert len(whole["map"]["confidence"]) == len(whole["map"]["where"]) == PAIRS


@pytest.mark.parametrize(("loss", "kept"), [("aot", True), ("sft", False)])
def test_losses_that_sort_over_the_step_are_kept_too_and_those_without_rewards_leave_nothing(
        loss: str, kept: bool, tmp_path: Path, words: list[str]):
    dpo_dist(*words, f"loss={loss}", *([] if kept else ["loss.beta=null"]), "zero=none",
             f"run.dir={tmp_path / 'run'}")
    names = ("visits", "datamap.json", "suspects.jsonl")
    assert [(tmp_path / "run" / name).exists() for name in names] == [kept] * 3
    if kept:
        seen(tmp_path / "run")
