"""A run's folder as training leaves it, with every file that a report reads, from a seed: nothing is trained."""
from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

PLACES = ("lift", "park", "tower", "bridge", "hotel", "beach", "museum")
# what a file may hold, all the same
HOSTILE = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 2'> & <b>\u2028 𝔘\ud800"


def write_run(folder: Path, seed: int = 0, steps: int = 120, beta: float = 0.1, evaluations: int = 4,
              say: str = "Straight on, madam", done: bool = True) -> Path:
    """Writes all files; the larger beta, the less the policy moves. `say`: what samples and places hold."""
    r = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    at = sorted({round(steps * i / (evaluations - 1)) for i in range(evaluations)}) if evaluations > 1 else [0]
    write_metrics(folder, r, steps, beta, at)
    files: dict[str, Any] = {
        "run.json": run_json(folder, beta), "audit.json": audit(say), "datamap.json": datamap(r, say),
        "evaluation.json": {"evaluations": [evaluation(r, step, steps, beta, say) for step in at]},
        "generations.json": {"before": generation(20.0, 0.01), "after": generation(31.5, 0.16)},
        "judge.json": {"judge": "judge.py", "against": "before", "position_consistency": 0.9,
                       "win_rate": interval(0.5 + 0.25 * math.exp(-2 * beta), 200),
                       "length_controlled": interval(0.55, 200)},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    write_lines(folder / "samples.jsonl", [
        {"step": step, "prompt": f"Where is the {place}? {say}", "tokens": 12 + 3 * i + n, "ended": n != 3,
         "completion": f"{say} {place} " * (1 + i)}
        for i, step in enumerate(at) for n, place in enumerate(PLACES)])
    write_lines(folder / "guard.jsonl", [
        {"step": steps // 3, "guard": "displacement", "action": "warn", "value": -0.3, "bound": -0.2, "pairs": ["a:1"],
         "message": f"chosen log-probs fell by 0.3 nats a token while margins rose; {say}; set loss=rpo"},
        {"step": steps // 2, "guard": "length", "action": "stop", "message": "samples grew from 20 to 45 tokens",
         "value": 45, "bound": 40, "pairs": []}])
    (folder / "command.txt").write_text(f"dpo-dist run model.path=base data.train=pairs.jsonl loss.beta={beta}\n")
    (folder / "data.txt").write_text("train: 320 pairs, 9,864 tokens\n  pairs.jsonl (preference): 320 rows read\n")
    if done:
        (folder / "DONE").touch()
    return folder


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_metrics(folder: Path, r: random.Random, steps: int, beta: float, evaluated: list[int]) -> None:
    def means(step: int, noise: float) -> dict[str, float]:
        way = step / steps
        margin = 2.2 * (1 - math.exp(-4 * way)) * (1 + noise * r.gauss(0, 0.3))
        moved = 6 * beta ** -0.5 * way * (1 + noise * r.gauss(0, 0.1))
        return {"loss": math.log1p(math.exp(-margin)), "rewards/chosen": -0.2 * margin,
                "rewards/rejected": -1.2 * margin, "rewards/margins": margin,
                "rewards/accuracies": min(1.0, 0.5 + 0.22 * margin), "logps/chosen": -40 - 4 * way,
                "logps/rejected": -42 - 18 * way, "reference/kl_per_token": 0.02 * moved ** 2,
                "reference/chosen_drift_per_token": -0.06 * moved}

    rows: list[dict[str, Any]] = []
    for step in range(steps + 1):
        if step:
            rows.append({"step": step, "split": "train", **means(step, 1), "grad_norm": 2 + r.random(),
                         "lr": 5e-7 * (1 - step / steps), "perf/tokens_per_second": 4000 + 200 * r.random(),
                         "perf/peak_memory_gib": 0.42})
        if step in evaluated:
            rows.append({"step": step, "split": "eval", **means(step, 0)})
    write_lines(folder / "metrics.jsonl", rows)


def run_json(folder: Path, beta: float) -> dict[str, Any]:
    config = {"model": {"path": "org/tiny-chat"}, "loss": {"name": "sigmoid", "terms": None, "beta": beta},
              "data": {"train": [{"path": "data/pairs.jsonl", "name": None}], "eval_fraction": 0.1},
              "optim": {"name": "adamw", "lr": 5e-7}, "train": {"pairs_per_step": 16}, "run": {"dir": str(folder)}}
    passport = {"policy_weights": "856ed6a7a99106a24ec46a42aa39fad6",
                "train_pairs": {"count": 320, "digest": "63" * 32},
                "eval_pairs": {"count": 200, "digest": "0e" * 32}, "ranks": 2, "versions": {"torch": "2.13.0"}}
    return {"config": config, "passport": passport, "identity_of": {}}


def interval(value: float, n: int) -> dict[str, float]:
    around = 1.96 * math.sqrt(max(value * (1 - value), 0.001) / n)
    return {"value": value, "low": max(0.0, value - around), "high": min(1.0, value + around), "n": n}


def generation(tokens: float, repetition: float) -> dict[str, float]:
    return {"answers": 7, "tokens_mean": tokens, "tokens_low": tokens - 3, "tokens_high": tokens + 3,
            "ended_share": 0.86, "repetition": repetition}


def evaluation(r: random.Random, step: int, steps: int, beta: float, say: str) -> dict[str, Any]:
    way = step / steps
    bins = [{"low": 0.5 + i / 16, "high": 0.5 + (i + 1) / 16, "n": 25, "predicted": (p := 0.5 + (i + 0.5) / 16),
             "observed": (o := min(0.97, 0.5 + 0.7 * (p - 0.5) + r.gauss(0, 0.03))),
             "observed_low": max(0.0, o - 0.15), "observed_high": min(1.0, o + 0.15)} for i in range(8)]
    slices = [{"by": by, "value": value, "n": n, "accuracy": interval(accuracy, n), "difference": accuracy - 0.75,
               "p": 0.01, "p_corrected": 0.003 if flagged else 0.6, "flagged": flagged}
              for by, value, n, accuracy, flagged in (
                  ("source", "ultrafeedback", 120, 0.8, False), ("source", say, 80, 0.7, False),
                  ("length", "chosen shorter", 70, 0.52, True), ("length", "chosen longer", 130, 0.9, True),
                  ("language", "de", 20, 0.7, False), ("language", "en", 180, 0.76, False),
                  ("tag", "maths", 31, 0.6, False), ("strength", "strong", 90, 0.86, False),
                  ("strength", "slight", 110, 0.68, False))]
    share = interval(0.5 + 0.3 * way, 40)
    rewardbench = {"score": share, "sections": {"Chat": share, "Safety": share}, "missing": ["math-prm"],
                   "subsets": {name: share for name in ("alpacaeval-easy", "mt-bench-easy", "donotanswer")}}
    return {"step": step, "pairs": 200, "prompts": 180, "ties": 3, "accuracy": interval(0.5 + 0.28 * way, 200),
            "baselines": {"length": interval(0.58, 200), "reference": interval(0.61, 200),
                          "reference_per_token": interval(0.55, 200)},
            "length_controlled": interval(0.5 + 0.05 * way, 70), "at_equal_length": interval(0.5 + 0.2 * way, 200),
            "calibration": {"ece": 0.08, "ece_by_chance": 0.05, "brier": 0.19, "log_loss": 0.55, "beta": beta,
                            "calibrating_beta": 0.7 * beta, "calibrating_beta_low": 0.5 * beta,
                            "calibrating_beta_high": 0.9 * beta, "bins": bins},
            "displacement": {"since": "step 0", "chosen_per_token": -0.12 * way, "rejected_per_token": -0.5 * way,
                             "share_chosen_falling": interval(0.7, 200), "share_both_falling": interval(0.6, 200)},
            "slices": slices, "slices_left_out": 2, "rewardbench": rewardbench,
            "kl": {"per_answer": {"value": 9 * way * beta ** -0.5, "low": 8 * way * beta ** -0.5,
                                  "high": 10 * way * beta ** -0.5, "n": 64}, "per_token": 0.4 * way, "answers": 64}}


def audit(say: str) -> dict[str, Any]:
    def finding(kind: str, severity: str, count: int) -> dict[str, Any]:
        return {"kind": kind, "severity": severity, "count": count, "share": count / 320,
                "examples": [f"pairs.jsonl:{count + i} {say}" for i in range(3)], "details": {},
                "meaning": f"These pairs are no good: {say}.", "remedy": "Leave them out, or mend the rows."}

    return {"rows": 320, "pairs": 320, "seconds": 1.5, "looked_at": {"tokens": "all 320 pairs"},
            "findings": [finding("language_mix", "info", 20), finding("duplicate_pair", "warning", 30),
                         finding("contradiction", "error", 4), finding("length_bias", "warning", 240)]}


def datamap(r: random.Random, say: str) -> dict[str, Any]:
    def entry(pair: int) -> dict[str, Any]:
        return {"pair": pair, "where": f"pairs.jsonl:{pair} {say}", "source": "pairs", "score": 4.2 - pair / 50,
                "confidence": 0.1 + pair / 1000, "variability": 0.05, "margins": [-0.2 * i for i in range(12)]}

    confidence = [min(1.0, max(0.0, r.betavariate(5, 2))) for _ in range(400)]
    return {"pairs": 320, "visits": 1280, "counts": {"never_learned": 9, "forgotten": 1, "suspects": 7},
            "never_learned": [entry(i) for i in range(9)], "forgotten": [entry(50)],
            "suspects": [entry(i) for i in range(60)],
            "map": {"confidence": confidence, "variability": [c * (1 - c) * (0.5 + r.random()) for c in confidence],
                    "correct": [round(min(1.0, c + 0.1), 2) for c in confidence],
                    "where": [f"pairs.jsonl:{i}" for i in range(400)]}}


def write_sweep(folder: Path, betas: tuple[float, ...] = (0.05, 0.1, 0.3), lrs: tuple[float, ...] = (5e-7, 1e-6)
                ) -> Path:
    """A sweep whose last run failed, each other run with a report of its own."""
    jobs = []
    for beta in betas:
        for lr in lrs:
            name, swept = f"beta_{beta:g}-lr_{lr:g}-abc", {"loss.beta": beta, "optim.lr": lr}
            failed = (beta, lr) == (betas[-1], lrs[-1])
            metrics: dict[str, float] = {}
            if not failed:
                run = write_run(folder / name, seed=len(jobs), beta=beta * (1 + 1e5 * lr))
                (run / "report.html").write_text("a report")
                metrics = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
            jobs.append({"swept": swept, "run_dir": f"elsewhere/{name}", "done": not failed,
                         "message": "the loss <of> step 3 is not finite" if failed else "",
                         "metrics": {key: value for key, value in metrics.items() if key not in ("step", "split")}})
    best = {"swept": jobs[0]["swept"], "run_dir": jobs[0]["run_dir"], "config": {},
            "command": "dpo-dist run model.path=base loss.beta=0.05"}
    (folder / "sweep.json").write_text(json.dumps({"objective": "rewards/accuracies", "direction": "maximize",
                                                   "jobs": jobs, "best": best}))
    return folder
