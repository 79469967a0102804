"""The demo learns its rule, and a real preference set goes the whole way."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO, dpo_dist, metrics

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SHARED = Path(os.environ.get("DPO_DIST_SHARED", REPO.parent / "shared")) / "data"


def test_the_demo_reaches_its_accuracy_and_more_sampled_answers_obey_the_rule(tmp_path: Path):
    done = subprocess.run([sys.executable, "-m", "dpo_dist.demo", str(tmp_path / "demo")], cwd=REPO,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "demo" / "result.json").read_text())
    assert result["accuracy"] >= 0.95
    assert result["obey_after"] >= result["obey_before"] + 0.15
    assert "before and after DPO" in done.stdout and "On your own data" in done.stdout


def test_a_real_chat_set_is_scored_trained_evaluated_exported_and_loaded_back(tmp_path: Path, base: list[str]):
    if not (SHARED / "dpo_en_demo.json").is_file():
        pytest.skip(f"{SHARED} is missing; set DPO_DIST_SHARED to the folder above it")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dpo_dist.demo import write_model

    sample = tmp_path / "rows.json"
    sample.write_text(json.dumps(json.loads((SHARED / "dpo_en_demo.json").read_text())[:24]))
    write_model(tmp_path / "m", json.dumps({"a": "Hello there, how are you?"}))
    base = [word for word in base if not word.startswith(("data.max_length", "cluster.procs_per_node"))]
    done = dpo_dist("run", f"model.path={tmp_path / 'm'}", *base, f"data.train=[{{path: {sample}}}]",
                    "data.eval_fraction=0.3", "data.max_length=256", "data.truncation=keep_start",
                    "cluster.procs_per_node=2", "train.pairs_per_step=4", "train.max_steps=2", "optim.lr=1e-4",
                    f"run.dir={tmp_path / 'run'}")
    assert "rows.json (sharegpt): 24 rows read" in done.stdout
    assert "truncated" in done.stdout
    assert "scored" in done.stdout
    assert [row["step"] for row in metrics(tmp_path / "run", "eval")] == [0, 2]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    chat = [{"role": "user", "content": "Hello"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert model(**ids).logits.shape[-1] == len(tokenizer)
