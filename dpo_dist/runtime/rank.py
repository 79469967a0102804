"""How the launcher starts a rank: python -m dpo_dist.runtime.rank MODULE [overrides]. As python -m MODULE, but faster.

Importing torch and transformers makes a million objects that stay. Looking through them for garbage again and again
takes a fifth of the time, so nothing is collected until the work begins (process.run_entry).

If its launcher is killed, a rank gets TERM, saves and ends: otherwise nobody could stop it or report how it ended.
After USR2 every thread's stack stands in the rank's log, and it goes on.

Until the ranks have joined there is nothing to save, and they may be waiting for one that never comes: so a signal ends
them as it ends any program, and the launcher knows what it passed on. From then on signals are heard (preemption.py).
"""
from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1                     # prctl(2): the signal that comes when the parent dies

if __name__ == "__main__":
    faulthandler.register(signal.SIGUSR2)                        # into what is file 2 then: the rank's log
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(os.environ.get("DPO_DIST_LAUNCHER", os.getppid())):
        os.kill(os.getpid(), signal.SIGTERM)                     # it was killed before that
    gc.disable()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
