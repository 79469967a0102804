"""`dpo-dist harness`, and the last stage of `run` with eval.harness.tasks: lm-evaluation-harness' tasks on
<run.dir>/model, in a process of its own, whose results become <run.dir>/harness.json.

Its libraries (scipy, scikit-learn, ...) are imported by transformers wherever they are installed, so they may live in
another environment: eval.harness.python.
"""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from dpo_dist.config.errors import UserError
from dpo_dist.config.schema import RunConfig
from dpo_dist.data.prepare import digests_folder
from dpo_dist.models.digest import model_digest
from dpo_dist.models.whole import check_whole
from dpo_dist.run.lm_eval import check_harness, run_harness
from dpo_dist.runtime.ending import exit_with
from dpo_dist.runtime.files import write_json
from dpo_dist.runtime.json_files import found_sealed, sealed
from dpo_dist.runtime.process import run_entry
from dpo_dist.runtime.run_dir import RunDir
from dpo_dist.runtime.terminal import Terminal
from dpo_dist.runtime.world import World


def harness(config: RunConfig, world: World, terminal: Terminal) -> None:
    """Runs the tasks, unless harness.json is of this model and these keys already."""
    wanted, run_dir = config.eval.harness, RunDir(config.run_dir)
    if not wanted.tasks:
        raise UserError("eval.harness.tasks=[] names no task; set eval.harness.tasks=[arc_easy]")
    if not (run_dir.model / "config.json").exists():
        raise UserError(f"run.dir={run_dir.path} holds no model/ to evaluate; train it, or run dpo-dist export")
    check_harness(wanted)
    check_whole(run_dir.model, "model", digests_folder(config.data))
    of = {"weights": model_digest(run_dir.model, digests_folder(config.data)), "tasks": list(wanted.tasks),
          "files": _texts(wanted.path), "arguments": list(wanted.arguments)}
    if (found_sealed(run_dir.harness_json) or {}).get("of") == of:
        terminal.say(f"nothing to do: {run_dir.harness_json} is of this model and these tasks")
        return
    terminal.say(f"lm-evaluation-harness: {', '.join(wanted.tasks)}")
    found = run_harness(config, run_dir, world)
    write_json(run_dir.harness_json, sealed({"of": of, **found}))
    rows = [[task, name, f"{value:.4f}", _error(values, name)] for task, values in found["results"].items()
            for name, value in values.items() if isinstance(value, float) and "_stderr" not in name]
    terminal.table("lm-evaluation-harness", ["task", "metric, filter", "value", "±"], rows)
    terminal.say(f"written to {run_dir.harness_json}")


def _texts(path: str | None) -> dict[str, str]:
    """{name: content} of the tasks' own YAML files: another content is another task."""
    files = [] if path is None else sorted(Path(path).rglob("*.yaml"))
    return {str(file.relative_to(str(path))): file.read_text() for file in files}


def _error(values: dict[str, Any], name: str) -> str:
    metric, _, filtered = name.partition(",")
    error = values.get(f"{metric}_stderr,{filtered}")
    return f"{error:.4f}" if isinstance(error, float) else "-"


if __name__ == "__main__":
    exit_with(run_entry(sys.argv[1:], harness))
