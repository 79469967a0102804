"""A run goes on with another number of ranks and under another ZeRO stage: the same pairs in the same order, the same
losses to rounding."""
from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import dpo_dist, eval_on, metrics, train_on, write_rows, write_tiny_llama

pytestmark = pytest.mark.distributed

STEPS, SAVED = 8, 4
LORA = ["model.lora.rank=4", "optim.lr=1e-2"]
SHARDED = "zero.persistence_threshold=0"


def words(folder: Path, base: list[str], *more: str) -> list[str]:
    write_tiny_llama(folder / "m", hidden_size=64, intermediate_size=128)
    write_rows(folder / "rows.jsonl", 100, longest=80)
    write_rows(folder / "held_out.jsonl", 10, seed=1)
    return ["train", f"model.path={folder / 'm'}", *base, train_on(folder / "rows.jsonl"),
            eval_on(folder / "held_out.jsonl"), "train.pairs_per_step=24", f"train.max_steps={STEPS}",
            f"train.save_every_steps={SAVED}", "optim.lr=1e-3", "loss.beta=0.5", "optim.weight_decay=0.1",
            "train.tokens_per_microbatch=600", *more]


def as_killed(finished: Path, run_dir: Path) -> None:
    """A copy of a finished run as it would be, had it been killed in the middle."""
    shutil.copytree(finished, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / f"step-{STEPS:06d}")
    shutil.rmtree(run_dir / "model")
    (run_dir / "DONE").unlink()


@pytest.mark.parametrize(("more", "before", "afterwards"), [
    ([], ["zero=zero3", "cluster.procs_per_node=2", SHARDED],
     [["zero=zero2", "cluster.procs_per_node=1"], ["zero=none", "cluster.procs_per_node=1"],
      ["zero=zero3", "cluster.procs_per_node=3"]]),
    ([], ["zero=zero2", "cluster.procs_per_node=2"],
     [["zero=zero3", "cluster.procs_per_node=1"], ["zero.stage=0", "cluster.procs_per_node=2"]]),
    ([], ["zero.stage=0", "cluster.procs_per_node=2"], [["zero=zero3", "cluster.procs_per_node=2"]]),
    (["model.dtype=bf16"], ["zero=zero1", "cluster.procs_per_node=2"], [["zero=none", "cluster.procs_per_node=1"]]),
    (LORA, ["zero=zero3", "cluster.procs_per_node=2"], [["zero=zero2", "cluster.procs_per_node=1"]]),
    (["optim=muon", "optim.lr=1e-3"], ["zero=zero3", "cluster.procs_per_node=2"],
     [["zero=none", "cluster.procs_per_node=1"]]),
    (["reference.sync.mode=soft", "reference.sync.every_steps=1", "reference.sync.alpha=0.5", "reference.mode=live"],
     ["zero=zero3", "cluster.procs_per_node=2", "reference=zero"], [["zero=zero3", "cluster.procs_per_node=1"]]),
], ids=["zero3", "zero2", "zero0", "bf16", "lora", "muon", "moving-reference"])
def test_a_run_goes_on_under_another_stage_and_with_other_ranks_to_rounding(
        more: list[str], before: list[str], afterwards: list[list[str]], tmp_path: Path, base: list[str]):
    command = words(tmp_path, base, *more)
    dpo_dist(*command, *before, f"run.dir={tmp_path / 'straight'}")
    for number, layout in enumerate(afterwards):
        run_dir = tmp_path / f"other-{number}"
        as_killed(tmp_path / "straight", run_dir)
        reference = [word for word in before if word.startswith("reference=")]
        assert f"resumed from step-{SAVED:06d}" in dpo_dist(*command, *layout, *reference, f"run.dir={run_dir}").stdout
        # what is computed in bf16 (all of the model, or Muon's orthogonal updates) is rounded more coarsely
        near = 3e-2 if "model.dtype=bf16" in more else 1e-4 if "optim=muon" in more else 1e-6
        for split in ("train", "eval"):
            straight, other = metrics(tmp_path / "straight", split), metrics(run_dir, split)
            assert [row["step"] for row in other] == [row["step"] for row in straight]
            assert [row["loss"] for row in other] == pytest.approx([row["loss"] for row in straight], rel=0,
                                                                   abs=near), layout
