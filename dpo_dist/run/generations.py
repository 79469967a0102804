"""<run.dir>/generations.json: how the answers to held-out prompts were before training, and are now."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpo_dist.run.guard import paired_interval, repetition
from dpo_dist.runtime.files import write_json
from dpo_dist.runtime.json_files import sealed
from dpo_dist.runtime.json_lines import json_lines
from dpo_dist.runtime.run_dir import RunDir
from dpo_dist.runtime.terminal import Terminal

SampleRow = Mapping[str, Any]
FIELDS = {"step": (int,), "prompt": (str, list), "completion": (str, list), "tokens": (int,), "ended": (bool,)}


def samples_by_step(path: Path) -> dict[int, list[SampleRow]]:
    """The rows of samples.jsonl, by the step of their evaluation, in order; none where there is no file."""
    found: dict[int, list[SampleRow]] = {}
    for row in json_lines(path, FIELDS):
        found.setdefault(row["step"], []).append(row)
    return dict(sorted(found.items()))


def figures(rows: Sequence[SampleRow]) -> dict[str, Any]:
    """Of the answers of one evaluation: how many, their mean tokens with a 95 % interval (null for fewer than 4), the
    share that ended by itself, and the mean share of repeated 4-grams."""
    tokens = [int(row["tokens"]) for row in rows]
    low, high = paired_interval([0] * len(tokens), tokens)
    known = bool(np.isfinite(low))
    return {"step": int(rows[0]["step"]), "answers": len(rows), "tokens_mean": float(np.mean(tokens)),
            "tokens_low": max(low, 0.0) if known else None, "tokens_high": high if known else None,
            "ended_share": float(np.mean([bool(row["ended"]) for row in rows])),
            "repetition": float(np.mean([repetition(row["completion"]) for row in rows]))}


def write_generations(run_dir: RunDir, after: int | None = None) -> dict[str, Any] | None:
    """Writes generations.json from samples.jsonl, and returns what it holds: figures before training, and at the step
    `after`, or at the last evaluation. None, and no file, where samples.jsonl no longer has them."""
    steps = samples_by_step(run_dir.samples)
    last = max(steps, default=0) if after is None else after
    if last not in steps:
        return None
    found = sealed({"before": figures(steps[min(steps)]), "after": figures(steps[last])})
    write_json(run_dir.generations_json, found)
    return found


def show_generations(terminal: Terminal, found: Mapping[str, Any]) -> None:
    """A table of the figures before and after."""
    cells = [[_shown(name, found[when]) for when in ("before", "after")]
             for name in ("tokens_mean", "ended_share", "repetition")]
    names = ("tokens, mean (95 % interval)", "ended by themselves", "repeated 4-grams")
    terminal.table(f"answers to {found['after']['answers']} held-out prompts", ["", "before", "after"],
                   [[name, *row] for name, row in zip(names, cells, strict=True)])


def _shown(name: str, of: Mapping[str, Any]) -> str:
    if name != "tokens_mean":
        return f"{of[name]:.1%}"
    low, high = of["tokens_low"], of["tokens_high"]
    return f"{of[name]:.1f}" if low is None else f"{of[name]:.1f} ({low:.1f} to {high:.1f})"
