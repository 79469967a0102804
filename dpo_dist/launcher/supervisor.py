"""Runs the ranks of one machine: passes signals on to them, and tells which one failed and why.

Ranks are this process's own children, so it sees itself which of them ended first and by what.
"""
from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dpo_dist.launcher.ranks import SECONDS_BETWEEN_LOOKS, Ranks, Work
from dpo_dist.launcher.restarts import USERS_MISTAKE, Fault, Restarts
from dpo_dist.runtime.run_dir import FAILED, PREEMPTED, Failure, RunDir

TAIL_LINES = 20
# of signals that end a rank
WHY = {signal.SIGKILL: " (by the system, where memory ran out)",
       signal.SIGABRT: " (as NCCL does it where a collective waits longer than cluster.timeout_seconds)"}


def run(work: Work, received: Sequence[int], companions: Sequence[Work] = (), max_restarts: int = 0) -> int:
    """Starts the ranks, and companions that serve them, and waits; the exit code. What ranks print passes through.

    received: see signals.py. A signal goes to all ranks, which save first (runtime/preemption.py); a second Ctrl-C
    kills them. 128 and the signal's number where one ended the work in good order. What fails of itself is started
    again, all of it (restarts.py).
    """
    restarts = Restarts(work.run_dir, max_restarts)
    while True:
        ranks, lost = _run_once(work, received, companions)
        stopped_by = work.run_dir.preempted_by()
        if stopped_by is not None and (received or not ranks.code):
            return 128 + stopped_by
        if not ranks.code:
            return 0
        work.run_dir.clear(PREEMPTED)                            # of ranks that were ended because this one failed
        if received and _ended_by(received, ranks):
            return _ended_in(work, received)
        fault = fault_of(ranks)
        again = None if received else restarts.next(lost or fault)
        if again is None:
            print("\n".join([*fault.last_lines, f"error: {fault.message}"]), file=sys.stderr, flush=True)
            return fault.code
        print(f"{(lost or fault).message}; {again}", file=sys.stderr, flush=True)


def _run_once(work: Work, received: Sequence[int], companions: Sequence[Work]) -> tuple[Ranks, Fault | None]:
    """The ranks, which have ended, as have the companions; and what ended a companion before its time."""
    beside = list[Ranks]()
    try:
        for companion in companions:
            beside.append(Ranks(companion))
        ranks = Ranks(work)
        return ranks, _wait(ranks, beside, received)
    finally:
        for companion_ranks in beside:
            companion_ranks.end()


def _wait(ranks: Ranks, companions: Sequence[Ranks], received: Sequence[int]) -> Fault | None:
    """Waits until the ranks have ended. A companion that ends before its work is done is marked FAILED; the ranks see
    the marker, and go on as far as they can. What ended it, where that was no user's mistake."""
    serving, passed, lost = list(companions), 0, None
    while not ranks.look():
        time.sleep(SECONDS_BETWEEN_LOOKS)
        if len(received) > passed:
            _pass_on(received[passed:], _at_once(received), [ranks, *serving])
            passed = len(received)
        for companion in [companion for companion in serving if companion.look()]:
            serving.remove(companion)
            lost = _mark_ended(companion) or lost
    return lost


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


def _at_once(received: Sequence[int]) -> bool:
    """A second Ctrl-C waits for nothing."""
    return received.count(signal.SIGINT) > 1


def _passed(number: int) -> int:
    """The signal that ranks are sent for it: they do not know HUP."""
    return signal.SIGTERM if number == signal.SIGHUP else number


def _mark_ended(companion: Ranks) -> Fault | None:
    run_dir = companion.work.run_dir
    if run_dir.is_done:
        return None
    failure = run_dir.failure()
    if failure is None:
        failure = Failure(f"the {companion.work.name} stage ended with code {companion.code}; its logs are in "
                          f"{run_dir.logs}", 1, lost_peer=companion.code < 0)
        run_dir.mark_failed(failure)
    return None if failure.exit_code == USERS_MISTAKE else Fault(failure.message, 1, not failure.lost_peer)


def _ended_by(received: Sequence[int], ranks: Ranks) -> bool:
    """Whether a signal that was passed on ended the ranks, which were not listening yet or have nothing to save. Of the
    others, one may only have lost a peer."""
    passed = {_passed(number) for number in received} | ({signal.SIGKILL} if _at_once(received) else set())
    return ranks.ended_by(passed) or ranks.work.run_dir.failure() is None


def ended_early(received: Sequence[int], where: str, run_dir: RunDir) -> int:
    """Tells the person that a signal ended the work, and leaves PREEMPTED; the exit code."""
    number = signal.Signals(received[0])
    message = f"ended by {number.name} {where}; the same command goes on from there"
    run_dir.make()
    run_dir.clear(FAILED)
    run_dir.mark_preempted(message, number)
    print(message, file=sys.stderr, flush=True)
    return 128 + number


def _ended_in(work: Work, received: Sequence[int]) -> int:
    if work.place.nodes == 1:
        return ended_early(received, f"in the {work.name} stage", work.run_dir)
    when = "at once" if _at_once(received) else f"before the ranks of node {work.place.node} had begun to work"
    number = signal.Signals(received[0])
    if number != signal.SIGTERM:
        return ended_early(received, when, work.run_dir)
    # perhaps only because another node failed: srun ends the rest so
    print(f"ended by {number.name} {when}", file=sys.stderr, flush=True)
    return 128 + number


# ------------------------------------------------------------------------------------------------------------- failures


def fault_of(ranks: Ranks) -> Fault:
    """Which rank failed, why, and where to read on."""
    run_dir, place = ranks.work.run_dir, ranks.work.place
    rank_log = run_dir.rank_log(ranks.failed_rank)
    if ranks.code < 0:                   # a signal ended it, so others can only report a lost peer
        number = signal.Signals(-ranks.code)
        why = WHY.get(number, "")
        message = f"rank {ranks.failed_rank} was ended by {number.name}{why}"
        if ranks.failed_rank - place.node * place.procs in ranks.never_woken:
            message = (f"rank {ranks.failed_rank} was stopped (SIGSTOP), and nothing woke it for "
                       f"{ranks.work.stopped_seconds:g} s (twice cluster.timeout_seconds)")
        run_dir.mark_failed(Failure(message, 1, ranks.failed_rank, place.node))
        return Fault(f"{message}; its log is {rank_log}", 1, last_lines=_tail(rank_log))
    found = run_dir.failure()
    if found is not None and found.node == place.node:
        lines = _tail(run_dir.rank_log(found.rank)) if found.exit_code == 1 else ()
        return Fault(found.message, found.exit_code, not found.lost_peer, lines)
    lines = tuple(ranks.stderr().splitlines())
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:                           # of a rank that had no folder for a marker, or only lost one on another node
        fault = Fault(errors[-1], ranks.code)
    else:
        message = f"the {ranks.work.name} stage ended with code {ranks.code}; its logs are in {run_dir.logs}"
        fault = Fault(message, ranks.code, last_lines=lines[-TAIL_LINES:])
    failure = Failure(fault.message, fault.code, ranks.failed_rank, place.node, lost_peer=True)
    run_dir.mark_failed(failure, first_only=True)
    return fault


def _tail(log: Path) -> tuple[str, ...]:
    return tuple(log.read_text(errors="replace").splitlines()[-TAIL_LINES:]) if log.exists() else ()
