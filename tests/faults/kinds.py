"""The kinds of faults: a literal table."""
from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass

from . import clocks, crowds, damage, disks, leftovers, mistakes, places, signals, starts
from .rights import MOUNTS, NETWORK, PRELOAD
from .trial import Trial
from .verdict import Verdict


@dataclass(frozen=True)
class Kind:
    strike: Callable[[Trial], Verdict]
    share: int                                 # of the trials, beside the others'
    bases: tuple[str, ...] = ()                # configurations that it fits; all where empty
    needs: tuple[str, ...] = ()                # of the machine: see rights.py


# those that take longest, or that need what a machine may not have, are left out of the test suite
LONG = ("sigstop_for_good", "fresh_start", "cut_link")
TWO_RANKS = ("zero3", "zero2", "lora", "best")

KINDS: dict[str, Kind] = {
    "sigkill": Kind(signals.killed(signal.SIGKILL), 5),
    "sigterm": Kind(signals.killed(signal.SIGTERM), 5),
    "sigint": Kind(signals.killed(signal.SIGINT), 4),
    "sigusr1": Kind(signals.killed(signal.SIGUSR1), 4),
    "sighup": Kind(signals.killed(signal.SIGHUP), 4),
    "sigkill_thrice": Kind(signals.killed(signal.SIGKILL, times=3), 4),
    "sigstop_for_a_while": Kind(signals.paused, 4),
    "sigstop_for_good": Kind(signals.stopped_for_good, 3, TWO_RANKS),
    "truncated_file": Kind(damage.damaged(damage.truncate), 7),
    "flipped_bit": Kind(damage.damaged(damage.flip), 7),
    "removed_file": Kind(damage.damaged(damage.remove), 6),
    "garbage_file": Kind(damage.damaged(damage.garbage), 6),
    "exchanged_file": Kind(damage.damaged(damage.exchange), 4),
    "leftovers": Kind(leftovers.left, 5),
    "full_disk": Kind(disks.full, 7, needs=(MOUNTS,)),
    "no_inodes": Kind(disks.no_inodes, 4, needs=(MOUNTS,)),
    "read_only_folder": Kind(disks.read_only, 5, needs=(MOUNTS,)),
    "slow_disk": Kind(disks.slow, 3, needs=(PRELOAD,)),
    "failing_disk": Kind(disks.failing, 5, needs=(PRELOAD,)),
    "times_of_files": Kind(clocks.times_of_files, 3),
    "clock_jump": Kind(clocks.jump, 4, needs=(PRELOAD,)),
    "broken_row": Kind(mistakes.broken_row, 6),
    "broken_override": Kind(mistakes.broken_override, 6),
    "jobs_on_one_cache": Kind(crowds.on_one_cache, 3),
    "jobs_on_one_run_dir": Kind(crowds.on_one_run_dir, 3),
    "another_world": Kind(places.another_world, 4, ("zero3", "zero2")),
    "cut_link": Kind(places.cut_link, 2, ("zero3",), (NETWORK,)),
    "fresh_start": Kind(starts.fresh, 3),
}
