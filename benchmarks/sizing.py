"""Predicted against measured: memory a rank and step time of 12 runs, two processes on the CPU: sizing.py [SHAPE ...].

Each run is a process group of its own (sizing_run.py); a shape's results replace its earlier ones in
results/sizing.json; with a dash for the shape, only the predictions are made anew. glibc is told to give every
allocation over 64 KiB pages of its own (MALLOC_MMAP_THRESHOLD_), so that the resident set is what is alive: without it,
freed tensors below 32 MiB may stay. What the device does (matrix product, all-reduce, gather and scatter, AdamW,
ZeRO-3's hooks on a tiny model) is measured beside the runs, not fitted to them; the step times are predicted with the
medians over all runs. A rank's CPU seconds are kept beside the wall clock's: others may use the machine, and what they
take shows in the latter.
"""
from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from statistics import median

from dpo_dist.config.compose import compose
from dpo_dist.runtime.ports import free_port
from dpo_dist.sizing.estimate import memory
from dpo_dist.sizing.hardware import CPU, Hardware
from dpo_dist.sizing.lengths import Lengths
from dpo_dist.sizing.shape import model_shape
from dpo_dist.sizing.step_time import step_time

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "sizing.json"
PROMPT, COMPLETION, RANKS, STEPS = 256, 128, 2, 4
RUNS = ((0, False), (2, True), (3, False), (3, True))                 # (ZeRO stage, gradient checkpointing)
# 21, 48 and 96 million parameters; pairs of a step
SHAPES = {
    "S": ({"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8,
           "num_key_value_heads": 8, "vocab_size": 8192, "tie_word_embeddings": False}, 4),
    "M": ({"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 14, "num_attention_heads": 8,
           "num_key_value_heads": 2, "vocab_size": 16384, "tie_word_embeddings": True}, 4),
    "L": ({"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 7, "num_attention_heads": 16,
           "num_key_value_heads": 4, "vocab_size": 16384, "tie_word_embeddings": True}, 4),
}


def main(names: list[str]) -> None:
    shown = json.loads(RESULTS.read_text())["told"] if RESULTS.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_rows(folder / "rows.jsonl")
        for shape in (name for name in names if name in SHAPES):
            write_model(folder / shape, SHAPES[shape][0])
            for stage, checkpointing in RUNS:
                shown[f"{shape} {stage} {checkpointing}"] = measure(folder, shape, stage, checkpointing)
                RESULTS.write_text(json.dumps({"told": shown}, indent=1) + "\n")
    RESULTS.write_text(json.dumps({**compared(shown), "told": shown}, indent=1) + "\n")


def overrides(folder: Path, shape: str, stage: int, checkpointing: bool) -> list[str]:
    pairs = SHAPES[shape][1]
    return [f"model.path={folder / shape}", f"data.train=[{{path: {folder / 'rows.jsonl'}, format: token_ids}}]",
            "cluster.device=cpu", f"data.cache_dir={folder / 'tokens'}", "loss=simpo", f"zero.stage={stage}",
            f"model.gradient_checkpointing={str(checkpointing).lower()}", f"train.pairs_per_step={pairs}",
            f"train.tokens_per_microbatch={pairs // RANKS * (PROMPT + 2 * COMPLETION)}"]


def measure(folder: Path, shape: str, stage: int, checkpointing: bool) -> dict:
    """What rank 0 of a run told."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS), "--master-addr",
             "127.0.0.1", "--master-port", str(free_port()), str(HERE / "sizing_run.py"), str(STEPS),
             *overrides(folder, shape, stage, checkpointing)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MALLOC_MMAP_THRESHOLD_": "65536",
                   "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{shape} {stage} {checkpointing} failed:\n{done.stderr[-9000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compared(shown: dict[str, dict]) -> dict:
    """Prediction beside measurement for each run, the worst memory error, and the pairs of runs whose order in time is
    not as predicted."""
    keys = next(iter(shown.values()))["device"]
    device = {key: median([one["device"][key] for one in shown.values()]) for key in keys}
    world, lengths, runs = Hardware(1, RANKS, replace(CPU, **device)), Lengths(
        PROMPT, COMPLETION, COMPLETION, 64, "the benchmark's rows"), []
    for name, one in shown.items():
        of, stage, checkpointing = name.split()
        config = compose(overrides(Path("somewhere"), of, int(stage), checkpointing == "True"))
        shape = model_shape({"model_type": "llama", **SHAPES[of][0]})
        need, time = memory(config, shape, lengths, world), step_time(config, shape, lengths, world)
        runs.append({
            "shape": of, "parameters": one["parameters"], "zero": int(stage), "checkpointing": checkpointing == "True",
            "measured_mib": mib(one["peak"]), "predicted_mib": mib(need.peak),
            "memory_ratio": round(need.peak / one["peak"], 3),
            "measured_by_phase_mib": {k: mib(v) for k, v in one["peaks"].items()},
            "predicted_by_moment_mib": {k: mib(v) for k, v in need.moments.items()},
            "measured_seconds": round(min(one["seconds"][1:]), 2),                   # the first step allocates
            "measured_cpu_seconds": round(min(one["cpu_seconds"][1:]), 2), "predicted_seconds": round(time.seconds, 2)})
    return {"worst_memory_error": round(max(abs(run["memory_ratio"] - 1) for run in runs), 3), "device": device,
            "pairs_of_runs": len(runs) * (len(runs) - 1) // 2,
            "in_another_order_of_time": out_of_order(runs, "measured_seconds"),
            "in_another_order_of_cpu_time": out_of_order(runs, "measured_cpu_seconds"), "runs": runs}


def out_of_order(runs: list[dict], measured: str) -> list[list[str]]:
    """The pairs of runs whose measured order is not the predicted one."""
    def name(run: dict) -> str:
        return f"{run['shape']} zero{run['zero']}{' checkpointing' if run['checkpointing'] else ''}"

    return [[name(a), name(b)] for a, b in combinations(runs, 2)
            if (a[measured] - b[measured]) * (a["predicted_seconds"] - b["predicted_seconds"]) < 0]


def mib(value: float) -> int:
    return round(value / 2**20)


def write_model(folder: Path, shape: dict) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=2048, bos_token_id=2, eos_token_id=1,
                                 pad_token_id=0)).save_pretrained(folder)


def write_rows(path: Path) -> None:
    r = random.Random(0)
    lengths = {"prompt_ids": PROMPT, "chosen_ids": COMPLETION, "rejected_ids": COMPLETION}
    rows = [{key: [r.randrange(4, 8192) for _ in range(n)] for key, n in lengths.items()} for _ in range(64)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main(sys.argv[1:] or list(SHAPES))
