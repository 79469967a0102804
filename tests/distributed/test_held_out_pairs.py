"""What an evaluation keeps of each held-out pair is the same on any number of ranks, and its means are the logged
ones."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import dpo_dist, eval_on, metrics, train_on, write_rows, write_tiny_llama

from dpo_dist.evaluation.pairs import EvaluatedPairs, hits
from dpo_dist.evaluation.results import read_summaries
from dpo_dist.runtime.run_dir import RunDir

pytestmark = pytest.mark.distributed
LOGGED = {"loss": "loss", "rewards/chosen": "reward_chosen", "rewards/rejected": "reward_rejected",
          "logps/chosen": "policy_chosen", "logps/rejected": "policy_rejected"}


@pytest.fixture
def words(tmp_path: Path, base: list[str]) -> list[str]:
    write_tiny_llama(tmp_path / "m")
    write_rows(tmp_path / "rows.jsonl", 20)
    write_rows(tmp_path / "held_out.jsonl", 41, seed=1)
    return [f"model.path={tmp_path / 'm'}", *base, train_on(tmp_path / "rows.jsonl"),
            eval_on(tmp_path / "held_out.jsonl"), "train.pairs_per_step=10", "train.max_steps=2", "optim.lr=1e-2",
            "loss.beta=0.5"]


def evaluation(run_dir: Path, step: int) -> EvaluatedPairs:
    """As kept; its means are those that were logged."""
    found, summary = (EvaluatedPairs.read(RunDir(run_dir).evaluation(step)),
                      {one["step"]: one for one in read_summaries(RunDir(run_dir))}[step])
    row = {row["step"]: row for row in metrics(run_dir, "eval")}[step]
    for metric, column in LOGGED.items():
        assert np.average(getattr(found, column), weights=found.weight) == pytest.approx(row[metric], abs=1e-12)
    assert summary["accuracy"]["value"] == pytest.approx(row["rewards/accuracies"], abs=1e-12)
    assert summary["accuracy"]["value"] == pytest.approx(hits(found.margin).mean(), abs=1e-12)
    assert summary["displacement"]["chosen_per_token"] == pytest.approx(row["reference/chosen_drift_per_token"])
    assert found.pair.tolist() == list(range(41))
    return found


@pytest.mark.parametrize("loss", ["dpo", "aot"])
def test_pairs_are_kept_in_order_on_one_rank_and_two_and_their_means_are_the_logged_ones(tmp_path: Path, loss: str,
                                                                                        words: list[str]):
    for ranks in (1, 2):
        dpo_dist("train", *words, f"loss={loss}", f"cluster.procs_per_node={ranks}", f"run.dir={tmp_path / str(ranks)}")
    for step in (0, 2):
        one, two = (evaluation(tmp_path / ranks, step) for ranks in ("1", "2"))
        for name, value in vars(one).items():
            assert np.allclose(value, getattr(two, name), rtol=1e-5, atol=1e-4), name


def test_eval_keeps_them_too_and_leaves_those_of_a_training_run_alone(tmp_path: Path, words: list[str]):
    run_dir = tmp_path / "run"
    told = dpo_dist("train", *words, "zero=none", f"run.dir={run_dir}").stdout
    assert "accuracy 0." in told and "beside: the longer answer" in told
    kept = {path: path.read_bytes() for path in (RunDir(run_dir).evaluation_json, RunDir(run_dir).evaluation(2))}
    told = dpo_dist("eval", *words[1:], "zero=none", f"model.path={run_dir / 'model'}", f"run.dir={run_dir}",
                    f"reference.path={tmp_path / 'm'}").stdout
    assert "accuracy 0." in told
    assert all(path.read_bytes() == before for path, before in kept.items())
    again, trained = (EvaluatedPairs.read(RunDir(folder).evaluation(step))
                      for folder, step in ((run_dir / "eval", 0), (run_dir, 2)))
    assert np.allclose(again.margin, trained.margin, atol=1e-4)
