"""Every optimizer, sharded or not, is its library's own; a run says which it was."""
from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import BITSANDBYTES, dpo_dist, forked_ranks, packages_of, train_on, write_rows, write_tiny_llama

pytestmark = pytest.mark.distributed

PROGRAM = Path(__file__).with_name("optimizers_side_by_side.py")
FP32, BF16 = "model.dtype=fp32", "model.dtype=bf16"
SHARDED = "zero=zero3 zero.persistence_threshold=0"
CASES = {
    "muon": [f"{FP32} zero=zero0", f"{FP32} zero=zero2", f"{FP32} {SHARDED}", f"{BF16} zero=zero1",
             f"{BF16} {SHARDED}"],
    "adamw_8bit": [f"{FP32} zero=zero1", f"{FP32} zero=zero2", f"{FP32} {SHARDED}"],
    "cpu_adam": [f"{FP32} zero=zero2 zero.offload_optimizer=cpu", f"{FP32} {SHARDED} zero.offload_optimizer=cpu"],
}
ALONE = {"muon": [f"{FP32} zero=none", f"{BF16} zero=none"], "adamw_8bit": [f"{FP32} zero=none"]}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Its layers' matrices are no multiples of each other, and some are large enough for moments of 8 bits."""
    return write_tiny_llama(tmp_path / "m", hidden_size=64, intermediate_size=120)


@pytest.mark.parametrize("name", CASES)
def test_an_optimizer_is_its_librarys_own_skips_what_is_unsound_and_resumes_to_the_same_bits(
        name: str, tmp_path: Path, model: Path):
    if name == "cpu_adam":
        from dpo_dist.policy.optimizers.cpu_adam import compiled, kernel_folder

        if not compiled(kernel_folder()).exists():
            pytest.skip("the kernel is not compiled here: python -m dpo_dist.policy.optimizers.cpu_adam")
    for ranks, cases in ((2, CASES[name]), (1, ALONE.get(name, []))):
        scratch = tmp_path / f"{ranks} ranks"
        scratch.mkdir()
        with packages_of(*([BITSANDBYTES] if name == "adamw_8bit" else [])):
            shown = forked_ranks(ranks, PROGRAM, model, scratch, *(f"{name} {case}" for case in cases)) if cases else ""
        assert shown.count(" ok") == len(cases)


def test_a_run_tells_its_optimizer_and_one_whose_state_cannot_be_cut_anew_keeps_its_ranks(
        tmp_path: Path, model: Path, base: list[str]):
    write_rows(tmp_path / "rows.jsonl", 12)
    words = ["train", f"model.path={model}", *base, train_on(tmp_path / "rows.jsonl"), "train.pairs_per_step=6",
             "train.max_steps=1", "optim=adamw_8bit", f"run.dir={tmp_path / 'run'}", "zero=zero2"]
    with packages_of(BITSANDBYTES):
        dpo_dist(*words, "cluster.procs_per_node=2")
        assert "8-bit AdamW" in (tmp_path / "run" / "model" / "README.md").read_text()
        shutil.rmtree(tmp_path / "run" / "model")
        shown = dpo_dist(*words, code=2).stderr
    assert "was written by 2 ranks with zero.stage=2 and optim.name=adamw_8bit" in shown
    assert "start as many with the same stage" in shown
