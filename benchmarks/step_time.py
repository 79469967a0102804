"""A DPO step of this project and of TRL, in turn, on the same model, rows, precision and thread: step_time.py [ROUNDS
[STEPS]].

Every figure is a process of its own; the programs alternate within a round, and what is printed are medians over rounds
of ratios within a round, so that a machine whose speed drifts does no harm. Results: benchmarks/results/step_time.json.
"""
from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from workload import PAIRS_PER_STEP, write_model, write_rows

HERE = Path(__file__).parent
WARM_UP = 2                                      # steps that are not counted
PROGRAMS = {
    "ours": ("run_ours.py", "dpo"), "ours unshared": ("run_ours.py", "dpo_unshared"),
    "ours sft": ("run_ours.py", "sft"),
    "ours score": ("run_ours.py", "score"),
    "TRL": ("run_trl.py", "dpo"), "TRL precomputed": ("run_trl.py", "dpo_precomputed"),
    "TRL sft": ("run_trl.py", "sft"),
}


def main(rounds: int, steps: int) -> None:
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        for kind in PAIRS_PER_STEP:
            folder = Path(temporary) / kind
            folder.mkdir()
            write_rows(folder / "rows.jsonl", kind, 120)
            write_model(folder / "model")
            runs = [{name: run(script, what, folder, kind, steps) for name, (script, what) in PROGRAMS.items()}
                    for _ in range(rounds)]
            results[kind] = summary(runs)
            print(kind, json.dumps(results[kind], indent=2), flush=True)
    (HERE / "results").mkdir(exist_ok=True)
    written = {"rounds": rounds, "steps": steps, "threads": 1, "rows": results}
    (HERE / "results" / "step_time.json").write_text(json.dumps(written, indent=2) + "\n")


def run(script: str, what: str, folder: Path, kind: str, steps: int) -> dict:
    words = [sys.executable, str(HERE / script), what, str(folder), kind, str(steps)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=HERE,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        sys.exit(f"{script} {what} failed:\n{done.stderr[-2000:]}")
    measured = json.loads(done.stdout.strip().splitlines()[-1])
    shares = [flops / seconds / rate for flops, seconds, rate in
              zip(measured.get("flops", []), measured["seconds"], measured.get("product_rates", []), strict=False)]
    return {"seconds": statistics.median(measured["seconds"][WARM_UP:]), "losses": measured["losses"],
            "peak_mib": measured["peak_mib"], "share": statistics.median(shares[WARM_UP:]) if shares else None}


def summary(runs: list[dict]) -> dict:
    def ratio(a: str, b: str, what: str = "seconds") -> float:
        return round(statistics.median(r[a][what] / r[b][what] for r in runs), 3)

    def apart(a: str, b: str) -> float:
        return max(abs(x - y) for x, y in zip(runs[0][a]["losses"], runs[0][b]["losses"], strict=True))

    return {
        "seconds a step": {name: round(statistics.median(r[name]["seconds"] for r in runs), 4) for name in PROGRAMS},
        "peak MiB": {name: round(statistics.median(r[name]["peak_mib"] for r in runs)) for name in PROGRAMS},
        "TRL / ours": ratio("TRL", "ours"), "TRL precomputed / ours": ratio("TRL precomputed", "ours"),
        "ours / TRL sft": ratio("ours", "TRL sft"), "ours / ours sft": ratio("ours", "ours sft"),
        "ours score / ours": ratio("ours score", "ours"), "peak memory, ours / TRL": ratio("ours", "TRL", "peak_mib"),
        "share of the matrix-product rate": round(statistics.median(r["ours"]["share"] for r in runs), 3),
        "largest difference of the losses to TRL's": apart("ours", "TRL"),
        "largest difference of the losses to the unshared path's": apart("ours", "ours unshared"),
        "losses": {name: runs[0][name]["losses"] for name in ("ours", "TRL")},
    }


if __name__ == "__main__":
    main(*(int(word) for word in (sys.argv[1:] + ["5", "14"][len(sys.argv) - 1:])))
