"""How long training stands still while a checkpoint is saved: the version before (DeepSpeed writes it, and training
waits), now with train.save_in_background=false, and now.

    python benchmarks/save_stall.py MODEL OLD [ROUNDS]    → benchmarks/results/save_stall.json

MODEL: the folder of a model, as `make real` leaves one; OLD: a checkout of the version before. Two ranks, ZeRO-3, fp32,
one thread each, on this machine's CPU and disk; the three take turns.
"""
from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
STEPS, EVERY, LONGEST = 12, 4, 64
NOW = HERE.parent


def main(model: Path, old: Path, rounds: int) -> None:
    variants = {"before": (old, []), "waits": (NOW, ["train.save_in_background=false"]), "now": (NOW, [])}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    with tempfile.TemporaryDirectory(dir=os.environ.get("ON_DISK")) as folder:
        write_rows(Path(folder) / "rows.jsonl", 200)
        for _ in range(rounds):
            for name, (checkout, more) in variants.items():
                found[name].append(run(Path(folder), model, checkout, more))
    result = {"model": model.name, "ranks": 2, "cpus": os.cpu_count(), "rounds": rounds,
              **{name: summary(runs) for name, runs in found.items()}}
    (HERE / "results" / "save_stall.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def write_rows(path: Path, n: int) -> None:
    r = random.Random(0)

    def ids() -> list[int]:
        return [r.randrange(3, 40_000) for _ in range(r.randint(LONGEST // 2, LONGEST))]

    path.write_text("".join(json.dumps({"prompt_ids": ids(), "chosen_ids": ids(), "rejected_ids": ids()}) + "\n"
                            for _ in range(n)))


def run(home: Path, model: Path, checkout: Path, more: list[str]) -> dict[str, Any]:
    """What one run saw: seconds of each save but the last, of steps beside a save and of the others, and the size."""
    where, times = home / "run", home / "times.json"
    words = [f"model.path={model}", f"data.train=[{{path: {home / 'rows.jsonl'}, format: token_ids}}]", "data.eval=[]",
             "data.eval_fraction=0", "model.dtype=fp32", "cluster.device=cpu", "zero=zero3", "train.pairs_per_step=2",
             f"train.max_steps={STEPS}", f"train.save_every_steps={EVERY}", "loss=simpo", "data.max_length=512",
             f"data.cache_dir={home / 'tokens'}", f"reference.cache_dir={home / 'reference'}", f"run.dir={where}",
             *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(checkout)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
               str(20_000 + time.time_ns() % 9_000), str(HERE / "timed_saves.py"), str(times), *words]
    subprocess.run(command, check=True, env=environment, cwd=home, stdin=subprocess.DEVNULL)
    seen = json.loads(times.read_text())
    size = sum(file.stat().st_size for file in (where / "checkpoints" / f"step-{EVERY * 2:06d}").rglob("*"))
    shutil.rmtree(where)
    saves, steps = seen["saves"], seen["steps"]
    ends = dict(zip(range(1, STEPS + 1), steps, strict=True))
    # a step lasts from the end of the last update, or of the save after it, to its own update
    lasted = {step: ends[step] - max([ends[step - 1], *(end for _, end in saves if ends[step - 1] < end < ends[step])])
              for step in range(3, STEPS + 1)}
    beside = [seconds for step, seconds in lasted.items() if step % EVERY == 1]
    others = [seconds for step, seconds in lasted.items() if step % EVERY in (2, 3)]
    return {"stall": [end - began for began, end in saves[:-1]], "beside": beside, "others": others, "bytes": size}


def summary(runs: list[dict[str, Any]]) -> dict[str, float]:
    def median(name: str) -> float:
        return statistics.median(value for run in runs for value in run[name])

    return {"stall_seconds": median("stall"), "step_after_a_save_seconds": median("beside"),
            "other_steps_seconds": median("others"), "checkpoint_gib": runs[0]["bytes"] / 2**30}


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), int(sys.argv[3]) if len(sys.argv) > 3 else 3)
