"""Where a run is, told from its folder and, where there is one, from Slurm."""
from __future__ import annotations

import json
from pathlib import Path

from dpo_dist.config.errors import UserError
from dpo_dist.launcher.slurm import job_states, recorded_jobs
from dpo_dist.runtime.run_dir import RunDir


def status(run_dir: Path) -> str:
    """A few lines: how the run stands, its last step, its checkpoints, its jobs. UserError where there is no run."""
    if not RunDir(run_dir).logs.is_dir() and not recorded_jobs(run_dir):
        raise UserError(f"{run_dir} holds no run; give the run.dir of one, as in: dpo-dist status runs/my-run")
    lines = [f"run       {run_dir}", f"state     {RunDir(run_dir).state()}", f"step      {_last_step(run_dir)}"]
    saved = ", ".join(folder.name for folder in RunDir(run_dir).checkpoints())
    lines.append(f"saved     {saved or 'nothing yet'}")
    for stage, job in recorded_jobs(run_dir).items():
        lines.append(f"{stage:<9} job {job}: {_job_state(job)}")
    return "\n".join(lines)


def _job_state(job: str) -> str:
    try:
        return ", ".join(job_states(job)) or "Slurm knows nothing of it any more"
    except UserError as error:
        return f"unknown: {error}"


def _last_step(run_dir: Path) -> str:
    metrics, written = RunDir(run_dir).metrics, RunDir(run_dir).run_json
    if not metrics.exists():
        return "none yet"
    rows = [json.loads(line) for line in metrics.read_text().splitlines() if line.endswith("}")]
    train = [row for row in rows if row["split"] == "train"]
    if not train:
        return "none yet"
    most = json.loads(written.read_text())["config"]["train"]["max_steps"] if written.exists() else None
    return f"{train[-1]['step']}{f' of {most}' if most else ''}, loss {float(train[-1]['loss']):.4f}"
