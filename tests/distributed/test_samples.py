"""eval.samples: held-out prompts are answered during training, and nothing else changes."""
from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import dpo_dist, eval_on, forked_ranks, metrics, model_digest, train_on, write_rows, write_tiny_llama

pytestmark = pytest.mark.distributed


@pytest.fixture
def words(tmp_path: Path, base: list[str]) -> list[str]:
    write_tiny_llama(tmp_path / "m")
    write_rows(tmp_path / "rows.jsonl", 20)
    write_rows(tmp_path / "held_out.jsonl", 7, seed=1)
    return ["train", f"model.path={tmp_path / 'm'}", *base, train_on(tmp_path / "rows.jsonl"),
            eval_on(tmp_path / "held_out.jsonl"), "train.pairs_per_step=10", "train.max_steps=4", "optim.lr=1e-2",
            "loss.beta=0.5", "train.eval_every_steps=2", "train.save_every_steps=2"]


def samples(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("ranks, kinds", [(1, 5), (2, 3)])
def test_what_is_generated_amid_training_is_what_the_exported_model_generates_and_training_does_not_notice(
        tmp_path: Path, ranks: int, kinds: int):
    shown = forked_ranks(ranks, Path(__file__).with_name("generating_side_by_side.py"), tmp_path)
    counts = [tuple(map(int, found)) for found in re.findall(r" ok, (\d+) ended, (\d+) did not", shown)]
    assert len(counts) == kinds and sum(ended for ended, _ in counts) > 5 and sum(open for _, open in counts) > 5


def test_a_run_keeps_the_answers_of_each_evaluation_once_over_a_kill_and_trains_the_same(tmp_path: Path,
                                                                                      words: list[str]):
    sampling = ["eval.samples=3", "eval.max_new_tokens=6"]
    dpo_dist(*words, "cluster.procs_per_node=2", f"run.dir={tmp_path / 'without'}")
    done = dpo_dist(*words, *sampling, "cluster.procs_per_node=2", f"run.dir={tmp_path / 'run'}")
    assert model_digest(tmp_path / "run") == model_digest(tmp_path / "without")
    assert metrics(tmp_path / "run", "eval") == metrics(tmp_path / "without", "eval")
    assert not (tmp_path / "without" / "samples.jsonl").exists()
    rows = samples(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 0, 0, 2, 2, 2, 4, 4, 4]
    assert all(row["prompt"] == rows[i % 3]["prompt"] for i, row in enumerate(rows)), "the same prompts each time"
    assert rows[:3] != [{**row, "step": 0} for row in rows[6:]], "the policy has moved"
    for row in rows:
        assert row["ended"] or row["tokens"] == 6
    table = done.stdout.partition("answers to held-out prompts")[2]
    assert str(rows[0]["completion"])[:9] in table and str(rows[6]["completion"])[:9] in table

    # killed after the answers of step 4 were written, but not its means; and the export is lost with it
    run_dir = tmp_path / "run"
    kept = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert json.loads(kept[-1])["split"] == "eval"
    (run_dir / "metrics.jsonl").write_text("".join(kept[:-1]))
    (run_dir / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "pro')
    (run_dir / "model" / "model.safetensors").rename(run_dir / "gone")
    (run_dir / "model").rename(run_dir / "old")
    dpo_dist(*words, *sampling, "cluster.procs_per_node=2", f"run.dir={run_dir}")
    assert samples(run_dir) == rows


def test_eval_answers_the_same_prompts_as_training_does_and_chats_are_shown_as_text(tmp_path: Path, base: list[str]):
    from dpo_dist.demo import write_inputs

    write_inputs(tmp_path)
    words = [f"model.path={tmp_path / 'base'}", *base, f"data.train={tmp_path / 'pairs.jsonl'}",
             f"data.eval={tmp_path / 'held_out.jsonl'}", "zero=none", "eval.samples=2", "eval.max_new_tokens=5"]
    dpo_dist("train", *words, "train.max_steps=1", "train.pairs_per_step=8", f"run.dir={tmp_path / 'run'}")
    dpo_dist("eval", *words, f"run.dir={tmp_path / 'eval'}")
    assert samples(tmp_path / "eval") == samples(tmp_path / "run")[:2]
    for row in samples(tmp_path / "eval"):
        assert str(row["prompt"]).startswith("<|im_start|>user\n") and isinstance(row["completion"], str)
