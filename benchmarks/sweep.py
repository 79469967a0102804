"""A 3 × 2 sweep of beta and learning rate against six separate runs with a live reference: sweep.py [ROUNDS [PAIRS]].

Both by the real command on the CPU, one process with one thread a run, from empty folders; in turn within a round, the
order of the two changing from round to round; what is printed are medians over rounds. Measured are wall-clock seconds
and the processes' own seconds on the processor, which other work on the machine hardly changes; start-up, evaluation
and export are in. The same is counted from the data alone, in tokens: a backward is two forwards. Results:
benchmarks/results/sweep.json.
"""
from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workload import write_model, write_rows

HERE = Path(__file__).parent
BETAS, RATES = ("0.05", "0.1", "0.3"), ("1e-4", "3e-4")
BACKWARD = 2                                     # forwards that a backward costs


def main(rounds: int, pairs: int) -> None:
    held_out = max(4, pairs // 20)
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary)
        write_rows(data / "train.jsonl", "long", pairs)
        write_rows(data / "eval.jsonl", "long", held_out, seed=2)
        write_model(data / "model")
        seconds = []
        for i in range(rounds):
            home = data / f"round{i}"
            variants = [("sweep", sweep), ("separate", separate)]
            seconds.append({name: timed(run, data, home / name)
                            for name, run in (variants if i % 2 == 0 else variants[::-1])})
            print(json.dumps(seconds[-1]), flush=True)
        again = timed(sweep, data, data / "round0" / "sweep")
        results: dict[str, Any] = {
            "rounds": rounds, "pairs": pairs, "held out": held_out, "threads": 1,
            "seconds": seconds,
            "sweep / separate": {kind: round(statistics.median(s["sweep"][kind] / s["separate"][kind] for s in seconds),
                                             3)
                                 for kind in ("wall", "processor")},
            "work in tokens": work(data),
            "seconds of the second invocation": again["processor"],
            "largest difference of the held-out losses": apart(data / "round0"),
        }
        counted = results["work in tokens"]["sweep"] / results["work in tokens"]["separate"]
        results["sweep / separate"]["counted"] = round(counted, 3)
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / "sweep.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


def sweep(data: Path, folder: Path) -> None:
    command("run", "-m", f"loss.beta={','.join(BETAS)}", f"optim.lr={','.join(RATES)}", f"run.dir={folder}/runs",
            *common(data, folder))


def separate(data: Path, folder: Path) -> None:
    for beta, lr in itertools.product(BETAS, RATES):
        command("run", f"loss.beta={beta}", f"optim.lr={lr}", f"run.dir={folder}/{beta}-{lr}", "reference.mode=live",
                *common(data, folder))


def common(data: Path, folder: Path) -> list[str]:
    return [f"model.path={data / 'model'}", f"data.train=[{{path: {data / 'train.jsonl'}, format: token_ids}}]",
            f"data.eval=[{{path: {data / 'eval.jsonl'}, format: token_ids}}]", "model.dtype=fp32", "cluster.device=cpu",
            "zero=none", "train.pairs_per_step=8", "train.tokens_per_microbatch=1024",
            f"data.cache_dir={folder}/tokens", f"reference.cache_dir={folder}/reference"]


def command(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "dpo_dist.launcher.cli", *words], capture_output=True, text=True,
                          cwd=HERE.parent, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"dpo-dist {' '.join(words)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def timed(run: Callable[[Path, Path], None], data: Path, folder: Path) -> dict[str, float]:
    folder.mkdir(parents=True, exist_ok=True)
    began, before = time.perf_counter(), os.times()
    run(data, folder)
    after = os.times()
    on_processor = after.children_user + after.children_system - before.children_user - before.children_system
    return {"wall": round(time.perf_counter() - began, 1), "processor": round(on_processor, 1)}


def work(data: Path) -> dict[str, int]:
    """Tokens forwarded, and twice those gone backward through, of one epoch with held-out evaluations before and after
    it."""
    def tokens(file: str) -> int:
        rows = [json.loads(line) for line in (data / file).read_text().splitlines()]
        return sum(len(ids) for row in rows for ids in row.values())     # no two rows share a prompt

    train, held_out, runs = tokens("train.jsonl"), tokens("eval.jsonl"), len(BETAS) * len(RATES)
    policy = (1 + BACKWARD) * train + 2 * held_out
    return {"sweep": train + held_out + runs * policy, "separate": runs * (policy + train + 2 * held_out)}


def apart(folder: Path) -> float:
    """The largest difference between a swept run's last held-out loss and that of the same run by itself: they are to
    be the same runs."""
    swept = {(job["swept"]["loss.beta"], job["swept"]["optim.lr"]): job["metrics"]["loss"]
             for job in json.loads((folder / "sweep" / "runs" / "sweep.json").read_text())["jobs"]}
    return max(abs(swept[float(beta), float(lr)] - last_loss(folder / "separate" / f"{beta}-{lr}")) for beta, lr in
               itertools.product(BETAS, RATES))


def last_loss(run: Path) -> float:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return float([row["loss"] for row in rows if row["split"] == "eval"][-1])


if __name__ == "__main__":
    main(*(int(word) for word in (sys.argv[1:] + ["3", "240"][len(sys.argv) - 1:])))
