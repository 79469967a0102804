"""Whether work that failed is started again: cluster.max_restarts. launch/restarts.sh has the same rules for several
nodes, in the shell, where there may be no Python."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dpo_dist.runtime.run_dir import RunDir

USERS_MISTAKE = 2                        # exit code: the same would come of it again


@dataclass(frozen=True)
class Fault:
    """What ended the work. own: a rank's own exception, neither a signal nor the loss of another rank."""

    message: str
    code: int
    own: bool = False
    last_lines: tuple[str, ...] = ()     # of a log that says more


class Restarts:
    """Counts a run's restarts, from 0 again wherever there is a newer checkpoint than at the last one: so a run of
    weeks survives many faults, and one that comes back at once ends it."""

    def __init__(self, run_dir: RunDir, most: int):
        self._run_dir, self._most, self._done = run_dir, most, 0
        self._last: tuple[Path | None, str] | None = None

    def next(self, fault: Fault) -> str | None:
        """How a person is told of the restart that follows; None where none does. An exception that comes again
        without a checkpoint in between is no accident."""
        if fault.code == USERS_MISTAKE:
            return None
        newest = self._run_dir.newest_checkpoint()
        what = fault.message.partition(" (rank ")[0]     # of several ranks with the same mistake any may be the first
        if self._last is None or newest != self._last[0]:
            self._done = 0
        elif fault.own and what == self._last[1]:
            return None
        if self._done >= self._most:
            return None
        self._done, self._last = self._done + 1, (newest, what)
        where = f"from {newest.name}" if newest else "from the start"
        return f"restart {self._done} of {self._most}, {where}"
