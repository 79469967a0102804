"""Five AdamW steps through the real command match the golden trajectories: one process or several, whatever the
packing."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import GOLDEN, dpo_dist, metrics, train_on

pytestmark = pytest.mark.distributed

TRAJECTORIES = json.loads((GOLDEN / "golden.json").read_text())["train"]
LOSSES = {"bs8": [], "bs8_ipo": ["loss=ipo"], "bs8_sft_mpo": ["loss=rpo", "loss.beta=0.1"]}
# models as small as these have no parameter that would be sharded otherwise
SHARDED = ["zero.persistence_threshold=0"]
WORLDS = {
    "plain torch": ["zero=none"],
    "1 process, ZeRO-3": ["cluster.procs_per_node=1", *SHARDED],
    "2 processes, ZeRO-3": ["cluster.procs_per_node=2", *SHARDED],
    "2 processes, ZeRO-3, small packs": ["cluster.procs_per_node=2", "train.tokens_per_microbatch=170", *SHARDED],
    "3 processes, ZeRO-2, a pair a pack": ["cluster.procs_per_node=3", "zero=zero2", "train.tokens_per_microbatch=164"],
    "2 processes, ZeRO-1, live reference": ["cluster.procs_per_node=2", "zero=zero1", "reference.mode=live"],
    "2 processes, ZeRO-3, live sharded reference": ["cluster.procs_per_node=2", "reference=zero", "reference.mode=live",
                                                    *SHARDED],
    "2 processes, ZeRO-0, padded rows": ["cluster.procs_per_node=2", "zero=zero0", "model.attention=padded"],
    "2 processes, ZeRO-3, gradient checkpointing": ["cluster.procs_per_node=2", "model.gradient_checkpointing=true",
                                                    *SHARDED],
    "2 processes, ZeRO-3, cheap parts recomputed": ["cluster.procs_per_node=2", "model.gradient_checkpointing=0",
                                                    *SHARDED],
    "2 processes, ZeRO-3, all in CPU memory": ["cluster.procs_per_node=2", "zero.offload_optimizer=cpu",
                                               "zero.offload_parameters=cpu", *SHARDED],
}


def run(name: str, world: list[str], run_dir: Path, base: list[str]) -> list[dict[str, float]]:
    models = [f"model.path={GOLDEN / 'policy'}", f"reference.path={GOLDEN / 'ref'}"]
    dpo_dist("train", *models, train_on(GOLDEN / "rows.json"), *base, *LOSSES[name], *world, "train.pairs_per_step=8",
             "train.max_steps=5", "optim.lr=1e-4", "optim.schedule=constant", "optim.warmup_ratio=0",
             "optim.max_grad_norm=null", f"run.dir={run_dir}")
    return metrics(run_dir)


def check(name: str, rows: list[dict[str, float]]) -> None:
    wanted = TRAJECTORIES[name]["log"]
    assert len(rows) == len(wanted) == 5
    for row, golden in zip(rows, wanted, strict=True):
        assert row["loss"] == pytest.approx(golden["loss"], rel=2e-5)
        assert row["grad_norm"] == pytest.approx(golden["grad_norm"], rel=1e-4)
        assert row["rewards/margins"] == pytest.approx(golden["rewards/margins"], abs=2e-5)
        assert row["logps/chosen"] == pytest.approx(golden["logps/chosen"], rel=2e-6)
        assert row["logps/rejected"] == pytest.approx(golden["logps/rejected"], rel=2e-6)


@pytest.mark.parametrize("world", WORLDS)
def test_the_dpo_trajectory_is_the_golden_one(world: str, tmp_path: Path, base: list[str]):
    check("bs8", run("bs8", WORLDS[world], tmp_path / "run", base))


@pytest.mark.parametrize("name", ["bs8_ipo", "bs8_sft_mpo"])
def test_other_losses_follow_their_golden_trajectory_on_two_ranks_with_small_packs(
        name: str, tmp_path: Path, base: list[str]):
    check(name, run(name, WORLDS["2 processes, ZeRO-3, small packs"], tmp_path / "run", base))
