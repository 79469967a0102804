"""The processes of one machine's ranks. Torch is started, never imported.

A rank leads a session of its own: a Ctrl-C in the terminal comes to the launcher alone, which passes it on.
"""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import BinaryIO

from dpo_dist.launcher.restarts import USERS_MISTAKE
from dpo_dist.runtime.run_dir import DONE, FAILED, PREEMPTED, RunDir

SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_FOR_STACKS = 0.5               # for them to write where they are, before they are asked to end
SECONDS_FOR_SURVIVORS = 10.0           # for the other ranks to end after one failed, before they are killed
# Signals that end ranks after another rank failed: the launcher's own TERM, and NCCL's ABRT for a lost rank.
CONSEQUENCES = (signal.SIGTERM, signal.SIGABRT)


@dataclass(frozen=True)
class Place:
    """Where the ranks of a machine stand among all: node `node` of `nodes`, each with `procs` processes."""

    procs: int
    node: int = 0
    nodes: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0

    def environment(self, local_rank: int) -> dict[str, str]:
        """What a rank reads of its place; nothing for a process that is alone."""
        if self.nodes * self.procs == 1:
            return {}
        return {"RANK": str(self.node * self.procs + local_rank), "LOCAL_RANK": str(local_rank),
                "GROUP_RANK": str(self.node), "WORLD_SIZE": str(self.nodes * self.procs),
                "LOCAL_WORLD_SIZE": str(self.procs), "MASTER_ADDR": self.master_addr,
                "MASTER_PORT": str(self.master_port)}


@dataclass(frozen=True)
class Work:
    """What every rank of a machine runs, and where its output goes."""

    name: str                                  # for messages: the stage
    module: str
    overrides: tuple[str, ...]
    run_dir: RunDir
    log: Path                                  # takes the ranks' stderr: what libraries say
    place: Place
    environment: Mapping[str, str]
    quiet: bool = False                        # a companion: stdout goes to the log as well, and DONE is its own
    timeout_seconds: float = inf               # cluster.timeout_seconds

    @property
    def stopped_seconds(self) -> float:
        """How long a rank may be stopped (SIGSTOP) until it is given up."""
        return 2 * self.timeout_seconds


class Ranks:
    """The running ranks of a machine."""

    def __init__(self, work: Work):
        self.work = work
        work.run_dir.make()
        work.run_dir.clear(FAILED, PREEMPTED, *([DONE] if work.quiet else []))
        self._processes: list[subprocess.Popen[bytes]] = []
        with work.log.open("ab") as log:
            self._log_begins = log.tell()
            try:
                for local_rank in range(work.place.procs):
                    self._processes.append(self._start(local_rank, log))
            except BaseException:
                self.kill()                                      # the others would wait for it
                raise
        self._first: tuple[int, int] | None = None               # (local rank, exit code) of the first one to fail
        self._ended_at = self._killed_at = inf                   # when those are that remain
        self._looks_at_stopped = 0                               # in a row
        self.never_woken: list[int] = []                         # local ranks that were given up

    def _start(self, local_rank: int, log: BinaryIO) -> subprocess.Popen[bytes]:
        work, captured = self.work, os.environ.get("DPO_DIST_CAPTURE") != "0"
        return subprocess.Popen([sys.executable, "-m", "dpo_dist.runtime.rank", work.module, *work.overrides],
                                start_new_session=True, stdin=subprocess.DEVNULL,
                                stdout=log if work.quiet else None, stderr=log if captured else None,
                                env={**work.environment, **work.place.environment(local_rank),
                                     "DPO_DIST_LAUNCHER": str(os.getpid())})

    @property
    def running(self) -> list[subprocess.Popen[bytes]]:
        return [process for process in self._processes if process.poll() is None]

    def look(self) -> bool:
        """Whether all ranks have ended. The others are ended once one has failed; their logs say where they were."""
        running, now = self.running, time.monotonic()
        if self._first is None:
            self._give_up_stopped()
            self._first = _first_failure([process.returncode for process in self._processes])
            if self._first is not None:
                self._ended_at = now
                if self.code != USERS_MISTAKE:                   # all find it, and one has told it
                    self.signal(signal.SIGCONT)
                    self.signal(signal.SIGUSR2)
                    self._ended_at += SECONDS_FOR_STACKS
        if now >= self._ended_at:
            self.signal(signal.SIGTERM)
            self._ended_at, self._killed_at = inf, now + SECONDS_FOR_SURVIVORS
        if running and now > self._killed_at:
            self.kill()
        return not running

    def _give_up_stopped(self) -> None:
        """Kills ranks that a SIGSTOP holds for too long: no other rank may be waiting for them. Where one is, it fails
        first, after the timeout of its collective, and its log says more. Looks are counted, not seconds, as this
        process may be stopped together with them."""
        stopped = [rank for rank, process in enumerate(self._processes) if is_stopped(process.pid)]
        self._looks_at_stopped = self._looks_at_stopped + 1 if stopped else 0
        if self._looks_at_stopped * SECONDS_BETWEEN_LOOKS > self.work.stopped_seconds:
            self.never_woken = stopped
            for rank in stopped:
                os.killpg(self._processes[rank].pid, signal.SIGKILL)

    def ended_by(self, numbers: Set[int]) -> bool:
        """Whether one of these signals ended a rank."""
        return any(-(process.returncode or 0) in numbers for process in self._processes)

    def signal(self, number: int) -> None:
        for process in self.running:
            process.send_signal(number)

    def kill(self) -> None:
        """Kills the ranks with all that they started."""
        for process in self.running:
            os.killpg(process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Asks the ranks to keep what they have and to end; kills those that do not."""
        self.signal(signal.SIGTERM)
        until = time.monotonic() + SECONDS_FOR_SURVIVORS
        while self.running and time.monotonic() < until:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        self.kill()

    @property
    def code(self) -> int:
        """Exit code of the first rank that failed, as in subprocess: negative for a signal; 0 where none failed."""
        return 0 if self._first is None else self._first[1]

    @property
    def failed_rank(self) -> int:
        """The first rank that failed, among those of all machines."""
        return self.work.place.node * self.work.place.procs + (self._first[0] if self._first else 0)

    def stderr(self) -> str:
        """What the ranks wrote to the log since they began."""
        return self.work.log.read_bytes()[self._log_begins:].decode(errors="replace")


def is_stopped(pid: int) -> bool:
    """Whether a signal (SIGSTOP, SIGTSTP) holds the process, as Linux tells it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except (OSError, IndexError):
        return False


def _first_failure(codes: Sequence[int | None]) -> tuple[int, int] | None:
    """(local rank, exit code) of the first failure. If several are found at once, one that a signal killed comes before
    those that only lost a peer."""
    failed = [(rank, code) for rank, code in enumerate(codes) if code]
    killed = [(rank, code) for rank, code in failed if code < 0 and -code not in CONSEQUENCES]
    return next(iter(killed or failed), None)
