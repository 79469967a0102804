"""Where a run is, told from its folder and, where there is one, from Slurm."""
from __future__ import annotations

import json
from pathlib import Path

from dpo_dist.config.errors import UserError
from dpo_dist.launcher.slurm import job_states, recorded_jobs
from dpo_dist.runtime.run_dir import RunDir


def status(run_dir: Path) -> str:
    """A few lines: how the run stands, its last step, its checkpoints, its jobs. UserError where there is no run."""
    folder, jobs = RunDir(run_dir), recorded_jobs(run_dir)
    if not folder.logs.is_dir() and not jobs:
        raise UserError(f"{run_dir} holds no run; give the run.dir of one, as in: dpo-dist status runs/my-run")
    saved = ", ".join(checkpoint.name for checkpoint in folder.checkpoints())
    return "\n".join([f"run       {run_dir}", f"state     {folder.state()}", f"step      {_last_step(folder)}",
                      f"saved     {saved or 'nothing yet'}",
                      *(f"{stage:<9} job {job}: {_job_state(job)}" for stage, job in jobs.items())])


def _job_state(job: str) -> str:
    try:
        return ", ".join(job_states(job)) or "Slurm knows nothing of it any more"
    except UserError as error:
        return f"unknown: {error}"


def _last_step(folder: RunDir) -> str:
    train = folder.rows("train")
    if not train:
        return "none yet"
    written = folder.run_json
    most = json.loads(written.read_text())["config"]["train"]["max_steps"] if written.exists() else None
    return f"{train[-1]['step']}{f' of {most}' if most else ''}, loss {float(train[-1]['loss']):.4f}"
