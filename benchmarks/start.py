"""Seconds from `dpo-dist train` to its first step, in one and two processes, on the golden model: start.py [CHECKOUT].

With another checkout (an older one), both are run in turn with its own code and environment. Writes results/start.json.
"""
from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
GOLDEN = REPO / "tests" / "golden"
ROUNDS = 3


def seconds(checkout: Path, processes: int) -> float:
    """From the command to the first row of metrics, with caches of its own."""
    python = checkout / ".venv" / "bin" / "python"
    with tempfile.TemporaryDirectory() as folder:
        metrics, began = Path(folder) / "run" / "metrics.jsonl", time.perf_counter()
        words = [f"model.path={GOLDEN / 'policy'}", f"data.train=[{{path: {GOLDEN / 'rows.json'}, format: token_ids}}]",
                 "cluster.device=cpu", "model.dtype=fp32", f"cluster.procs_per_node={processes}", "train.max_steps=1",
                 "train.pairs_per_step=8", f"data.cache_dir={folder}/tokens", f"reference.cache_dir={folder}/reference",
                 f"run.dir={folder}/run"]
        running = subprocess.Popen(
            [python, "-m", "dpo_dist.launcher.cli", "train", *words], cwd=checkout, stdout=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)})
        while not (metrics.exists() and metrics.stat().st_size):
            assert running.poll() is None, "the run ended before its first step"
            time.sleep(0.01)
        took = time.perf_counter() - began
        assert running.wait() == 0
    return took


def main(others: list[str]) -> None:
    checkouts = {"now": REPO, **({"before": Path(others[0]).resolve()} if others else {})}
    found: dict[str, dict[str, float]] = {}
    for processes in (1, 2):
        times: dict[str, list[float]] = {name: [] for name in checkouts}
        for _ in range(ROUNDS):
            for name, checkout in checkouts.items():
                times[name].append(seconds(checkout, processes))
        row = {name: round(statistics.median(values), 2) for name, values in times.items()}
        if others:
            ratios = [a / b for a, b in zip(times["now"], times["before"], strict=True)]
            row["now over before"] = round(statistics.median(ratios), 3)
        found[f"{processes} processes"] = row
        print(processes, row, flush=True)
    (REPO / "benchmarks" / "results" / "start.json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
