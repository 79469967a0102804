"""ZeRO's options change where things are and how they travel, not what is trained. Each test is the real command, truly
sharded."""
from __future__ import annotations

from pathlib import Path

import pytest
from conftest import dpo_dist, metrics, train_on, write_rows, write_tiny_llama

pytestmark = pytest.mark.distributed

TWO, SHARDED = "cluster.procs_per_node=2", "zero.persistence_threshold=0"


@pytest.fixture
def words(tmp_path: Path, base: list[str]) -> list[str]:
    write_tiny_llama(tmp_path / "m")
    write_rows(tmp_path / "rows.jsonl", 30)
    return ["train", f"model.path={tmp_path / 'm'}", *base, train_on(tmp_path / "rows.jsonl"),
            "train.pairs_per_step=10", "train.max_steps=4", "optim.lr=1e-3", "loss.beta=0.5",
            "train.tokens_per_microbatch=200"]


def losses(words: list[str], run_dir: Path, *more: str) -> list[float]:
    dpo_dist(*words, *more, f"run.dir={run_dir}")
    return [row["loss"] for row in metrics(run_dir)]


def test_a_second_copy_of_the_weights_near_by_changes_no_loss(tmp_path: Path, words: list[str]):
    plain = losses(words, tmp_path / "plain", TWO, SHARDED)
    hpz = losses(words, tmp_path / "hpz", TWO, SHARDED, "zero.secondary_partition=2")
    assert hpz == pytest.approx(plain, rel=0, abs=1e-6) and plain[-1] < plain[0] - 1e-3


def test_bf16_trains_alike_in_every_stage_and_without_deepspeed(tmp_path: Path, words: list[str]):
    """Forward and backward round alike; what differs is when gradients of two ranks are rounded and added."""
    bf16 = [*words, "model.dtype=bf16"]
    one = losses(bf16, tmp_path / "none", "zero=none")
    assert one[-1] < one[0] - 0.05
    for stage in ("zero1", "zero2", "zero3"):
        assert losses(bf16, tmp_path / stage, TWO, f"zero={stage}") == pytest.approx(one, rel=0, abs=1e-2), stage


def test_gradients_that_travel_in_fp32_are_not_rounded_on_the_way(tmp_path: Path, words: list[str]):
    """With one pack a rank the gradient is rounded once, by backward; a second rounding shows in the norm."""
    for stage in ("zero2", "zero3"):
        norms = {}
        for dtype in ("auto", "fp32"):
            losses([*words, "model.dtype=bf16"], tmp_path / f"{stage}-{dtype}", TWO, f"zero={stage}",
                   f"zero.reduce_dtype={dtype}")
            norms[dtype] = [row["grad_norm"] for row in metrics(tmp_path / f"{stage}-{dtype}")]
        assert norms["fp32"] == pytest.approx(norms["auto"], rel=0.02)
        assert norms["fp32"] != norms["auto"], stage


def test_the_lowest_stage_that_fits_is_chosen_and_a_run_that_goes_on_keeps_its_own(tmp_path: Path, words: list[str]):
    chosen = dpo_dist(*words, TWO, "zero=auto", f"run.dir={tmp_path / 'auto'}")
    assert "zero.stage=0, model.gradient_checkpointing=false" in chosen.stdout
    dpo_dist(*words, TWO, "zero=zero2", "train.save_every_steps=2", "train.max_steps=2", f"run.dir={tmp_path / 'kept'}")
    again = dpo_dist(*words, TWO, "zero=auto", "train.max_steps=2", f"run.dir={tmp_path / 'kept'}")
    assert "nothing to do" in again.stdout and "zero.stage=2" in again.stdout
