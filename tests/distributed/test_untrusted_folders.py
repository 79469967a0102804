"""Whole runs beside what tries to run code, and beside secrets in the environment."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO, forked, train_on, write_rows
from untrusted import write_pickle, write_untrusted

pytestmark = pytest.mark.distributed

SECRETS = {name: f"{name.lower()}-Geheim5wort" for name in (
    "WANDB_API_KEY", "HF_TOKEN", "DPO_DIST_JUDGE_TOKEN", "VLLM_API_KEY", "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN")}


def test_a_model_with_code_of_its_own_is_refused_though_standard_input_says_yes(tmp_path: Path, base: list[str]):
    canary = tmp_path / "canary"
    write_untrusted(tmp_path / "m", canary, named_in=("config.json", "tokenizer_config.json"))
    write_rows(tmp_path / "rows.jsonl", 8)
    with subprocess.Popen(["yes", "y"], stdout=subprocess.PIPE) as yes:
        done = subprocess.run([sys.executable, "-m", "dpo_dist.launcher.cli", "run", f"model.path={tmp_path / 'm'}",
                               train_on(tmp_path / "rows.jsonl"), *base, f"run.dir={tmp_path / 'run'}"],
                              stdin=yes.stdout, capture_output=True, text=True, cwd=REPO, timeout=120)
        yes.kill()
    assert done.returncode == 2 and "which is never run" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not canary.exists()


def test_nothing_runs_code_beside_a_model_and_no_secret_of_the_environment_is_written(tmp_path: Path, base: list[str]):
    canary, run_dir = tmp_path / "canary", tmp_path / "run"
    write_untrusted(tmp_path / "m", canary, "llama", ("config.json", "generation_config.json"))
    write_rows(tmp_path / "rows.jsonl", 8)
    words = [f"model.path={tmp_path / 'm'}", train_on(tmp_path / "rows.jsonl"), *base, "zero=none",
             "data.eval_fraction=0.3", "train.max_steps=2", "train.save_every_steps=1", "train.pairs_per_step=2",
             "eval.samples=2", "eval.max_new_tokens=4", "tracking=wandb", "tracking.mode=offline", f"run.dir={run_dir}"]
    process = forked("dpo_dist.launcher.cli", "run", *words, **SECRETS)
    out, err = process.communicate(180)
    assert process.wait() == 0, out + err
    assert not canary.exists() and run_dir.stat().st_mode & 0o777 == 0o700
    for file in (file for file in run_dir.rglob("*") if file.is_file()):
        content = file.read_bytes()
        assert not [name for name, secret in SECRETS.items() if secret.encode() in content], file
    assert not any(secret in out + err for secret in SECRETS.values())

    (run_dir / "DONE").unlink()                              # a checkpoint in which pickles lie runs none of them
    for folder in (run_dir / "checkpoints").iterdir():
        for name in ("optimizer.pt", "mp_rank_00_model_states.pt", "rank-0.bin"):
            write_pickle(folder / name, canary)
    again = forked("dpo_dist.launcher.cli", "run", *words)
    told = "".join(again.communicate(180))
    assert not canary.exists(), told
