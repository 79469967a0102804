"""When the guard sees displacement in the demo, and that it is silent in sound runs: python benchmarks/displacement.py
[FOLDER].

The demo's model is supervised as in `make demo`; then each loss trains it at a tenth of the demo's learning rate, at it
and at 20 times it, in one process; held-out pairs are evaluated before and after, as in the demo. A fall is how
much less likely the chosen answers are than under the reference, in nats a token, as a row of metrics has it; the
largest of the run is the total. Results go to benchmarks/results/displacement.json.
"""
from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from dpo_dist.demo import write_inputs
from dpo_dist.launcher.cli import main as dpo_dist
from dpo_dist.runtime.run_dir import RunDir

RESULTS = Path(__file__).parent / "results" / "displacement.json"
DRIFT = "reference/chosen_drift_per_token"
LR, TIMES = 5e-4, (0.1, 1, 20)
RUNS = {"sigmoid": ["loss=dpo", "loss.beta=0.5"], "sigmoid, beta 0.1": ["loss=dpo", "loss.beta=0.1"],
        "sigmoid_norm": ["loss=sigmoid_norm"], "ipo": ["loss=ipo", "loss.beta=0.5"],
        "rpo": ["loss=rpo", "loss.beta=0.5"]}


def main(folder: Path) -> None:
    write_inputs(folder)
    common = [f"data.eval=[{{path: {folder / 'held_out.jsonl'}}}]", "cluster.device=cpu", "model.dtype=fp32",
              "zero=none", "data.max_length=128", "cluster.procs_per_node=1", f"data.cache_dir={folder / 'tokens'}"]
    step("train", "loss=sft", f"model.path={folder / 'base'}", f"data.train=[{{path: {folder / 'sft.jsonl'}}}]",
         "train.epochs=6", "train.pairs_per_step=16", "optim.lr=2e-3", f"run.dir={folder / 'sft'}", *common)
    aligning = [f"model.path={folder / 'sft' / 'model'}", f"data.train=[{{path: {folder / 'pairs.jsonl'}}}]",
                "train.epochs=4", "train.pairs_per_step=16", *common, f"reference.cache_dir={folder / 'reference'}"]
    results: dict[str, Any] = {}
    for name, words in RUNS.items():
        for times in TIMES:
            run_dir = folder / f"{name.replace(', ', '-').replace(' ', '')}-{times}"
            step("run", *aligning, *words, f"optim.lr={LR * times}", f"run.dir={run_dir}")
            results[f"{name}, lr {LR * times:g}"] = found = outcome(RunDir(run_dir))
            print(name, times, json.dumps(found, indent=2), flush=True)
    stopped = folder / "stopped"
    words = ["run", *aligning, *RUNS["sigmoid"], f"optim.lr={LR * TIMES[-1]}", f"run.dir={stopped}",
             "guard.on_displacement=stop"]
    at = {"exit_code": dpo_dist(words), "kept": [path.name for path in RunDir(stopped).checkpoints()],
          "exit_code_again": dpo_dist(words)}
    written = {"steps": 80, "runs": results, "sigmoid with stop": at}
    RESULTS.write_text(json.dumps(written, indent=2) + "\n")


def step(*words: str) -> None:
    if code := dpo_dist(list(words)):
        sys.exit(code)


def outcome(run_dir: RunDir) -> dict[str, Any]:
    """The falls of a run, and where the guard spoke: its step, the largest fall until then, as a share of the whole."""
    rows, held_out = run_dir.rows("train"), run_dir.rows("eval")[-1]
    total = max(-row[DRIFT] for row in rows)
    found: dict[str, Any] = {"largest_fall": round(total, 3), "last_fall": round(-rows[-1][DRIFT], 3),
                             "held_out_fall": round(-held_out[DRIFT], 3),
                             "held_out_accuracy": held_out["rewards/accuracies"]}
    events = [json.loads(line) for line in run_dir.guard.read_text().splitlines()] if run_dir.guard.exists() else []
    for event in events:
        fall = max(-row[DRIFT] for row in rows if row["step"] <= event["step"])
        found["warned"] = {"step": event["step"], "fall": round(fall, 3), "share_of_the_fall": round(fall / total, 3)}
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/displacement"))
