"""What starts the processes of a run. Until a command's own code listens, Ctrl-C ends it as it ends any program: not in
the midst of an import, with a traceback."""
from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # at hand, where importing `signal` could be interrupted
import sys

if (sys.argv[:1] == ["-m"] or sys.argv[0].endswith("dpo-dist")) and (
        _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler):
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)
