"""Runs a sweep's groups on Slurm: a scoring job a group and an array of trainings after it; then waits, so that results can be compared."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dpo_dist.launcher.slurm import SweepGroup, Task, is_alive, recorded_jobs, render_sweep, submit_sweep, wait_for
from dpo_dist.launcher.sweep import Group, Job


def run_groups(groups: Sequence[Group]) -> dict[Path, str]:
    """Returns when no job is left, however each ended; nothing is known here of why (hence {}): each run's folder says it.

    Jobs that an earlier invocation submitted, and that are still pending or running, are waited for and not submitted again.
    """
    alive = {job.run_dir: number for group in groups for job in group.jobs if (number := _alive(job))}
    fresh = [Group(jobs, group.score) for group in groups if (jobs := tuple(job for job in group.jobs if job.run_dir not in alive))]
    submitted = submit_sweep(_tasks(fresh), *_folder_and_limit(fresh)) if fresh else []
    for group, ids in zip(fresh, submitted, strict=True):
        after = f", after scoring job {ids.score_job}" if ids.score_job else ""
        print(f"sweep: {len(group.jobs)} trainings are array {ids.array_job}{after}", flush=True)
    if alive:
        print(f"sweep: {len(alive)} trainings were submitted before and are under way", flush=True)
    print("sweep: waiting for them; Ctrl-C ends the waiting alone, and the same command waits again", flush=True)
    wait_for([*(ids.array_job for ids in submitted), *alive.values()])
    return {}


def rendered(groups: Sequence[Group]) -> str:
    """The batch scripts and commands that `run_groups` would use."""
    return render_sweep(_tasks(groups), *_folder_and_limit(groups))


def _alive(job: Job) -> str | None:
    number = recorded_jobs(job.run_dir).get("train")
    return number if number and is_alive(number) else None


def _tasks(groups: Sequence[Group]) -> list[SweepGroup]:
    def task(job: Job) -> Task:
        return Task(job.config, job.overrides)

    return [SweepGroup(task(group.score) if group.score else None, tuple(task(job) for job in group.jobs)) for group in groups]


def _folder_and_limit(groups: Sequence[Group]) -> tuple[Path, int | None]:
    first = groups[0].jobs[0]
    return first.run_dir.parent / "slurm", first.config.cluster.jobs_at_once
