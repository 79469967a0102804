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
from dpo_dist.runtime.run_dir import FAILED, Failure

TAIL_LINES = 20


def run(work: Work, received: Sequence[int], companions: Sequence[Work] = ()) -> int:
    """Starts the ranks, and companions that serve them, and waits; the exit code. What ranks print passes through.

    received: see signals.py. A signal goes to all ranks, which save first (runtime/preemption.py); a second Ctrl-C
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
        run_dir.clear(FAILED)                                    # of a rank that only lost a peer
        return _ended_in(work, received)
    return report_failure(ranks)


def _wait(ranks: Ranks, companions: Sequence[Ranks], received: Sequence[int]) -> None:
    """Waits until the ranks have ended. A companion that ends before its work is done is marked FAILED; the ranks see
    the marker, and go on as far as they can."""
    serving, passed = list(companions), 0
    while not ranks.look():
        time.sleep(SECONDS_BETWEEN_LOOKS)
        if len(received) > passed:
            _pass_on(received[passed:], _at_once(received), [ranks, *serving])
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


def _at_once(received: Sequence[int]) -> bool:
    """A second Ctrl-C waits for nothing."""
    return received.count(signal.SIGINT) > 1


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
    passed = {_passed(number) for number in received} | ({signal.SIGKILL} if _at_once(received) else set())
    return -ranks.code in passed if ranks.code < 0 else ranks.work.run_dir.failure() is None


def ended_early(received: Sequence[int], where: str) -> int:
    """Tells the person that a signal ended the work; the exit code."""
    number = signal.Signals(received[0])
    print(f"ended by {number.name} {where}; the same command goes on from there", file=sys.stderr)
    return 128 + number


def _ended_in(work: Work, received: Sequence[int]) -> int:
    if work.place.nodes == 1:
        return ended_early(received, f"in the {work.name} stage")
    number = signal.Signals(received[0])
    when = "at once" if _at_once(received) else "before its ranks had begun to work"
    print(f"node {work.place.node}: ended by {number.name.removeprefix('SIG')} {when}", file=sys.stderr)
    return 128 + number


# ------------------------------------------------------------------------------------------------------------- failures


def report_failure(ranks: Ranks) -> int:
    """Tells the person which rank failed, why, and where to read on; the exit code."""
    run_dir, place = ranks.work.run_dir, ranks.work.place
    rank_log = run_dir.rank_log(ranks.failed_rank)
    if ranks.code < 0:                   # a signal ended it, so others can only report a lost peer
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
    errors = [line for line in lines if line.startswith("error: ")]
    if errors:                           # printed before there was a folder for a marker
        print(errors[-1], file=sys.stderr)
        return 2
    message = f"error: the {ranks.work.name} stage ended with code {ranks.code}; its logs are in {run_dir.logs}"
    print("\n".join([*lines[-TAIL_LINES:], message]), file=sys.stderr)
    return ranks.code


def _tail(log: Path) -> list[str]:
    return log.read_text(errors="replace").splitlines()[-TAIL_LINES:] if log.exists() else []
