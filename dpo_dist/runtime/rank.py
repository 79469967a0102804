"""How the launcher starts a rank: python -m dpo_dist.runtime.rank MODULE [overrides]. As python -m MODULE, but faster.

Importing torch and transformers makes a million objects that stay. Looking through them for garbage again and again
takes a fifth of the time, so nothing is collected until the work begins (process.run_entry).

If its launcher is killed, a rank gets TERM, saves and ends: otherwise nobody could stop it or report how it ended.
"""
from __future__ import annotations

import ctypes
import gc
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1                     # prctl(2): the signal that comes when the parent dies

if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    gc.disable()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
