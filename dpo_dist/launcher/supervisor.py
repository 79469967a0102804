"""Starts the ranks of one machine, passes signals on to them, and tells which one failed. Torch is started, never
imported.

Ranks are this process's own children, one a rank, so it sees itself which of them ended first and by what. A rank leads
a session of its own: a Ctrl-C in the terminal comes to this process alone, which passes it on.
"""
from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dpo_dist.config.errors import UserError
from dpo_dist.runtime.run_dir import DONE, FAILED, PREEMPTED, Failure, RunDir

TAIL_LINES = 20
SECONDS_BETWEEN_LOOKS = 0.1
SIGNALS_TO_END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
SECONDS_FOR_SURVIVORS = 10.0           # that the ranks beside a failed one get before they are killed
# How ranks end that only saw another one go: the supervisor's own TERM, and how NCCL gives up on a lost rank.
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
                "GROUP_RANK": str(self.node),
                "WORLD_SIZE": str(self.nodes * self.procs), "LOCAL_WORLD_SIZE": str(self.procs),
                "MASTER_ADDR": self.master_addr, "MASTER_PORT": str(self.master_port)}


@dataclass(frozen=True)
class Work:
    """What every rank of a machine runs, and where it leaves its words."""

    name: str                                  # for messages: the stage
    module: str
    overrides: tuple[str, ...]
    run_dir: RunDir
    log: Path                                  # takes the ranks' stderr: what libraries say
    place: Place
    environment: Mapping[str, str]
    quiet: bool = False                        # a companion: stdout goes to the log as well, and DONE is its own


class Ranks:
    """The running ranks of a machine."""

    def __init__(self, work: Work):
        self.work = work
        try:
            work.run_dir.logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run.dir={work.run_dir.path} cannot be made: {error}; set run.dir to a folder that can be "
                            "written") from error
        work.run_dir.clear(FAILED, PREEMPTED, *([DONE] if work.quiet else []))
        captured = os.environ.get("DPO_DIST_CAPTURE") != "0"
        with work.log.open("ab") as log:
            self._log_begins = log.tell()
            self._processes = [
                subprocess.Popen([sys.executable, "-m", "dpo_dist.runtime.rank", work.module, *work.overrides],
                                 start_new_session=True,
                                 stdout=log if work.quiet else None, stderr=log if captured else None,
                                 env={**work.environment, **work.place.environment(local_rank)})
                for local_rank in range(work.place.procs)]
        self._first: tuple[int, int] | None = None               # (local rank, exit code) of the first one to fail
        self._survivors_until = float("inf")

    @property
    def running(self) -> list[subprocess.Popen[bytes]]:
        return [process for process in self._processes if process.poll() is None]

    def look(self) -> bool:
        """Whether all ranks have ended. The others are ended once one has failed."""
        running = self.running
        if self._first is None:
            self._first = _first_failure([process.returncode for process in self._processes])
            if self._first is not None:
                self.signal(signal.SIGTERM)
                self._survivors_until = time.monotonic() + SECONDS_FOR_SURVIVORS
        if running and time.monotonic() > self._survivors_until:
            self.kill()
        return not running

    def signal(self, number: int) -> None:
        for process in self.running:
            process.send_signal(number)

    def kill(self) -> None:
        """Kills the ranks with all that they started."""
        for process in self._processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass                                             # it has ended, and so has all that it started

    def end(self) -> None:
        """Asks the ranks to keep what they have and to end; kills those that do not."""
        self.signal(signal.SIGTERM)
        until = time.monotonic() + SECONDS_FOR_SURVIVORS
        while self.running and time.monotonic() < until:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        if self.running:
            self.kill()

    @property
    def code(self) -> int:
        """Of the first rank that failed, as subprocess has it: negative where a signal ended it. 0 where none
        failed."""
        return 0 if self._first is None else self._first[1]

    @property
    def failed_rank(self) -> int:
        """The first rank that failed, among those of all machines."""
        return self.work.place.node * self.work.place.procs + (self._first[0] if self._first else 0)

    def stderr(self) -> str:
        """What the ranks wrote to the log since they began."""
        return self.work.log.read_bytes()[self._log_begins:].decode(errors="replace")


def _first_failure(codes: Sequence[int | None]) -> tuple[int, int] | None:
    """(local rank, exit code). Of ranks that are found ended in one look, one that a signal ended comes before those
    that saw it go."""
    failed = [(rank, code) for rank, code in enumerate(codes) if code]
    killed = [(rank, code) for rank, code in failed if code < 0 and -code not in CONSEQUENCES]
    return next(iter(killed or failed), None)


# -------------------------------------------------------------------------------------------------------------- running


def run(work: Work, received: Sequence[int], companions: Sequence[Work] = ()) -> int:
    """Starts the ranks, beside companions that serve them, and waits; the exit code. What the ranks tell a person
    passes through.

    received: see `receiving`. A signal goes to all ranks, which save first (runtime/preemption.py); a second Ctrl-C
    kills them. 128 and the signal's number where one ended the work in good order.
    """
    run_dir, beside = work.run_dir, list[Ranks]()
    try:
        for companion in companions:
            beside.append(Ranks(companion))
        ranks = Ranks(work)
        _wait(ranks, beside, received)
    finally:
        for companion_ranks in beside:
            companion_ranks.end()
    if (stopped_by := run_dir.preempted_by()) is not None:
        return 128 + stopped_by
    if not ranks.code:
        return 0
    if received and _ended_by(received, ranks):
        run_dir.clear(FAILED)                                    # of a rank that only saw another one go
        return ended_early(received, f"in the {work.name} stage", work.place)
    return report_failure(ranks)


def _wait(ranks: Ranks, companions: Sequence[Ranks], received: Sequence[int]) -> None:
    """Until the ranks have ended. A companion that ends before its work is done is marked FAILED, which the ranks will
    see: they go as far as they can."""
    serving, passed = list(companions), 0
    while not ranks.look():
        time.sleep(SECONDS_BETWEEN_LOOKS)
        if len(received) > passed:
            _pass_on(received[passed:], received.count(signal.SIGINT) > 1, [ranks, *serving])
            passed = len(received)
        for companion in [companion for companion in serving if companion.look()]:
            serving.remove(companion)
            _mark_ended(companion)


def _pass_on(numbers: Sequence[int], at_once: bool, running: Sequence[Ranks]) -> None:
    if at_once:
        for ranks in running:
            ranks.kill()
        return
    if signal.SIGINT in numbers:
        print("stopping after this step, with a checkpoint; Ctrl-C again ends at once", file=sys.stderr, flush=True)
    for ranks in running:
        for number in numbers:
            ranks.signal(_passed(number))


def _passed(number: int) -> int:
    """The signal that ranks are sent for it: they do not know HUP."""
    return signal.SIGTERM if number == signal.SIGHUP else number


def _mark_ended(companion: Ranks) -> None:
    run_dir = companion.work.run_dir
    if not run_dir.is_done and run_dir.failure() is None:
        run_dir.mark_failed(Failure(f"the {companion.work.name} stage ended with code {companion.code}; its logs are "
                                    f"in {run_dir.logs}", 1))


def _ended_by(received: Sequence[int], ranks: Ranks) -> bool:
    """Whether a signal that was passed on ended the ranks, which were not listening yet or have nothing to save."""
    passed = {_passed(number) for number in received} | ({signal.SIGKILL} if received.count(signal.SIGINT) > 1
                                                         else set())
    return -ranks.code in passed if ranks.code < 0 else ranks.work.run_dir.failure() is None


def ended_early(received: Sequence[int], where: str, place: Place | None = None) -> int:
    """Tells the person that a signal ended the work; the exit code."""
    number = signal.Signals(received[0])
    if place is not None and place.nodes > 1:
        print(f"node {place.node}: ended by {number.name.removeprefix('SIG')} before its ranks had begun to work",
              file=sys.stderr)
    else:
        print(f"ended by {number.name} {where}; the same command goes on from there", file=sys.stderr)
    return 128 + number


@contextmanager
def receiving(*numbers: signal.Signals) -> Iterator[list[int]]:
    """Those of these signals that came meanwhile, in order; one that is ignored (nohup) stays so. Noted, not raised: an
    exception in the middle of a start would lose the process."""
    received: list[int] = []
    former = {number: signal.getsignal(number) for number in numbers}
    heard = [number for number, handler in former.items() if handler is not signal.SIG_IGN]
    note: Callable[..., None] = lambda number, frame: received.append(number)      # noqa: E731
    for number in heard:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number in heard:
            signal.signal(number, former[number])


# ------------------------------------------------------------------------------------------------------------- failures


def report_failure(ranks: Ranks) -> int:
    """Tells the person which rank failed, why, and where to read on; the exit code."""
    run_dir, place = ranks.work.run_dir, ranks.work.place
    rank_log = run_dir.rank_log(ranks.failed_rank)
    # it could not speak; what the others say is only that it is gone
    if ranks.code < 0:
        number = signal.Signals(-ranks.code)
        why = " (by the system, where memory ran out)" if number == signal.SIGKILL else ""
        message = f"rank {ranks.failed_rank} was ended by {number.name}{why}"
        run_dir.mark_failed(Failure(message, 1, ranks.failed_rank, place.node))
        print("\n".join([*_tail(rank_log), f"error: {message}; its log is {rank_log}"]), file=sys.stderr)
        return 1
    failure = run_dir.failure()
    if failure is not None and failure.node == place.node:
        if failure.exit_code == 1:
            print("\n".join(_tail(run_dir.rank_log(failure.rank))), file=sys.stderr)
        print(f"error: {failure.message}", file=sys.stderr)
        return failure.exit_code
    lines = ranks.stderr().splitlines()
    # before there was a folder to leave a marker in
    errors = [line for line in lines if line.startswith("error: ")]
    if errors:
        print(errors[-1], file=sys.stderr)
        return 2
    print("\n".join([*lines[-TAIL_LINES:], f"error: the {ranks.work.name} stage ended with code {ranks.code}; its logs "
                                           f"are in {run_dir.logs}"]), file=sys.stderr)
    return ranks.code if ranks.code < 256 else 1


def _tail(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-TAIL_LINES:] if log.exists() else []


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
