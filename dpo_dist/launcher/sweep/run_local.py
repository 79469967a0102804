"""Runs a sweep's groups on this machine: each set of data is audited once, each group's reference scored once, on all
devices; then the trainings, in turn or several at a time. Every one is the command that a person would type."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dpo_dist.config.errors import UserError
from dpo_dist.launcher.local import NOTHING_SUBMITTED
from dpo_dist.launcher.sweep.groups import Group, Job, audit_of, audits_of
from dpo_dist.launcher.sweep.processes import Command, Place, places, run_commands
from dpo_dist.launcher.sweep.results import read_result


def run_groups(groups: Sequence[Group]) -> dict[Path, str]:
    """{run.dir: why not} of the jobs that could not be started. A failed one does not stop the others."""
    # UserErrors before anything starts
    where = {job.run_dir: places(job.config.cluster) for group in groups for job in group.jobs}
    why_not = _audit([job for group in groups for job in group.jobs])
    ready: list[Job] = []
    for group in groups:
        if all(job.run_dir in why_not for job in group.jobs):
            continue
        if group.score is not None:
            print(f"sweep: the reference of {len(group.jobs)} jobs is scored", flush=True)
            if run_commands([Command(("score", *group.score.overrides))], [{}]) != [0]:
                why_not |= {job.run_dir: "its reference could not be scored, see above" for job in group.jobs}
                continue
        ready += [job for job in group.jobs if job.run_dir not in why_not]
    if ready:
        _train(ready, where[ready[0].run_dir])
    return why_not


def _audit(jobs: Sequence[Job]) -> dict[Path, str]:
    """{run.dir: why} of the jobs whose data are not to be trained on."""
    audits = audits_of(jobs)
    codes = run_commands([Command(("audit", *audit.overrides)) for audit in audits], [{}])
    ended = {audit.run_dir for audit, code in zip(audits, codes, strict=True) if code}
    return {job.run_dir: f"the audit of its data ended it, see above and {folder}" for job in jobs
            if (folder := audit_of(job).run_dir) in ended}


def rendered(groups: Sequence[Group]) -> str:
    raise UserError(NOTHING_SUBMITTED)


def _train(jobs: Sequence[Job], where: Sequence[Place]) -> None:
    def output(job: Job) -> Path | None:
        return job.run_dir / "logs" / "console.log" if len(where) > 1 else None

    def began(i: int) -> None:
        place = f"; its output: {output(jobs[i])}" if len(where) > 1 else ""
        print(f"sweep: job {i + 1} of {len(jobs)}: {jobs[i].name}{place}", flush=True)

    def ended(i: int, code: int, seconds: float) -> None:
        result = read_result(jobs[i])
        state = "done" if result.done else f"failed: {result.message}"
        print(f"sweep: job {i + 1} of {len(jobs)} ended after {seconds:.0f} s: {jobs[i].name}: {state}", flush=True)

    run_commands([Command(("train", *job.overrides), output(job)) for job in jobs], where, began, ended)
