"""The kinds of faults: a literal table."""
from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass

from . import damage, signals
from .trial import Trial
from .verdict import Verdict


@dataclass(frozen=True)
class Kind:
    strike: Callable[[Trial], Verdict]
    share: int                                 # of the trials, beside the others'
    bases: tuple[str, ...] = ()                # configurations that it fits; all where empty
    needs: tuple[str, ...] = ()                # rights and tools: see campaign.py


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
}
