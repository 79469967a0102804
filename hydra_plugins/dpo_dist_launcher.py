"""The Hydra launcher of dpo-dist, where Hydra looks for plugins: a namespace package, so no __init__.py here.

Hydra makes its sweepers' launcher from a class path under `hydra_plugins`, so registering a class of dpo_dist at run
time would not do. Nothing of dpo_dist is imported: other Hydra programs of the environment scan this file too.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher


class DpoDistLauncher(Launcher):
    """Hands a sweeper's whole batch of jobs to `dpo-dist run -m`, which passed its function through Hydra as the task
    function."""

    def __init__(self, objective: str):
        self._objective = objective

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self._run_jobs = task_function
        self._sweeper = config.hydra.sweeper

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """One JobReturn a job: the objective, or, where the job failed, the exception. Raises what the user must
        mend."""
        values = self._run_jobs(job_overrides, objective=self._objective, sweeper=self._sweeper)
        # Optuna's sweeper does; Hydra's own would stop at a failed job, before its next batch
        counts_failures = "max_failure_rate" in self._sweeper
        return [JobReturn(overrides=list(overrides), _return_value=value,
                          status=JobStatus.FAILED if isinstance(value, Exception) and counts_failures
                          else JobStatus.COMPLETED)
                for overrides, value in zip(job_overrides, values, strict=True)]


ConfigStore.instance().store(
    group="hydra/launcher", name="dpo_dist", provider="dpo_dist",
    node={"_target_": "hydra_plugins.dpo_dist_launcher.DpoDistLauncher", "objective": "rewards/accuracies"})
