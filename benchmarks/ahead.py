"""Time to the first optimizer step when the reference is scored first (cached) and while training runs (ahead).

    python benchmarks/ahead.py [PAIRS]        → benchmarks/results/ahead.json; two runs through the real command, on the
    CPU
"""
from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
LONGEST = 96                                       # tokens of a prompt or a completion


def main(pairs: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=512, hidden_size=128, intermediate_size=512, num_hidden_layers=4,
                                     num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)
                         ).save_pretrained(home / "model")
        write_rows(home / "rows.jsonl", pairs, seed=0)
        write_rows(home / "held_out.jsonl", 32, seed=1)
        found = {mode: run(home, mode) for mode in ("cached", "ahead")}
    result = {"pairs": pairs, "cpus": os.cpu_count(), **found,
              "same_weights": found["cached"]["weights"] == found["ahead"]["weights"]}
    (HERE / "results" / "ahead.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def write_rows(path: Path, n: int, seed: int) -> None:
    r = random.Random(seed)

    def ids() -> list[int]:
        return [r.randrange(3, 512) for _ in range(r.randint(LONGEST // 2, LONGEST))]

    path.write_text("".join(json.dumps({"prompt_ids": ids(), "chosen_ids": ids(), "rejected_ids": ids()}) + "\n"
                            for _ in range(n)))


def run(home: Path, mode: str) -> dict[str, float | str]:
    """Seconds from the command's start, and from the engine's first answer, to the first optimizer step; and to the
    end."""
    where, cache = home / mode, home / f"cache-{mode}"
    words = ["run", f"model.path={home / 'model'}", f"data.train=[{{path: {home / 'rows.jsonl'}, format: token_ids}}]",
             f"data.eval=[{{path: {home / 'held_out.jsonl'}, format: token_ids}}]", "model.dtype=fp32",
             "cluster.device=cpu", "cluster.procs_per_node=1", "zero=none", "train.pairs_per_step=16",
             "data.max_length=512", f"data.cache_dir={home / 'tokens'}", f"reference.cache_dir={cache}",
             f"reference.mode={mode}", f"run.dir={where}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "dpo_dist.launcher.cli", *words], env=environment,
                               stdout=subprocess.PIPE, text=True)
    answer = step = 0.0
    while process.poll() is None:
        answer = answer or (time.monotonic() if any(cache.rglob("*.safetensors")) else 0.0)
        metrics = where / "metrics.jsonl"
        step = step or (time.monotonic() if metrics.exists() and '"split": "train"' in metrics.read_text() else 0.0)
        time.sleep(0.05)
    assert process.returncode == 0 and process.stdout is not None, f"{mode}: exit code {process.returncode}"
    waited = [line for line in process.stdout.read().splitlines() if line.startswith("reference: scored while")]
    weights = hashlib.sha256((where / "model" / "model.safetensors").read_bytes()).hexdigest()
    return {"start_to_first_step_seconds": round(step - began, 1),
            "first_answer_to_first_step_seconds": round(step - answer, 1),
            "start_to_end_seconds": round(time.monotonic() - began, 1), "weights": weights,
            **({"said": waited[0]} if waited else {})}


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
