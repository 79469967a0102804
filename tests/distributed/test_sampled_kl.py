"""KL to the reference from samples: what plain transformers says of the same answers, however the reference is held."""
from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import dpo_dist, eval_on, train_on, write_rows, write_tiny_llama
from transformers import AutoModelForCausalLM

from dpo_dist.evaluation.results import read_summaries
from dpo_dist.runtime.run_dir import RunDir

pytestmark = pytest.mark.distributed
TEMPERATURE = 1.5


@pytest.fixture
def words(tmp_path: Path, base: list[str]) -> list[str]:
    write_tiny_llama(tmp_path / "m")
    write_tiny_llama(tmp_path / "other", seed=1)
    write_rows(tmp_path / "held_out.jsonl", 9, seed=1)
    return [f"model.path={tmp_path / 'm'}", *base, eval_on(tmp_path / "held_out.jsonl"), "eval.samples=7",
            "eval.max_new_tokens=8", f"eval.temperature={TEMPERATURE}"]


def plain(model: Path, row: dict[str, object]) -> float:
    """log p of the sampled answer at the temperature, by the model's own forward."""
    lm = AutoModelForCausalLM.from_pretrained(model).eval()
    answer = [*row["completion"], *([1] if row["ended"] else [])]
    with torch.no_grad():
        logits = lm(torch.tensor([[*row["prompt"], *answer]])).logits[0, -len(answer) - 1:-1]
    return float((logits / TEMPERATURE).log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).double().sum())


@pytest.mark.parametrize("how", [["zero=none"], ["zero=none", "reference.mode=live"],
                                 ["reference=zero", "reference.mode=live", "cluster.procs_per_node=2"],
                                 ["reference=zero", "cluster.procs_per_node=2", "train.tokens_per_microbatch=80"]],
                         ids=["opened", "live", "sharded", "opened-sharded"])
def test_eval_gives_the_kl_that_plain_transformers_gives_of_the_same_answers(tmp_path: Path, words: list[str],
                                                                           how: list[str]):
    told = dpo_dist("eval", *words, f"reference.path={tmp_path / 'other'}", *how, f"run.dir={tmp_path / 'run'}").stdout
    run_dir = RunDir(tmp_path / "run")
    rows = [json.loads(line) for line in run_dir.samples.read_text().splitlines()]
    differences = [plain(tmp_path / "m", row) - plain(tmp_path / "other", row) for row in rows]
    found = read_summaries(run_dir)[0]["kl"]
    assert found["per_answer"]["value"] == pytest.approx(np.mean(differences), abs=1e-4)
    assert found["per_answer"]["standard_error"] == pytest.approx(np.std(differences, ddof=1) / math.sqrt(7), abs=1e-4)
    assert found["per_token"] == pytest.approx(sum(differences) / sum(row["tokens"] for row in rows), abs=1e-4)
    assert (found["answers"], found["temperature"]) == (7, TEMPERATURE)
    assert found["per_answer"]["low"] < found["per_answer"]["value"] < found["per_answer"]["high"]
    assert "nats an answer, from 7 samples" in told


def test_training_measures_it_where_the_reference_is_the_policy_without_its_adapter(tmp_path: Path, words: list[str]):
    write_rows(tmp_path / "rows.jsonl", 20)
    dpo_dist("train", *words, train_on(tmp_path / "rows.jsonl"), "zero=none", "reference=adapter_off",
             "model.lora.rank=4", "train.max_steps=3", "train.pairs_per_step=10", "optim.lr=5e-2",
             f"run.dir={tmp_path / 'run'}")
    before, after = (one["kl"] for one in read_summaries(RunDir(tmp_path / "run")))
    assert before["per_answer"]["value"] == 0 and before["per_token"] == 0
    rows = [json.loads(line) for line in RunDir(tmp_path / "run").samples.read_text().splitlines()][7:]
    differences = [plain(tmp_path / "run" / "model", row) - plain(tmp_path / "m", row) for row in rows]
    assert after["per_answer"]["value"] == pytest.approx(np.mean(differences), abs=1e-3)


def test_the_likeliest_answers_are_no_samples(tmp_path: Path, words: list[str]):
    dpo_dist("eval", *words, "eval.temperature=0", "zero=none", "reference.mode=live", f"run.dir={tmp_path / 'run'}")
    assert read_summaries(RunDir(tmp_path / "run"))[0]["kl"] is None
