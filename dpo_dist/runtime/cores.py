"""How many processor cores this process may use."""
from __future__ import annotations

import os
from pathlib import Path

CGROUP_LIMIT = Path("/sys/fs/cgroup/cpu.max")          # "400000 100000": 4 cores' time; "max 100000": no limit


def usable_cores(limit: Path = CGROUP_LIMIT) -> frozenset[int]:
    """The numbers of the cores that this process may run on: as many as a container's share of time is worth."""
    cores = sorted(os.sched_getaffinity(0))
    try:
        quota, period = limit.read_text().split()
        cores = cores[:max(1, int(quota) // int(period))]
    except (OSError, ValueError):                      # no such file, or no limit
        pass
    return frozenset(cores)
