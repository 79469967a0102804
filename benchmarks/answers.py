"""Seconds from the command to its end, for what must answer at once: answers.py [TIMES]. Results:
benchmarks/results/answers.json."""
from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
RUN = ["model.path=m", "data.train=[{path: rows.jsonl}]", "data.eval_fraction=0.1"]
ANSWERS = {
    "dpo-dist --help": (["--help"], 0),
    "dpo-dist run --help": (["run", "--help"], 0),
    "dpo-dist plan": (["plan", *RUN], 0),
    "dpo-dist plan, 405B on 16 nodes": (["plan", *RUN, "model.path=docs/shapes/llama-3.1-405b", "cluster=slurm",
                                         "cluster.nodes=16"], 0),
    "dpo-dist run cluster=slurm --dry-run": (["run", *RUN, "cluster=slurm", "--dry-run"], 0),
    "a value out of range": (["run", *RUN, "loss.beta=-1"], 2),
    "an unknown key": (["run", *RUN, "loss.bta=1"], 2),
    "a value out of range, in a sweep of eight": (["run", "-m", *RUN, "loss.beta=0.05,0.1,0.3,-1",
                                                   "optim.lr=5e-7,1e-6"], 2),
}


def main(times: int) -> None:
    found: dict[str, list[float]] = {name: [] for name in ANSWERS}
    for _ in range(times):
        for name, (words, code) in ANSWERS.items():
            began = time.monotonic()
            done = subprocess.run([sys.executable, "-m", "dpo_dist.launcher.cli", *words], capture_output=True,
                                  text=True, cwd=HERE.parent)
            found[name].append(time.monotonic() - began)
            if done.returncode != code:
                sys.exit(f"{name} ended with {done.returncode}: {done.stderr}")
    results = {name: {"median_seconds": round(statistics.median(seconds), 2), "worst_seconds": round(max(seconds), 2)}
               for name, seconds in found.items()}
    (HERE / "results" / "answers.json").write_text(json.dumps({"times": times, "answers": results}, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 9)
