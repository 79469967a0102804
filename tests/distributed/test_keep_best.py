"""The best checkpoint is kept and exported (train.keep_best), and checkpoints may be saved by time."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import dpo_dist, eval_on, metrics, model_digest, train_on, write_rows, write_tiny_llama
from test_resume import killed_after

from dpo_dist.runtime.run_dir import RunDir

pytestmark = pytest.mark.distributed

STEPS = 6


@pytest.fixture
def words(tmp_path: Path, base: list[str]) -> list[str]:
    """A run whose held-out loss is best early on: it overfits."""
    write_tiny_llama(tmp_path / "m")
    write_rows(tmp_path / "rows.jsonl", 40)
    write_rows(tmp_path / "held_out.jsonl", 10, seed=1)
    return ["train", f"model.path={tmp_path / 'm'}", *base, train_on(tmp_path / "rows.jsonl"),
            eval_on(tmp_path / "held_out.jsonl"), "train.pairs_per_step=10", f"train.max_steps={STEPS}",
            "optim.lr=5e-3", "optim.schedule=constant", "optim.warmup_ratio=0", "loss.beta=0.5",
            "train.eval_every_steps=1", "train.keep_checkpoints=1", "zero.persistence_threshold=0"]


def checkpoints(run_dir: Path) -> list[str]:
    return [folder.name for folder in RunDir(run_dir).checkpoints()]


def best_step(run_dir: Path, metric: str) -> int:
    rows = [row for row in metrics(run_dir, "eval") if row["step"] > 0]
    return int(min(rows, key=lambda row: -row[metric] if metric != "loss" else row[metric])["step"])


def test_the_best_checkpoint_is_kept_and_exported_also_after_a_kill(tmp_path: Path, words: list[str]):
    two = [*words, "cluster.procs_per_node=2", "train.keep_best=rewards/accuracies"]
    done = dpo_dist(*two, f"run.dir={tmp_path / 'straight'}")
    best = best_step(tmp_path / "straight", "rewards/accuracies")
    rows = {row["step"]: row for row in metrics(tmp_path / "straight", "eval")}
    assert 1 < best < STEPS, "the last step is not the best"
    assert checkpoints(tmp_path / "straight") == [f"step-{best:06d}", f"step-{STEPS:06d}"]
    told = (f"exported: step {best} of {STEPS}, the best by held-out rewards/accuracies: "
            f"{rows[best]['rewards/accuracies']:.4f}")
    assert told in done.stdout and f" {rows[best]['loss']:.4f}" in done.stdout.partition("held-out pairs")[2]
    assert f"best      step-{best:06d}: held-out rewards/accuracies" in dpo_dist("status", tmp_path / "straight").stdout

    # the very weights of a run that ends there
    short = [word for word in words if not word.startswith("train.max_steps")]
    dpo_dist(*short, "cluster.procs_per_node=2", f"train.max_steps={best}", f"run.dir={tmp_path / 'short'}")
    assert model_digest(tmp_path / "straight") == model_digest(tmp_path / "short")

    # killed once a later step is saved: what was best before is known afterwards
    saving = [*two, "train.save_every_steps=1"]
    killed_after(best + 1, saving, tmp_path / "killed")
    assert f"step-{best:06d}" in checkpoints(tmp_path / "killed")
    assert told in dpo_dist(*saving, f"run.dir={tmp_path / 'killed'}").stdout
    assert model_digest(tmp_path / "killed") == model_digest(tmp_path / "straight")

    # the export on its own, by another number of ranks, whose checkpoint DeepSpeed has to convert
    shutil.rmtree(tmp_path / "killed" / "model")
    shown = dpo_dist("export", *words[1:], "cluster.procs_per_node=1", "train.keep_best=rewards/accuracies",
                     f"run.dir={tmp_path / 'killed'}").stdout
    assert f"(from step-{best:06d})" in shown
    assert model_digest(tmp_path / "killed") == model_digest(tmp_path / "straight")
    card = (tmp_path / "killed" / "model" / "README.md").read_text()
    assert f"| loss | {rows[best]['loss']:.4f} |" in card


def test_an_evaluation_whose_checkpoint_is_not_whole_is_not_the_best(tmp_path: Path, words: list[str]):
    words = [*[word for word in words if not word.startswith("zero.")], "zero=none", "train.keep_best=loss",
             "train.keep_checkpoints=9", "train.save_every_steps=1", f"run.dir={tmp_path / 'run'}"]
    dpo_dist(*words)
    best = best_step(tmp_path / "run", "loss")
    assert best < STEPS
    (RunDir(tmp_path / "run").checkpoint(best) / "COMPLETE").unlink()
    shutil.rmtree(tmp_path / "run" / "model")
    told = dpo_dist(*words).stdout
    second = min((row["loss"], row["step"]) for row in metrics(tmp_path / "run", "eval")[1:] if row["step"] != best)[1]
    assert f"exported: step {second} of {STEPS}" in told


def test_checkpoints_by_time_are_saved_at_the_end_of_a_step_by_all_ranks_together(tmp_path: Path, words: list[str]):
    two = [*words, "cluster.procs_per_node=2", "train.keep_checkpoints=9"]
    dpo_dist(*two, "train.save_every_minutes=60", f"run.dir={tmp_path / 'seldom'}")
    assert checkpoints(tmp_path / "seldom") == [f"step-{STEPS:06d}"]
    often = [*two, "train.save_every_minutes=1e-6"]
    killed_after(2, often, tmp_path / "often")
    assert "resumed from step-" in dpo_dist(*often, f"run.dir={tmp_path / 'often'}").stdout
    assert checkpoints(tmp_path / "often") == [f"step-{step:06d}" for step in range(1, STEPS + 1)]
    assert model_digest(tmp_path / "often") == model_digest(tmp_path / "seldom")
    assert json.loads((tmp_path / "often" / "run.json").read_text())["identity_of"] == json.loads(
        (tmp_path / "seldom" / "run.json").read_text())["identity_of"]
