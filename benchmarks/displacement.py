"""When the guard sees displacement in the demo, and when not: python benchmarks/displacement.py [DEMO] [FOLDER].

DEMO is what `make demo` left (runs/demo): its supervised model and its pairs. Plain sigmoid and the demo's own loss,
rpo, train that model in one process at the demo's learning rate, at a tenth of it and at 20 times it; held-out pairs
are evaluated before and after, as in the demo. A fall is how much less likely the chosen answers are than under the
reference, in nats a token, as a row of metrics has it; the largest of the run is the total. Results go to
benchmarks/results/displacement.json.
"""
from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from dpo_dist.launcher.cli import main as dpo_dist
from dpo_dist.runtime.run_dir import RunDir

RESULTS = Path(__file__).parent / "results" / "displacement.json"
DRIFT = "reference/chosen_drift_per_token"
LR, TIMES = 5e-4, (0.1, 1, 20)
RUNS = {"sigmoid": ["loss=dpo", "loss.beta=0.5"], "rpo": ["loss=rpo", "loss.beta=0.5"]}


def main(demo: Path, folder: Path) -> None:
    aligning = [f"model.path={demo / 'sft' / 'model'}", f"data.train=[{{path: {demo / 'pairs.jsonl'}}}]",
                f"data.eval=[{{path: {demo / 'held_out.jsonl'}}}]", "train.epochs=4", "train.pairs_per_step=16",
                "cluster.device=cpu", "model.dtype=fp32", "zero=none", "cluster.procs_per_node=1",
                "data.max_length=128", f"data.cache_dir={folder / 'tokens'}",
                f"reference.cache_dir={folder / 'reference'}"]
    results: dict[str, Any] = {}
    for name, words in RUNS.items():
        for times in TIMES:
            run_dir = folder / f"{name}-{times}"
            step("train", *aligning, *words, f"optim.lr={LR * times}", f"run.dir={run_dir}")
            results[f"{name}, lr {LR * times:g}"] = found = outcome(RunDir(run_dir))
            print(name, times, json.dumps(found, indent=2), flush=True)
    stopped = folder / "stopped"
    words = ["train", *aligning, *RUNS["sigmoid"], f"optim.lr={LR * TIMES[-1]}", f"run.dir={stopped}",
             "guard.on_displacement=stop"]
    at = {"exit_code": dpo_dist(words), "kept": [path.name for path in RunDir(stopped).checkpoints()]}
    written = {"steps": 80, "runs": results, "sigmoid at the highest rate with stop": at}
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
    given = [Path(word) for word in sys.argv[1:]]
    main(*given, *[Path("runs/demo"), Path("runs/displacement")][len(given):])
