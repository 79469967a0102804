"""A loss curve and the bytes of state for every optimizer: python benchmarks/optimizers.py [OUT_FOLDER].

The demo's model (dpo_dist/demo.py), supervised once with AdamW, then aligned with each optimizer on the same pairs in
the same order, at AdamW's learning rate, and Muon at five times that too; fp32, CPU, one process. State is counted in
the last checkpoint's files.
Results go to benchmarks/results/optimizers.json.
"""
from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

from dpo_dist.demo import write_inputs
from dpo_dist.launcher.cli import main as dpo_dist

LR = 5e-4
RUNS = {"adamw": ["zero=none", f"optim.lr={LR}"],
        "adamw_8bit": ["zero=none", f"optim.lr={LR}"],
        "muon": ["zero=none", f"optim.lr={LR}"],
        "muon, 5 lr, adamw_lr_ratio=0.2": ["zero=none", f"optim.lr={5 * LR}", "optim.adamw_lr_ratio=0.2"],
        "cpu_adam": ["zero=zero2", "zero.offload_optimizer=cpu", f"optim.lr={LR}"]}
STEPS = 1, 10, 20, 40, 80
MEANS = 5                                  # steps that a loss of the curve is the mean of, up to that step
RESULTS = Path(__file__).parent / "results" / "optimizers.json"


def main(folder: Path) -> None:
    write_inputs(folder)
    common = [f"data.eval=[{{path: {folder / 'held_out.jsonl'}}}]", "cluster.device=cpu", "model.dtype=fp32",
              "data.max_length=128", "cluster.procs_per_node=1", f"data.cache_dir={folder / 'tokens'}",
              f"reference.cache_dir={folder / 'reference'}", "train.pairs_per_step=16"]
    run("train", "loss=sft", f"model.path={folder / 'base'}", f"data.train=[{{path: {folder / 'sft.jsonl'}}}]",
        "train.epochs=6", "optim.lr=2e-3", "zero=none", f"run.dir={folder / 'sft'}", *common)
    for name, words in RUNS.items():
        run("train", "loss=rpo", f"model.path={folder / 'sft' / 'model'}",
            f"data.train=[{{path: {folder / 'pairs.jsonl'}}}]", f"train.max_steps={max(STEPS)}", "train.epochs=4",
            "loss.beta=0.5", f"optim={name.split(',')[0]}", f"run.dir={folder / word(name)}", *words, *common)
    results = {"learning_rate": LR, "pairs_per_step": 16,
               "runs": {name: figures(folder / word(name)) for name in RUNS}}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


def word(name: str) -> str:
    """A run's name without what a path or an override cannot hold."""
    return re.sub(r"[^a-z0-9_]+", "_", name)


def run(*words: str) -> None:
    if code := dpo_dist(list(words)):
        sys.exit(code)


def figures(run_dir: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["split"] == "train"]
    before, *_, after = (row for row in rows if row["split"] == "eval")
    checkpoint = max((run_dir / "checkpoints").iterdir())
    (weights,) = (run_dir / "model").glob("*.safetensors")
    return {"loss": {step: round(sum(losses[max(0, step - MEANS):step]) / min(step, MEANS), 4) for step in STEPS},
            "held_out_loss": round(after["loss"], 4), "held_out_accuracy": round(after["rewards/accuracies"], 4),
            "held_out_accuracy_before": round(before["rewards/accuracies"], 4),
            "state_bytes_a_parameter": round(state_bytes(checkpoint) / (weights.stat().st_size / 4), 2)}


def state_bytes(checkpoint: Path) -> int:
    """Of all tensors of the optimizer's state; what several parameters share counts once."""
    alone = checkpoint / "optimizer.pt"
    if alone.exists():
        state = torch.load(alone, weights_only=True)["state"]
    else:                                  # DeepSpeed's own file, of the one rank
        (file,) = (checkpoint / "state").glob("*optim_states.pt")
        state = torch.load(file, weights_only=False)["optimizer_state_dict"]["base_optimizer_state"]["state"]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(state)}
    return sum(storages.values())


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for inner in value.values() for t in tensors(inner)] if isinstance(value, dict) else []


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/optimizers"))
