"""Where a run is, told from its folder and, where there is one, from Slurm."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from dpo_dist.config.errors import UserError
from dpo_dist.launcher.slurm import job_states, recorded_jobs
from dpo_dist.runtime.best import best_evaluation
from dpo_dist.runtime.json_files import found_object
from dpo_dist.runtime.run_dir import WRITTEN_ANEW, RunDir


def status(run_dir: Path) -> str:
    """A few lines: how the run stands, its last step, its checkpoints, its jobs. UserError where there is no run."""
    folder, jobs = RunDir(run_dir), recorded_jobs(run_dir)
    if not folder.logs.is_dir() and not jobs:
        raise UserError(f"{run_dir} holds no run; give the run.dir of one, as in: dpo-dist status runs/my-run")
    saved = ", ".join(checkpoint.name for checkpoint in folder.checkpoints())
    damaged = [f"damaged   run.json cannot be read; {WRITTEN_ANEW}"] * (
        folder.run_json.exists() and found_object(folder.run_json) is None)
    return "\n".join([f"run       {run_dir}", f"state     {folder.state()}", f"step      {_last_step(folder)}",
                      f"saved     {saved or 'nothing yet'}", *damaged, *_best(folder), *_on_the_hub(folder),
                      *(f"{stage:<9} job {job}: {_job_state(job)}" for stage, job in jobs.items())])


def _best(folder: RunDir) -> list[str]:
    metric = _train(folder).get("keep_best")
    found = best_evaluation(folder, metric) if isinstance(metric, str) else None
    return [] if found is None else [f"best      {folder.checkpoint(found['step']).name}: held-out {metric} "
                                     f"{float(found[str(metric)]):.4f}"]


def _on_the_hub(folder: RunDir) -> list[str]:
    if not folder.pushed_json.exists():
        return []
    return [f"uploaded  {(found_object(folder.pushed_json) or {}).get('commit', 'pushed.json cannot be read')}"]


def _train(folder: RunDir) -> dict[str, Any]:
    """The section train of the run's config; empty where it is not known."""
    config = (found_object(folder.run_json) or {}).get("config")
    train = config.get("train") if isinstance(config, dict) else None
    return train if isinstance(train, dict) else {}


def _job_state(job: str) -> str:
    try:
        return ", ".join(job_states(job)) or "Slurm knows nothing of it any more"
    except UserError as error:
        return f"unknown: {error}"


def _last_step(folder: RunDir) -> str:
    train = folder.rows("train")
    if not train:
        return "none yet"
    most = _train(folder).get("max_steps")
    return f"{train[-1]['step']}{f' of {most}' if most else ''}, loss {float(train[-1].get('loss', 'nan')):.4f}"
