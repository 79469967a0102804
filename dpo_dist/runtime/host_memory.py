"""How much memory this machine can still give: what the kernel says, and what the process's control group allows."""
from __future__ import annotations

from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int:
    """Of memory that can be had without swapping; 0 where the kernel does not say."""
    try:
        fields = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        free = 1024 * int(fields["MemAvailable"].split()[0])
    except (OSError, ValueError, KeyError):
        return 0
    return min([free, *_left_of_groups()])


def _left_of_groups() -> list[int]:
    """What the limit of each control group that this process is in (cgroup v2) leaves; empty without limits."""
    try:
        own = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2].lstrip("/")
    except OSError:
        own = ""
    left, folder = [], CGROUP / own
    while folder.is_relative_to(CGROUP):
        try:
            limit = (folder / "memory.max").read_text().strip()
            if limit != "max":
                # what files have cached goes when memory is asked for
                cached = next(int(line.split()[1]) for line in (folder / "memory.stat").read_text().splitlines()
                              if line.startswith("file "))
                left.append(int(limit) - int((folder / "memory.current").read_text()) + cached)
        except (OSError, ValueError, StopIteration):
            pass                                         # no such group, or the first one, which has no limit
        folder = folder.parent
    return left
