"""How many planted flipped labels lead the suspects: python benchmarks/flipped_labels.py FOLDER [demo] [real]

A seeded share of the demo's pairs, and of the on-policy pairs of `make real`, gets chosen and rejected swapped; each
set is trained on once for every setting and seed, and the flipped pairs are looked for among the first tenth of
<run.dir>/suspects.jsonl. Chance finds a tenth of them. FOLDER/real is the folder of `make real` (its base/, train.jsonl
and held_out.jsonl are used). A run that is there is not made again. fp32, CPU, one process.
Results go to benchmarks/results/flipped_labels.json.
"""
from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_dist.demo import write_inputs
from dpo_dist.launcher.cli import main as dpo_dist

SHARE, FIRST = 0.05, 0.1                   # of the labels that are flipped; of the ranking that is looked at
ALONE = ["cluster.device=cpu", "model.dtype=fp32", "cluster.procs_per_node=1", "zero=none"]
DEMO: dict[str, tuple[list[str], int]] = { # {setting: (its words, seeds)}; the first is the demo's own
    "4 epochs, rpo": ([], 5), "2 epochs": (["train.epochs=2"], 2), "1 epoch": (["train.epochs=1"], 2),
    "10 epochs": (["train.epochs=10"], 1), "loss=dpo": (["loss=dpo"], 2),
    "loss=ipo": (["loss=ipo", "loss.beta=0.3"], 1), "loss=simpo": (["loss=simpo", "loss.beta=2"], 1),
    "4 times the learning rate": (["optim.lr=2e-3"], 1), "a fifth of the learning rate": (["optim.lr=1e-4"], 1)}
REAL: dict[str, tuple[list[str], int]] = {
    "1 epoch, rpo": ([], 4), "2 epochs": (["train.epochs=2"], 1), "loss=dpo": (["loss=dpo"], 1),
    "half the learning rate": (["optim.lr=1e-5"], 1)}
RESULTS = Path(__file__).parent / "results" / "flipped_labels.json"


def main(folder: Path, sets: list[str]) -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in sets:
        settings, train = {"demo": (DEMO, demo), "real": (REAL, real)}[name]
        words, rows, flipped = train(folder / name)
        results[name] = {}
        for setting, (changes, seeds) in settings.items():
            results[name][setting] = [
                of_seed(folder / "runs" / name / "".join(c if c.isalnum() else "_" for c in setting) / str(seed), rows,
                        flipped, seed, [*words, *changes]) for seed in range(seeds)]
            print(name, setting, json.dumps(results[name][setting]))
            RESULTS.write_text(json.dumps(results, indent=2) + "\n")


Row = dict[str, Any]


def demo(folder: Path) -> tuple[list[str], list[Row], Callable[[Row], Row]]:
    """(the words of the demo's DPO, its rows, how one is flipped), once the model is supervised."""
    common = [f"data.eval=[{{path: {folder / 'held_out.jsonl'}}}]", "data.max_length=128", "train.pairs_per_step=16",
              f"data.cache_dir={folder / 'tokens'}", *ALONE]
    if not (folder / "sft" / "DONE").exists():
        write_inputs(folder)
        run("loss=sft", f"model.path={folder / 'base'}", f"data.train=[{{path: {folder / 'sft.jsonl'}}}]",
            "train.epochs=6", "optim.lr=2e-3", f"run.dir={folder / 'sft'}", *common)
    words = ["loss=rpo", f"model.path={folder / 'sft' / 'model'}", "train.epochs=4", "optim.lr=5e-4", "loss.beta=0.5",
             f"reference.cache_dir={folder / 'reference'}", *common]
    return words, rows_of(folder / "pairs.jsonl"), lambda row: {**row, "chosen": row["rejected"],
                                                                "rejected": row["chosen"]}


def real(folder: Path) -> tuple[list[str], list[Row], Callable[[Row], Row]]:
    """The same of `make real`, whose answers are there."""
    from dpo_dist.real.__main__ import DPO, Work, cut_alike

    words = [*DPO, f"model.path={folder / 'base'}", f"data.cache_dir={folder / 'tokens'}", *ALONE,
             f"data.eval=[{{path: {folder / 'held_out.jsonl'}, format: ratings}}]",
             f"reference.cache_dir={folder / 'reference'}", *cut_alike(folder / "base", Work())]
    return words, rows_of(folder / "train.jsonl"), lambda row: {**row, "ratings": row["ratings"][::-1]}


def of_seed(folder: Path, rows: list[Row], flipped: Callable[[Row], Row], seed: int, words: list[str]) -> Row:
    """What becomes of one planted set: shares of the flipped pairs in the first tenth, by all evidence, by the pairs'
    own margins alone, by other pairs' words alone; null for what has no say."""
    planted = set(random.Random(seed).sample(range(len(rows)), round(SHARE * len(rows))))
    run_dir = folder / "run"
    if not (run_dir / "DONE").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "rows.jsonl").write_text("".join(
            json.dumps(flipped(row) if i in planted else row) + "\n" for i, row in enumerate(rows)))
        kind = ", format: ratings" if "ratings" in rows[0] else ""
        run(*words, f"data.train=[{{path: {folder / 'rows.jsonl'}{kind}}}]", f"run.dir={run_dir}")
        for name in ("checkpoints", "model"):              # large, and not looked at
            shutil.rmtree(run_dir / name)
    ranked = rows_of(run_dir / "suspects.jsonl")
    at = {f"{folder / 'rows.jsonl'}:{i + 1}" for i in planted}

    def found(score: Callable[[Row], float]) -> float | None:
        if not any(map(score, ranked)):                    # it has no say here
            return None
        first = sorted(ranked, key=score, reverse=True)[:round(FIRST * len(ranked))]
        return round(sum(row["where"] in at for row in first) / len(at), 3)

    counts = json.loads((run_dir / "datamap.json").read_text())["counts"]
    return {"pairs": len(ranked), "flipped": len(at), "in_first_tenth": found(lambda row: row["score"]),
            "by_margins": found(lambda row: row["from_margins"]), "by_words": found(lambda row: row["from_words"]),
            "estimated": counts["suspects"]}


def rows_of(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def run(*words: str) -> None:
    if code := dpo_dist(["train", *words]):
        sys.exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or ["demo", "real"])
