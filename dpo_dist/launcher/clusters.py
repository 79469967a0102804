"""What the modules of a cluster do for the command line: launcher/<name>.py, and launcher/sweep/run_<name>.py."""
from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from dpo_dist.config.schema import RunConfig
from dpo_dist.launcher.plan import LaunchPlan


class Launcher(Protocol):
    def start(self, launch: LaunchPlan, config: RunConfig, dry_run: bool) -> int:
        """Runs or submits the stages; the command's exit code. dry_run: only shows what would be submitted."""

    def commands(self, launch: LaunchPlan, config: RunConfig) -> dict[str, list[str]]:
        """{stage: the command line that starts or submits it}."""


class SweepLauncher(Protocol):
    def run_groups(self, groups: Sequence[Any]) -> dict[Path, str]:
        """Runs the jobs of a sweep (sweep/groups.py) and waits; {run.dir: why} of those that could not be started."""

    def rendered(self, groups: Sequence[Any]) -> str:
        """What would be submitted, as text. UserError where nothing is."""


def launcher_of(config: RunConfig) -> Launcher:
    return cast(Launcher, import_module(f"dpo_dist.launcher.{config.cluster.name}"))


def sweep_launcher_of(config: RunConfig) -> SweepLauncher:
    return cast(SweepLauncher, import_module(f"dpo_dist.launcher.sweep.run_{config.cluster.name}"))
