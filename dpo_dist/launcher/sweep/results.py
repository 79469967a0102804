"""Results of a sweep's jobs: last held-out metrics, the best job, a table for the terminal, and <sweep>/sweep.json."""
from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_dist.config.objectives import OBJECTIVES, badness
from dpo_dist.config.options import to_dict
from dpo_dist.launcher.sweep.groups import Job, shown
from dpo_dist.runtime.best import exported_step
from dpo_dist.runtime.files import jsonable, write_json
from dpo_dist.runtime.run_dir import RunDir

KL, DRIFT = "reference/kl_per_token", "reference/chosen_drift_per_token"
COLUMNS = {"rewards/accuracies": "accuracy", "rewards/margins": "margin", KL: "KL estimate", DRIFT: "chosen drift",
           "loss": "loss"}


@dataclass(frozen=True)
class Result:
    """`metrics`: of the held-out evaluation of what is exported, empty unless the job is done. `message`: why it is
    not."""

    job: Job
    done: bool
    metrics: dict[str, float]
    message: str = ""


def read_result(job: Job, why_not: str = "") -> Result:
    """What the job's folder says. `why_not`: why the job could not be started, where that is known."""
    folder = RunDir(job.run_dir)
    if job.is_done():
        last = (folder.rows("eval") or [{"step": 0}])[-1]["step"]
        return Result(job, True, exported_step(folder, job.config.train.keep_best, last)[1])
    failure = folder.failure()
    if not why_not and failure is not None:
        why_not = failure.message
    return Result(job, False, {}, why_not or "it did not finish; the same sweep goes on with it")


def best(results: Sequence[Result], objective: str) -> Result | None:
    """The finished job with the best objective, among equals the closest to the reference; None if none is finite."""
    able = [r for r in results if math.isfinite(r.metrics.get(objective, math.nan))]
    return min(able, key=lambda r: (badness(objective, r.metrics[objective]), r.metrics.get(KL, 0.0)), default=None)


def command_of(job: Job) -> str:
    """The command that trains what the job trained, in a folder of its own, ready to be copied."""
    return shlex.join(["dpo-dist", "run", *job.words])


def columns(results: Sequence[Result]) -> tuple[list[str], list[str]]:
    """(swept keys, measured metrics): what there is to show of these results."""
    keys = list(dict.fromkeys(key for r in results for key in r.job.swept))
    return keys, [name for name in COLUMNS if any(name in r.metrics for r in results)]


def rows(results: Sequence[Result]) -> list[list[str]]:
    """The table as text, its head first."""
    keys, names = columns(results)
    table = [[*keys, *(COLUMNS[name] for name in names), ""]]
    for r in results:
        measured = [f"{r.metrics[name]:.4f}" if name in r.metrics else "-" for name in names]
        table.append([*(shown(r.job.swept.get(key)) for key in keys), *measured, "" if r.done else "failed"])
    return table


def table(results: Sequence[Result]) -> str:
    cells = rows(results)
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in cells)


def write_results(folder: Path, results: Sequence[Result], objective: str) -> None:
    """<folder>/sweep.json: each job's values, folder and metrics, and the best job's command and config."""
    chosen = best(results, objective)
    content: dict[str, Any] = {
        "objective": objective,
        "direction": OBJECTIVES[objective],
        "jobs": [{"swept": r.job.swept, "run_dir": str(r.job.run_dir), "done": r.done, "message": r.message,
                  "metrics": {name: jsonable(value) for name, value in r.metrics.items()}} for r in results],
        "best": chosen and {"swept": chosen.job.swept, "run_dir": str(chosen.job.run_dir),
                            "command": command_of(chosen.job), "config": to_dict(chosen.job.config)},
    }
    write_json(folder / "sweep.json", content)
