"""Several jobs at once: on one cache, and on one run.dir."""
from __future__ import annotations

import signal
import time

from . import commands
from .bases import CACHED, FRESH, MIDWAY
from .signals import send
from .trial import Trial
from .verdict import LOST, RECOVERED, SILENT, Verdict, hung, said_something, until_it_ends


def on_one_cache(trial: Trial) -> Verdict:
    """Jobs with run.dirs of their own fill one cache; one may be killed, and its command is given again."""
    trial.begin(FRESH)
    folders = ["run", "run-1", "run-2"][:trial.random.choice((2, 2, 3))]
    killed = trial.random.random() < 0.5
    _side_by_side(trial, [[f"run.dir={folder}"] for folder in folders], killed)
    if any(attempt.hung for attempt in trial.attempts):
        return hung(trial)
    for attempt, folder in zip(list(trial.attempts), folders, strict=True):
        if attempt.code != 0:
            if not killed:
                return Verdict(LOST, f"{folder} ended with {attempt.code}: {attempt.terminal[-500:]}")
            trial.again(f"run.dir={folder}")
    found = [f"{folder}: {what}" for folder in folders for what in trial.differences(trial.work / folder)]
    return Verdict(LOST if said_something(trial) else SILENT, "; ".join(found)) if found else Verdict(RECOVERED)


def on_one_run_dir(trial: Trial) -> Verdict:
    """The same command twice: one of them is refused, or finds the other's work done."""
    trial.begin(FRESH, CACHED, MIDWAY)
    _side_by_side(trial, [[]] * trial.random.choice((2, 2, 3)), trial.random.random() < 0.3)
    if any(attempt.hung for attempt in trial.attempts):
        return hung(trial)
    unclean = [one for one in trial.attempts if one.code not in (0, -signal.SIGKILL) and not one.stopped_cleanly]
    if unclean:
        return Verdict(LOST, f"unclean stop, exit {unclean[0].code}: {unclean[0].terminal[-500:]}")
    trial.again()
    return until_it_ends(trial)


def _side_by_side(trial: Trial, commands_words: list[list[str]], killed: bool) -> None:
    """Starts them shortly after each other, kills one of them if asked, and notes how each ended."""
    began, processes = time.monotonic(), []
    for words in commands_words:
        processes.append(trial.start(*words))
        time.sleep(trial.random.choice((0, trial.random.uniform(0, 1.5))))
    trial.tell(f"{len(processes)} jobs at once")
    if killed:
        seconds = trial.random.uniform(0, trial.base.seconds)
        trial.tell(f"the first killed {seconds:.2f} s later")
        time.sleep(seconds)
        if processes[0].poll() is None:
            send(signal.SIGKILL, [processes[0].pid])
    for process in processes:
        trial.note(commands.finish_beside(process, trial.work, began))
    commands.wait_until_gone(trial.attempts[-1], trial.work)
