"""How the launcher starts a rank: python -m dpo_dist.runtime.rank MODULE [overrides], as python -m MODULE [overrides],
but sooner.

Importing torch and transformers makes a million objects that stay. Looking through them for garbage again and again
takes a fifth of the time, so nothing is collected until the work begins (process.run_entry).
"""
from __future__ import annotations

import gc
import runpy
import sys

if __name__ == "__main__":
    gc.disable()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
