"""Which checkpoint is the best by a held-out metric (train.keep_best), told from the run's folder. No torch here."""
from __future__ import annotations

from typing import Any

from dpo_dist.config.objectives import badness
from dpo_dist.runtime.run_dir import RunDir


def best_evaluation(run_dir: RunDir, metric: str) -> dict[str, Any] | None:
    """The row of metrics.jsonl that is best by the metric, of those whose checkpoint is whole; of equals the earlier.
    None where there is none: weights from before training have no checkpoint."""
    whole = set(run_dir.checkpoints())
    rows = [row for row in run_dir.rows("eval") if metric in row and run_dir.checkpoint(row["step"]) in whole]
    return min(rows, key=lambda row: badness(metric, float(row[metric])), default=None)


def is_best_yet(run_dir: RunDir, metric: str, step: int, value: float) -> bool:
    """Whether an evaluation just made is the best of the run."""
    best = best_evaluation(run_dir, metric)
    return best is None or best["step"] == step or badness(metric, value) < badness(metric, float(best[metric]))


def exported_step(run_dir: RunDir, metric: str | None, newest: int) -> tuple[int, dict[str, float]]:
    """(the step whose weights are exported, its held-out means): the best by `metric`, or the newest where that is None
    or nothing is evaluated yet."""
    best = best_evaluation(run_dir, metric) if metric else None
    step = newest if best is None else int(best["step"])
    rows = [row for row in run_dir.rows("eval") if row["step"] == step]
    return step, {name: float(value) for name, value in (rows[-1] if rows else {}).items()
                  if name not in ("step", "split")}
