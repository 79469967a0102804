"""Signals at random instants: to a rank, to all of them, to the launcher, to everything."""
from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from typing import Any

from . import commands
from .bases import CACHED, FRESH, MIDWAY
from .moments import any_moment
from .trial import Trial
from .verdict import Verdict, given_once, hung, until_it_ends

TARGETS = ("rank 0", "last rank", "ranks", "launcher", "everything")
RESTARTS = "cluster.max_restarts=2"
SHORT_TIMEOUT = "cluster.timeout_seconds=8"


def killed(number: signal.Signals, times: int = 1) -> Any:
    """A fault: this signal, so many starts in a row, each at a moment and to a target of its own."""
    def strike(trial: Trial) -> Verdict:
        trial.begin(FRESH, FRESH, CACHED, MIDWAY)
        for _ in range(times):
            attempt = _signalled(trial, number)
            if attempt.hung or attempt.code == 0:
                break
        return until_it_ends(trial)
    return strike


def _signalled(trial: Trial, number: signal.Signals) -> commands.Attempt:
    moment, target = any_moment(trial.random, trial.base.seconds), trial.random.choice(TARGETS)
    restarts = trial.random.choice(((), (), (RESTARTS,)))
    trial.tell(f"{number.name} to {target}, {moment}{' '.join(('', *restarts))}")
    began, process = time.monotonic(), trial.start(*restarts)
    if moment.wait(trial.work, process):
        send(number, targets(target, process, trial))
    return trial.note(commands.finish(process, trial.work, began))


def targets(target: str, process: Any, trial: Trial) -> list[int]:
    if target == "launcher":
        return [process.pid]
    ranks = commands.ranks_in(trial.work)
    if target.endswith(" rank") or target.startswith("rank "):
        return commands.ranks_in(trial.work, 0 if target == "rank 0" or len(ranks) < 2 else 1)
    return ranks if target == "ranks" else [process.pid, *ranks]


def send(number: int, pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def paused(trial: Trial) -> Verdict:
    """SIGSTOP of a rank or of all, and SIGCONT after a while."""
    trial.begin(FRESH, MIDWAY)
    moment, target = any_moment(trial.random, trial.base.seconds), trial.random.choice(TARGETS)
    seconds = trial.random.uniform(0.2, 4)
    trial.tell(f"SIGSTOP to {target}, {moment}, SIGCONT {seconds:.1f} s later")
    began, process = time.monotonic(), trial.start()
    if moment.wait(trial.work, process):
        stopped = targets(target, process, trial)
        send(signal.SIGSTOP, stopped)
        time.sleep(seconds)
        send(signal.SIGCONT, stopped)
    trial.note(commands.finish(process, trial.work, began))
    return until_it_ends(trial)


def stopped_for_good(trial: Trial) -> Verdict:
    """SIGSTOP of one rank, which nobody wakes: the others give up after cluster.timeout_seconds, and the launcher ends
    it."""
    trial.begin(FRESH, MIDWAY)
    moment = any_moment(trial.random, trial.base.seconds)
    target = trial.random.choice(("rank 0", "last rank"))
    trial.tell(f"SIGSTOP to {target} for good, {moment}")
    began, process = time.monotonic(), trial.start(SHORT_TIMEOUT)
    stopped: list[int] = []
    if moment.wait(trial.work, process):
        stopped = targets(target, process, trial)
        send(signal.SIGSTOP, stopped)
    attempt = trial.note(commands.finish(process, trial.work, began))
    return hung(trial) if attempt.hung else until_it_ends(trial)


def nothing(trial: Trial) -> Verdict:
    """No fault: what the campaign itself makes of an undisturbed run."""
    trial.begin(FRESH, CACHED, MIDWAY)
    return given_once(trial)
