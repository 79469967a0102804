"""Runs a sweep's groups on Slurm: an audit and a scoring job a group, then an array of trainings; waits for them."""
from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo_dist.config.errors import UserError
from dpo_dist.launcher.plan import plan_stages
from dpo_dist.launcher.slurm import (
    BatchJob,
    describe,
    is_alive,
    job_name,
    record,
    recorded_jobs,
    render,
    submit_jobs,
    wait_for,
)
from dpo_dist.launcher.sweep.groups import Group, Job, audits_of
from dpo_dist.runtime.run_dir import RunDir


@dataclass(frozen=True)
class Submitted:
    """Slurm's ids of a group's jobs: the scoring job (None if none), and the array, whose task i is training i."""

    score: str | None
    array: str


def run_groups(groups: Sequence[Group]) -> dict[Path, str]:
    """Returns when no job is left. Why a job failed is in its run's folder, so nothing is returned here.

    Jobs that an earlier invocation submitted, and that are still pending or running, are waited for and not submitted
    again.
    """
    alive = {job.run_dir: number for group in groups for job in group.jobs if (number := _alive(job))}
    fresh = [Group(jobs, group.score) for group in groups
             if (jobs := tuple(job for job in group.jobs if job.run_dir not in alive))]
    submitted = submit(fresh)
    for group, ids in zip(fresh, submitted, strict=True):
        after = f", after scoring job {ids.score}" if ids.score else ""
        print(f"sweep: {len(group.jobs)} trainings are array {ids.array}{after}", flush=True)
    if alive:
        print(f"sweep: {len(alive)} trainings were submitted before and are under way", flush=True)
    print("sweep: waiting for them; Ctrl-C ends the waiting alone, and the same command waits again", flush=True)
    wait_for([*(ids.array for ids in submitted), *alive.values()])
    return {}


def submit(groups: Sequence[Group]) -> list[Submitted]:
    """For each group an audit of its data, one scoring job, then one array whose tasks each run one training,
    cluster.jobs_at_once at a time.

    Batch scripts and the tasks' overrides are written beside the runs, where every node sees them. An array starts when
    its own group's scoring has succeeded, and is cancelled when that has failed; a failed training stops no other. Each
    run's job ids are kept in its <run.dir>/slurm.json, which `dpo-dist status` reads. UserError where a group's
    trainings differ in `cluster`, or Slurm refuses a job.
    """
    submitted = []
    for group, folder in _with_folders(groups):
        jobs = _batch_jobs(group, folder)
        folder.mkdir(parents=True, exist_ok=True)
        _tasks_file(folder).write_text(_task_lines(group))
        ids = submit_jobs(jobs)
        for i, job in enumerate(group.jobs):
            RunDir(job.run_dir).make(job.config.run.readable_by)
            record(job.run_dir, {**ids, "train": f"{ids['train']}_{i}"})
        submitted.append(Submitted(ids.get("score"), ids["train"]))
    return submitted


def rendered(groups: Sequence[Group]) -> str:
    """The batch scripts and sbatch commands that `submit` would use, for --dry-run. Starts and writes nothing."""
    return "\n".join(text for group, folder in _with_folders(groups)
                     for text in (describe(_batch_jobs(group, folder)), f"# ---- {_tasks_file(folder)}",
                                  _task_lines(group)))


def _with_folders(groups: Sequence[Group]) -> list[tuple[Group, Path]]:
    """Each group's folder, named by its tasks: a later command never changes lines that a running array still reads."""
    return [(group, group.jobs[0].run_dir.parent / "slurm"
             / f"group-{hashlib.sha256(_task_lines(group).encode()).hexdigest()[:8]}")
            for group in groups]


def _batch_jobs(group: Group, folder: Path) -> list[BatchJob]:
    first = group.jobs[0].config
    if any(job.config.cluster != first.cluster for job in group.jobs):
        raise UserError("the trainings of a sweep differ in `cluster`, but one array has one shape; sweep over other "
                        "keys")
    (train,) = plan_stages("train", first, ()).stages
    if train.server_nodes:
        raise UserError(f"reference.nodes={train.server_nodes} with reference.mode=live would give each task of an "
                        "array nodes of its own for servers, which Slurm does not do; set reference.mode=cached")
    name, jobs = str(folder.parent.parent), _audit_jobs(group, folder)
    before = tuple(job.name for job in jobs)
    if group.score is not None:
        (score,) = plan_stages("score", group.score.config, group.score.overrides).stages
        script = render(score, group.score.config, job_name(name, "score"), folder / "score-%j.out",
                        run_dir=str(group.score.run_dir))
        jobs.append(BatchJob("score", script, folder / "score.sbatch", score.overrides, before))
        before = ("score",)
    array = f"0-{len(group.jobs) - 1}" + (f"%{first.cluster.jobs_at_once}" if first.cluster.jobs_at_once else "")
    script = render(train, first, job_name(name, "train"), folder / "train-%a-%A.out", tasks=_tasks_file(folder),
                    array=array)
    return [*jobs, BatchJob("train", script, folder / "train.sbatch", (), before)]


def _audit_jobs(group: Group, folder: Path) -> list[BatchJob]:
    """One for each set of data; all jobs of a group that is scored have the same."""
    jobs, name = [], str(folder.parent.parent)
    for at, audit in enumerate(audits_of(group.jobs)):
        title = f"audit-{at}" if at else "audit"
        (stage,) = plan_stages("audit", audit.config, audit.overrides).stages
        script = render(stage, audit.config, job_name(name, title), folder / f"{title}-%j.out",
                        run_dir=str(audit.run_dir))
        jobs.append(BatchJob(title, script, folder / f"{title}.sbatch", stage.overrides))
    return jobs


def _tasks_file(folder: Path) -> Path:
    return folder / "tasks"


def _task_lines(group: Group) -> str:
    return "".join(shlex.join([str(job.run_dir), *job.overrides]) + "\n" for job in group.jobs)


def _alive(job: Job) -> str | None:
    number = recorded_jobs(job.run_dir).get("train")
    return number if number and is_alive(number) else None
