"""Clocks that are wrong: of the machine, and the times of files."""
from __future__ import annotations

import os
import random
import time
from pathlib import Path

from . import commands
from .bases import CACHED, FINISHED, FRESH, MIDWAY
from .moments import any_moment
from .trial import Trial
from .verdict import Verdict, given_once, until_it_ends

HOUR, YEAR = 3600, 365 * 24 * 3600


def times_of_files(trial: Trial) -> Verdict:
    """All or some files of a run, its caches and its inputs are of another time."""
    trial.begin(CACHED, MIDWAY, FINISHED)
    share = trial.random.choice((0.2, 1.0))
    trial.tell(f"{share:.0%} of the files have other times")
    for path in sorted(trial.work.rglob("*")):
        if trial.random.random() < share:
            when = time.time() + some_time(trial.random)
            os.utime(path, (when, when))
    return given_once(trial)


def jump(trial: Trial) -> Verdict:
    """The clock is wrong from the start, or jumps while the run is under way; the next start has the right one."""
    trial.begin(FRESH, CACHED, MIDWAY)
    clock = trial.work / "clock"
    at_start, later = trial.random.choice((0, some_time(trial.random))), some_time(trial.random)
    moment = any_moment(trial.random, trial.base.seconds)
    trial.tell(f"the clock is off by {at_start} s, and by {later} s from {moment}")
    _set(clock, at_start)
    trial.environment["DPO_FAULTS_CLOCK"] = str(clock)
    began, process = time.monotonic(), trial.start()
    if moment.wait(trial.work, process):
        _set(clock, later)
    trial.note(commands.finish(process, trial.work, began))
    trial.environment.clear()
    return until_it_ends(trial)


def _set(clock: Path, seconds: int) -> None:
    new = clock.with_name("clock-new")
    new.write_text(str(seconds))
    new.rename(clock)


def some_time(draw: random.Random) -> int:
    """Seconds from now: an hour to ten years, back or ahead."""
    return draw.choice((-1, 1)) * draw.choice((HOUR, 24 * HOUR, YEAR, 10 * YEAR))
