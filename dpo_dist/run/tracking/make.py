"""RunConfig → the run's Tracker. A tracker's own module, named as in `tracking.name`, is imported here alone."""
from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from dpo_dist.config.schema import RunConfig
from dpo_dist.config.tracking import NoTracking
from dpo_dist.run.tracking import MetricsRow, SampleRow, Tracker
from dpo_dist.run.tracking.metrics_file import MetricsFile
from dpo_dist.runtime.run_dir import RunDir


def open_tracker(config: RunConfig, run_dir: str | Path, is_main: bool, resumed_step: int) -> Tracker:
    """The run's tracker. Rows after `resumed_step`, which will be made again, are dropped; 0 = from the start.

    Raises UserError where W&B cannot be reached or has no login; it never asks for one.
    """
    if not is_main:
        return Trackers()
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    metrics = MetricsFile(RunDir(run_dir), resumed_step)
    if isinstance(config.tracking, NoTracking):
        return metrics
    module = import_module(f"dpo_dist.run.tracking.{config.tracking.name}")
    return Trackers(metrics, module.open_tracker(config, run_dir, resumed_step))


def check_tracker(config: RunConfig) -> None:
    """UserError where the tracker's library is missing: known before anything is computed."""
    if not isinstance(config.tracking, NoTracking):
        import_module(f"dpo_dist.run.tracking.{config.tracking.name}")


class Trackers:
    """Several trackers as one. Processes other than the main one have none: nothing is kept there."""

    def __init__(self, *trackers: Tracker):
        self._trackers = trackers

    def log(self, row: MetricsRow) -> None:
        for tracker in self._trackers:
            tracker.log(row)

    def log_samples(self, step: int, rows: Sequence[SampleRow]) -> None:
        for tracker in self._trackers:
            tracker.log_samples(step, rows)

    def finish(self, summary: MetricsRow) -> None:
        for tracker in self._trackers:
            tracker.finish(summary)
