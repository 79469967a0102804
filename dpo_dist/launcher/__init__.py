"""What starts the processes of a run. Until a command's own code listens, Ctrl-C ends it as it ends any program: not in
the midst of an import, with a traceback."""
from __future__ import annotations

import signal
import sys
from pathlib import Path

if (sys.argv[:1] == ["-m"] or Path(sys.argv[0]).name == "dpo-dist") and (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
