"""`dpo-dist doctor [overrides]`: checks this machine for whatever would stop a run, and names a remedy for each."""
from __future__ import annotations

import os
import sys
from collections.abc import Callable

from dpo_dist.config.schema import RunConfig
from dpo_dist.launcher.doctor.devices import compiled_ops, devices
from dpo_dist.launcher.doctor.finding import Finding
from dpo_dist.launcher.doctor.folders import clock, disk, shared_folder
from dpo_dist.launcher.doctor.network import ports
from dpo_dist.launcher.doctor.services import slurm, wandb
from dpo_dist.launcher.doctor.versions import versions

# The most fundamental first. A check that does not apply (no Slurm here) returns None.
CHECKS: dict[str, Callable[[RunConfig], Finding | None]] = {
    "versions": versions,
    "devices": devices,
    "compiled ops": compiled_ops,
    "ports": ports,
    "shared folder": shared_folder,
    "clock": clock,
    "disk": disk,
    "wandb": wandb,
    "slurm": slurm,
}
UNSET = "unset"                    # a machine can be checked before a model is chosen


def doctor(config: RunConfig) -> int:
    """Prints a line a check, and its remedy where it is red. 0 if nothing is red, else 1."""
    red = 0
    for name, check in CHECKS.items():
        finding = check(config)
        if finding is None:
            continue
        red += not finding.ok
        print(f"{_mark(finding.ok)}  {name:<14} {finding.text}", flush=True)
        if not finding.ok:
            print(f"{'':<21}remedy: {finding.remedy}", flush=True)
    print("ready" if not red else f"{red} of these checks would stop a run, or make its results doubtful")
    return 1 if red else 0


def with_model(overrides: list[str]) -> list[str]:
    """The overrides with a stand-in for model.path, the one key that has no default, where they do not set it."""
    named = any(word.lstrip("+").startswith(("model.path=", "experiment=")) for word in overrides)
    return overrides if named else [f"model.path={UNSET}", *overrides]


def _mark(ok: bool) -> str:
    word, colour = ("ok ", 32) if ok else ("RED", 31)
    return f"\033[{colour}m{word}\033[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else word
