"""Signals while a fresh interpreter starts: all other commands of the campaign are forked, and import nothing."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from conftest import REPO

from . import commands
from .bases import CACHED, FRESH, MIDWAY
from .moments import Moment
from .signals import send
from .trial import Trial
from .verdict import Verdict, until_it_ends

NUMBERS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
SECONDS = 16.0                           # of which a dozen are imports, in two processes on two cores


def fresh(trial: Trial) -> Verdict:
    """A signal to the launcher, to the ranks or to all of them, at some moment of a real start."""
    trial.begin(FRESH, CACHED, MIDWAY)
    number, moment = trial.random.choice(NUMBERS), Moment(trial.random.uniform(0, SECONDS))
    target = trial.random.choice(("launcher", "ranks", "everything"))
    trial.tell(f"{number.name} to {target}, {moment}")
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "dpo_dist.launcher.cli", *trial.words], cwd=trial.work, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
                               env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    if moment.wait(trial.work, process):
        ranks = [pid for pid in commands.processes_in(trial.work) if pid != process.pid]
        send(number, {"launcher": [process.pid], "ranks": ranks, "everything": [process.pid, *ranks]}[target])
    trial.note(commands.finish(process, trial.work, began))
    return until_it_ends(trial)
